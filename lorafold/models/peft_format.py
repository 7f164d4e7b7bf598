"""PEFT's names for the tensors of an adapter, and what its configurations say.

A layer's key is `base_model.model.<layer>.<part>`. A parameter's is that of its module; of several parameters of one
module (experts) PEFT wraps one around the other, the last of the module outermost, so that those inside have
`.base_layer` in their names. nn.MultiheadAttention has its input projection's pair on the module itself, and that of
the output projection at `.base_layer.out_proj`. What is trained whole is stored as its new value.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.adapters.adapted import AdaptedLayer, carriers, parameter_names, plain_modules, plain_parameter
from lorafold.adapters.lora import LoRA, VeRA
from lorafold.adapters.parameters import AdaptedParameter, ParameterDelta, ParameterLoRA, ParameterValue
from lorafold.adapters.sites import ConvSite
from lorafold.adapters.targets import adaptable, linear_layers
from lorafold.config import METHODS, AdapterSpec

PREFIX = "base_model.model."
PARTS = (
    *("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    *("vera_lambda_b", "vera_lambda_d"),
    *("offset_delta", "scale_A.weight", "scale_B.weight", "scale_A", "scale_B", "scale_delta"),
)
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
}
FEATURES = "FEATURE_EXTRACTION"
KINDS = {
    "LORA": "lora",
    "QA_LORA": "qa-lora",
    "VERA": "vera",
    "FULL": "full",  # from here on names of our own
    "LAST_LAYERS": "last-layers",
    "HEAD": "head",
}
_UNSUPPORTED = {  # PEFT options that change what the tensors mean -> the value under which they change nothing
    "use_qalora": False,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
}
_PLAIN_INIT = (True, False, None, "kaiming", "gaussian", "orthogonal", "eva")  # ways that leave the base as it is


def stored_names(model: nn.Module, name: str) -> dict[str, str]:
    """The key of each parameter of an adapter, as `adapter_state` names them -> its key in the file."""
    owners = Counter(path.rpartition(".")[0] for path, _ in _experts(model, name))
    seen: Counter[str] = Counter()
    names = {}
    for path, carrier in carriers(model):
        if name not in carrier.adapters:
            continue
        adapter = carrier.adapters[name]
        where = path
        if isinstance(adapter, ParameterLoRA):
            owner = path.rpartition(".")[0]
            where = _attention_name(model, path)
            if where is None:
                seen[owner] += 1
                where = owner + ".base_layer" * (owners[owner] - seen[owner])
        for key, _ in adapter.named_parameters():
            if isinstance(adapter, ParameterDelta | ParameterValue):
                names[f"{path}.{key}"] = PREFIX + _whole_name(model, path, name)
            else:
                weight = ".weight" if key in ("lora_A", "lora_B") else ""
                names[f"{path}.{key}"] = f"{PREFIX}{where}.{key}{weight}"
    return names


def _experts(model: nn.Module, name: str) -> list[tuple[str, AdaptedParameter]]:
    """Parameters with LoRA that are no part of nn.MultiheadAttention."""
    return [
        (path, carrier)
        for path, carrier in carriers(model)
        if isinstance(carrier, AdaptedParameter)
        and name in carrier.adapters
        and isinstance(carrier.adapters[name], ParameterLoRA)
        and _attention_name(model, path) is None
    ]


def _attention_name(model: nn.Module, path: str) -> str | None:
    """PEFT's name for the place of a parameter of nn.MultiheadAttention; None for other parameters."""
    owner, _, parameter = path.rpartition(".")
    if parameter == "in_proj_weight" and isinstance(model.get_submodule(owner), nn.MultiheadAttention):
        return owner
    outer, _, part = owner.rpartition(".")
    if parameter == "weight" and part == "out_proj" and isinstance(model.get_submodule(outer), nn.MultiheadAttention):
        return f"{outer}.base_layer.out_proj"
    return None


def _whole_name(model: nn.Module, path: str, name: str) -> str:
    """`layer.bias`, or `layer.base_layer.bias` where the layer carries an adapter of that name too."""
    owner, _, parameter = path.rpartition(".")
    module = model.get_submodule(owner) if owner else model
    adapted = isinstance(module, AdaptedLayer) and name in module.adapters
    return f"{owner}.base_layer.{parameter}" if adapted else path


