"""PEFT's names for the tensors of an adapter, and the configuration that goes with them.

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

from lorafold.adapters.adapted import (
    AdaptedLayer,
    carrier_uses,
    carriers,
    parameter_names,
    plain_modules,
    plain_parameter,
)
from lorafold.adapters.lora import LoRA, VeRA
from lorafold.adapters.parameters import AdaptedParameter, ParameterDelta, ParameterLoRA, ParameterValue
from lorafold.adapters.sites import ConvSite, site_of
from lorafold.adapters.targets import adaptable, linear_layers
from lorafold.adapters.tied import TiedLoRA, follows, tied_pair
from lorafold.config import METHODS, AdapterSpec
from lorafold.models.peft_config import KINDS

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
    keys, pair = stored_names(model, name), tied_pair(model)
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
        elif isinstance(adapter, TiedLoRA):
            a, b = adapter.learned()
            tensors |= {f"{PREFIX}{path}.lora_A.weight": a, f"{PREFIX}{path}.lora_B.weight": b}
        elif isinstance(adapter, VeRA):
            tensors |= {"base_model.vera_A": adapter.vera_A, "base_model.vera_B": adapter.vera_B}
        elif isinstance(adapter, ParameterDelta):
            assert isinstance(carrier, AdaptedParameter)
            original = plain_parameter(model, path)
            assert original is not None
            values = {"change": original + adapter.change.to(original.dtype)}
            if pair is not None and path == f"{pair[0]}.weight" and len(carrier_uses(model, carrier)) > 1:
                tensors[f"{PREFIX}{pair[1]}.weight"] = values["change"].clone()  # PEFT asks for it
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
    held = {path: adapter for path, adapter in held.items() if not follows(adapter)}
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
        whole = {"modules_to_save": list(spec.modules_to_save) or None, "ensure_weight_tying": spec.ensure_weight_tying}
        return config | {"adapt": spec.adapt, "k_quants": spec.k_quants} | whole
    if spec.method == "vera":
        wanted = {k: config[k] for k in ("peft_type", "task_type", "r", "target_modules", "bias", "inference_mode")}
        wanted |= {"vera_dropout": spec.lora_dropout, "d_initial": spec.d_initial, "save_projection": True}
        return wanted | {"modules_to_save": _whole_modules(model, spec) or None}
    config |= {"use_dora": spec.use_dora, "modules_to_save": _whole_modules(model, spec) or None}
    config["ensure_weight_tying"] = spec.ensure_weight_tying
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


@torch.no_grad()
def without_copies(model: nn.Module, tensors: Mapping[str, Tensor], spec: AdapterSpec) -> dict[str, Tensor]:
    """The tensors of an adapter without what PEFT writes twice: the base's weights, and the head's part of the tied."""
    kept = dict(tensors)
    for key, value in tensors.items():
        path = key.removeprefix(PREFIX).removesuffix(".base_layer.weight")
        parts = (f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_A.weight")
        adapted = key.endswith(".base_layer.weight") and not tensors.keys().isdisjoint(parts)
        module = plain_modules(model).get(path) if adapted else None
        if module is not None and _same(value, site_of(module).weight()):
            del kept[key]
    pair = tied_pair(model) if spec.ensure_weight_tying else None
    if pair is None:
        return kept
    embedding, head = (PREFIX + name for name in pair)
    twice = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A", "weight": "weight"}
    for theirs, ours in twice.items():
        copy, original = kept.get(f"{head}.{theirs}"), kept.get(f"{embedding}.{ours}")
        if copy is not None and original is not None and _same(copy, original if ours == "weight" else original.T):
            del kept[f"{head}.{theirs}"]
    return kept


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.float(), b.float().to(a.device))


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