@torch.no_grad()
def stored_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Every tensor of an adapter by its key in the file."""
    keys = stored_names(model, name)
    tensors: dict[str, Tensor] = {}
    for path, carrier in carriers(model):
        if name not in carrier.adapters:
            continue
        adapter = carrier.adapters[name]
        values = dict(adapter.named_parameters())
        if type(adapter) is LoRA:
            values |= dict(zip(adapter.site.names, adapter.factors(), strict=True))
            if adapter.dora and isinstance(adapter.site, ConvSite):
                ones = (1,) * len(adapter.site.base.kernel_size)
                values["lora_magnitude_vector"] = adapter.lora_magnitude_vector.view(1, -1, *ones)
        elif isinstance(adapter, VeRA):
            tensors |= {"base_model.vera_A": adapter.vera_A, "base_model.vera_B": adapter.vera_B}
        elif isinstance(adapter, ParameterDelta):
            original = plain_parameter(model, path)
            assert original is not None
            values = {"change": original + adapter.change.to(original.dtype)}
        tensors |= {keys[f"{path}.{key}"]: value for key, value in values.items()}
    return {key: value.detach().cpu().contiguous() for key, value in tensors.items()}


def stored_config(model: nn.Module, spec: AdapterSpec, name: str) -> dict[str, Any]:
    """adapter_config.json but for what is known of the base; ranks and scalings are those that the layers have."""
    held = {path: carrier.adapters[name] for path, carrier in carriers(model) if name in carrier.adapters}
    kind = next(key for key, method in KINDS.items() if method == spec.method)
    task = _task_of(model)
    if METHODS[spec.method].whole:
        own = {"layers": spec.layers, "modules_to_save": list(spec.modules_to_save)}
        return {"peft_type": kind, "task_type": task} | {k: own[k] for k in METHODS[spec.method].options}
    layers = [path for path, a in held.items() if not isinstance(a, ParameterLoRA | ParameterDelta | ParameterValue)]
    config: dict[str, Any] = {
        "peft_type": kind,
        "task_type": task,
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": _target_names(model, layers),
        "use_rslora": spec.use_rslora,
        "bias": spec.bias,
        "inference_mode": True,
    }
    if spec.method == "qa-lora":
        whole = {"modules_to_save": list(spec.modules_to_save) or None}
        return config | {"adapt": spec.adapt, "k_quants": spec.k_quants} | whole
    if spec.method == "vera":
        wanted = {k: config[k] for k in ("peft_type", "task_type", "r", "target_modules", "bias", "inference_mode")}
        wanted |= {"vera_dropout": spec.lora_dropout, "d_initial": spec.d_initial, "save_projection": True}
        return wanted | {"modules_to_save": _whole_modules(model, spec) or None}
    config |= {"use_dora": spec.use_dora, "modules_to_save": _whole_modules(model, spec) or None}
    parameters = [path for path, _ in _experts(model, name)]
    if parameters:
        config["target_parameters"] = parameters
    attention = [p for path, a in held.items() if isinstance(a, ParameterLoRA) if (p := _attention_name(model, path))]
    config["target_modules"] += [path for path in attention if not path.endswith(".base_layer.out_proj")]
    return config | _ranks(spec, held)


def _task_of(model: nn.Module) -> str | None:
    """What PEFT calls the task of a model: a model without a head that reads tokens gives features."""
    if isinstance(model, PreTrainedModel) and model.base_model is model and model.main_input_name == "input_ids":
        return FEATURES
    return next((task for end, task in TASKS.items() if type(model).__name__.endswith(end)), None)


def _whole_modules(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Whole names of what `modules_to_save` means: PEFT takes norm for the end of input_layernorm as well."""
    return [
        n
        for n in plain_modules(model)
        if any(n == wanted or n.endswith(f".{wanted}") for wanted in spec.modules_to_save)
    ]


def _ranks(spec: AdapterSpec, held: Mapping[str, nn.Module]) -> dict[str, Any]:
    """r and lora_alpha of most layers, and patterns for the others."""
    ranks, alphas = {}, {}
    for path, adapter in held.items():
        if isinstance(adapter, LoRA):
            rank = adapter.factors()[0].shape[0]
        elif isinstance(adapter, ParameterLoRA):
            rank = adapter.lora_A.shape[0] // adapter.experts
        else:
            continue
        ranks[path] = rank
        alphas[path] = adapter.scaling * (rank**0.5 if spec.use_rslora else rank)
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(path)}": r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(path)}": a for path, a in alphas.items() if a != alpha},
    }


def _target_names(model: nn.Module, layers: list[str]) -> list[str]:
    """Last parts of the layer names where these mean exactly the adapted layers, otherwise the whole names."""
    endings = sorted({path.rpartition(".")[2] for path in layers})
    meant = {path for path in adaptable(model) if path.rpartition(".")[2] in endings}
    return endings if meant == set(layers) else sorted(layers)


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What a configuration uses that is not known here."""
    kind = config.get("peft_type")
    faults = [] if str(kind) in KINDS else [f"peft_type {kind!r} ({', '.join(KINDS)} are)"]
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            faults.append(f"{key}: {config[key]!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        faults.append(f"init_lora_weights: {config['init_lora_weights']!r}, which changed the base weights as well")
    return faults


def malformed(config: Mapping[str, Any]) -> list[str]:
    """What in a configuration has a type or value that no adapter has."""
    faults: list[str] = []
    if METHODS[KINDS[config["peft_type"]]].whole:
        return faults
    if config.get("r") != "full" and type(config.get("r")) is not int:
        faults.append(f"r is {config.get('r')!r}, not a whole number")
    alpha = config.get("lora_alpha")
    if config.get("peft_type") != "VERA" and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        faults.append(f"lora_alpha is {alpha!r}, not a number")
    faults += [
        f"{key} is {config[key]!r}, neither true nor false"
        for key in ("use_dora", "use_rslora")
        if config.get(key) not in (True, False, None)
    ]
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (names or value is None or (isinstance(value, str) and _is_regex(value))):
            faults.append(f"{key} is {value!r}, neither a list of names nor a regular expression")
    numbers = config.get("layers_to_transform")
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
    if not all(type(n) is int for n in numbers):
        faults.append(f"layers_to_transform is {config['layers_to_transform']!r}, not numbers of blocks")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(_is_regex(name) for name in value):
            faults.append(f"{key} is {value!r}, not a mapping from expressions to numbers")
        elif not all(type(n) in (int, float) and n > 0 for n in value.values()):
            faults.append(f"{key} is {value!r}, and its numbers must be positive")
        elif key == "rank_pattern" and not all(type(n) is int for n in value.values()):
            faults.append(f"{key} is {value!r}, and ranks are whole numbers")
    return faults


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def spec_of(config: Mapping[str, Any]) -> AdapterSpec:
    """The spec that a checked configuration states; which layers are meant is left to the tensors.

    Raises:
        ConfigError, KeyError, TypeError: it is incomplete or impossible.
    """
    method = KINDS[config["peft_type"]]
    whole = tuple(config.get("modules_to_save") or ())
    if METHODS[method].whole:
        own = {"layers": config.get("layers", 2), "modules_to_save": whole}
        return AdapterSpec(method, **{k: own[k] for k in METHODS[method].options})  # type: ignore[arg-type]
    if method == "vera":
        options = {"lora_dropout": config.get("vera_dropout", 0.0), "d_initial": config.get("d_initial", 0.1)}
        return AdapterSpec("vera", config["r"], **options, modules_to_save=whole)
    spec = {
        "method": method,
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
    if method == "qa-lora":
        spec |= {"adapt": config.get("adapt", "offset"), "k_quants": config.get("k_quants", "promote")}
        return AdapterSpec(**spec, modules_to_save=whole)
    return AdapterSpec(
        **spec,
        bias=config.get("bias", "none"),
        modules_to_save=whole,
        target_parameters=tuple(config.get("target_parameters") or ()),
    )


def place(model: nn.Module, key: str, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Of a key in a file, the layer or parameter it is for and the part of its adapter; None if it is for nothing here.

    The part is empty for the new value of a parameter that is trained whole.
    """
    if not key.startswith(PREFIX):
        return None
    key = key.removeprefix(PREFIX)
    part = next((p for p in PARTS if key.endswith("." + p)), None)
    if part is None:
        path = key.replace(".base_layer", "")
        return (path, "") if plain_parameter(model, path) is not None else None
    path, part = key.removesuffix("." + part), part.removesuffix(".weight")
    depth = path.count(".base_layer")
    path = path.replace(".base_layer", "")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    if isinstance(module, AdaptedLayer):
        module = module.base
    outer = path.rpartition(".")[0]
    if isinstance(module, nn.MultiheadAttention):
        return f"{path}.in_proj_weight", part
    if depth and isinstance(model.get_submodule(outer), nn.MultiheadAttention):
        return f"{path}.weight", part
    if path in adaptable(model) and not depth:
        return path, part
    meant = config.get("target_parameters") or ()
    wanted = [n for n in parameter_names(module) if _named(meant, f"{path}.{n}")]
    return (f"{path}.{wanted[-1 - depth]}", part) if depth < len(wanted) else None


def absent_layers(model: nn.Module, config: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Linear layers that a configuration targets and for which the file holds nothing."""
    chosen = config.get("layers_to_transform")
    chosen = [chosen] if isinstance(chosen, int) else chosen
    absent = []
    for path in linear_layers(model):
        number = re.match(r".*\.(\d+)\.", path)  # the last one, as PEFT reads them
        transformed = chosen is None or (number is not None and int(number[1]) in chosen)
        excluded = _named(config.get("exclude_modules"), path)
        if transformed and not excluded and _named(config.get("target_modules"), path) and path not in present:
            absent.append(path)
    return absent


def _named(modules: Any, path: str) -> bool:
    """Whether PEFT's list of names, or its one regular expression, means a layer."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules or ())
