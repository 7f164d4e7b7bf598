"""Adapters on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`.

A LoRA adapter is stored exactly as PEFT stores it, so PEFT, vLLM and others read it. A QA-LoRA adapter is stored in
its own small form (`peft_type` QA_LORA, which PEFT refuses by name instead of misreading); `lorafold export` expands
it. The hash of the base weights and, for QA-LoRA, the pooling divisor stand in the safetensors header.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.inject import (
    Injection,
    adapted_layers,
    adapter_state,
    attach,
    linear_layers,
    make_adapter,
    prepare_group_bases,
)
from lorafold.adapters.lora import LoRA
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, ConfigError, bullet_list
from lorafold.files import replacing_folder
from lorafold.models.load import LoadedModel
from lorafold.models.tensors import save_tensors
from lorafold.quant.linear import QuantLinear

POOLING = "sqrt(group_size)"  # adapters/group.py
CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"
_PARTS = ("lora_A", "lora_B", "offset_delta", "scale_A", "scale_B", "scale_delta")
_PREFIX = "base_model.model."  # PEFT's name for the model inside its wrapper
_UNSUPPORTED = {  # PEFT options that change what the tensors mean -> the value under which they change nothing
    "use_dora": False,
    "use_qalora": False,
    "bias": "none",
    "modules_to_save": None,
    "fan_in_fan_out": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}

_PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")  # ways to begin that leave the base as it is


def save_adapter(folder: Path, loaded: LoadedModel, spec: AdapterSpec, name: str = "default") -> None:
    """Write the adapter `name` of a model; the folder appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    state = adapter_state(loaded.model, name)
    layers = [path for path, layer in adapted_layers(loaded.model) if name in layer.adapters]
    config: dict[str, Any] = {
        "peft_type": "LORA" if spec.method == "lora" else "QA_LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(loaded.path),
        "r": spec.r,
        "lora_alpha": spec.alpha,
        "lora_dropout": spec.lora_dropout,
        "target_modules": _target_names(loaded.model, layers),
        "use_rslora": spec.use_rslora,
        "bias": "none",
        "inference_mode": True,
    }
    header = {"format": "pt", "base_weights_sha256": loaded.weights_hash()}
    if spec.method == "qa-lora":
        config |= {"adapt": spec.adapt, "k_quants": spec.k_quants}
        header["pooling_divisor"] = POOLING
    tensors = {_file_key(key): value.detach().cpu().contiguous() for key, value in state.items()}
    write_adapter_folder(folder, config, tensors, header)


def write_adapter_folder(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], header: dict[str, str]
) -> None:
    """Write the two files of an adapter folder."""
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tensors(temporary / WEIGHTS, tensors, header)


def _target_names(model: nn.Module, layers: list[str]) -> list[str]:
    """Last parts of the layer names where these mean exactly the adapted layers, otherwise the whole names."""
    endings = sorted({path.rpartition(".")[2] for path in layers})
    meant = {path for path in linear_layers(model) if path.rpartition(".")[2] in endings}
    return endings if meant == set(layers) else sorted(layers)


def _file_key(key: str) -> str:
    return f"{_PREFIX}{key}.weight" if key.endswith(("lora_A", "lora_B")) else f"{_PREFIX}{key}"


def read_spec(folder: Path) -> tuple[AdapterSpec, dict[str, Any]]:
    """The spec an adapter folder states, and the whole configuration.

    Raises:
        AdapterError: no adapter lies there, or it uses what is not supported; all of it is named.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} is not an adapter folder: it lacks {' and '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = {"LORA": "lora", "QA_LORA": "qa-lora"}.get(str(config.get("peft_type")))
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a JSON object: {error}") from None
    faults = [] if kind else [f"peft_type {config.get('peft_type')!r} (LORA and QA_LORA are)"]
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            faults.append(f"{key}: {config[key]!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        faults.append(f"init_lora_weights: {config['init_lora_weights']!r}, which changed the base weights as well")
    if faults:
        raise AdapterError(f"{folder} uses what is not supported yet:\n" + bullet_list(faults))
    malformed = _malformed(config)
    if malformed:
        raise AdapterError(f"{folder / CONFIG} is incomplete or impossible:\n" + bullet_list(malformed))
    try:
        spec = AdapterSpec(
            method=kind,  # type: ignore[arg-type]
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config.get("lora_dropout", 0.0),
            use_rslora=config.get("use_rslora", False),
            adapt=config.get("adapt", "offset"),
            k_quants=config.get("k_quants", "promote"),
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise AdapterError(f"{folder / CONFIG} is incomplete or impossible: {error}") from None
    return spec, config


def _malformed(config: Mapping[str, Any]) -> list[str]:
    """What in a configuration has a type or value that no adapter has."""
    faults = []
    if config.get("r") != "full" and type(config.get("r")) is not int:
        faults.append(f"r is {config.get('r')!r}, not a whole number")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        faults.append(f"lora_alpha is {alpha!r}, not a number")
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (names or value is None or (isinstance(value, str) and _is_regex(value))):
            faults.append(f"{key} is {value!r}, neither a list of names nor a regular expression")
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


def load_adapter(loaded: LoadedModel, folder: Path, name: str = "default") -> Injection:
    """Put the adapter of a folder, ours, PEFT's or MLX's, on a model and make it active.

    Raises:
        AdapterError: the base weights differ from those it was trained on, or tensors are missing, unexpected or of
            the wrong shape; all faults are in one message and the model is left as it was.
    """
    if (folder / MLX_WEIGHTS).is_file():
        spec, config, tensors, header = _read_mlx(folder)
    else:
        spec, config = read_spec(folder)
        tensors, header = _read_tensors(folder / WEIGHTS)
    layers = linear_layers(loaded.model)
    faults = _base_faults(loaded, header)
    if spec.method == "qa-lora" and header.get("pooling_divisor") != POOLING:
        faults.append(f"its pooling divisor is {header.get('pooling_divisor')}, here it is {POOLING}")
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        path, _, part = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(_PREFIX) or path not in layers or part not in _PARTS:
            faults.append(f"unexpected tensor {key}")
        else:
            grouped.setdefault(path, {})[part] = value
    faults += [f"no tensors for the layer {path}" for path in _absent_layers(config, layers, grouped)]
    faults += [] if tensors else ["it holds no tensors"]
    built: dict[str, LoRA | GroupAdapter] = {}
    for path, parts in grouped.items():
        layer_spec = _layer_spec(spec, config, path)
        if layer_spec.method == "qa-lora" and not isinstance(layers[path], QuantLinear):
            faults.append(f"{path} is not quantized, and the adapter trains quantization offsets")
            continue
        adapter = make_adapter(layers[path], layer_spec)
        faults += _fill(adapter, parts, path)
        built[path] = adapter
    if faults:
        listing = bullet_list(faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else []))
        raise AdapterError(f"the adapter {folder} does not fit {loaded.path}:\n{listing}")
    result = Injection(list(built), trainable=sum(t.numel() for t in tensors.values()))
    if spec.method == "qa-lora":
        prepare_group_bases(layers, list(built), result, spec)
    for path, adapter in built.items():
        attach(loaded.model, path, adapter.requires_grad_(False), name)
    return result


def _read_mlx(folder: Path) -> tuple[AdapterSpec, dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """A LoRA adapter in MLX's layout, in the terms of PEFT's; see `export_mlx_adapter`."""
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, options = values.get("fine_tune_type", "lora"), values["lora_parameters"]
        rank, scale = options["rank"], options["scale"]
        if type(rank) is not int or isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"rank is {rank!r} and scale {scale!r}")
        spec = AdapterSpec("lora", rank, scale * rank, options.get("dropout", 0.0))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise AdapterError(f"{folder / CONFIG} is incomplete or impossible: {error!r}") from None
    if kind != "lora":
        raise AdapterError(f"{folder}: fine_tune_type {kind!r} is not supported yet (lora is)")
    stored, header = _read_tensors(folder / MLX_WEIGHTS)
    parts = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
    tensors = {f"{_PREFIX}{key[:-7]}{parts.get(key[-7:], key[-7:])}": value.T for key, value in stored.items()}
    return spec, {}, tensors, header


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from None


def _base_faults(loaded: LoadedModel, header: Mapping[str, str]) -> list[str]:
    wanted = header.get("base_weights_sha256")  # absent in adapters that PEFT wrote
    if wanted is None or wanted == loaded.weights_hash():
        return []
    return [
        f"it was trained on other base weights (sha256 {wanted[:12]}..., these are {loaded.weights_hash()[:12]}...)"
    ]


def _absent_layers(config: Mapping[str, Any], layers: Mapping[str, Any], grouped: Mapping[str, Any]) -> list[str]:
    """Linear layers that the configuration targets and for which the file holds nothing."""
    chosen = config.get("layers_to_transform")
    chosen = [chosen] if isinstance(chosen, int) else chosen
    absent = []
    for path in layers:
        number = re.search(r"\.(\d+)\.", path)
        transformed = chosen is None or (number is not None and int(number[1]) in chosen)
        excluded = _named(config.get("exclude_modules"), path)
        if transformed and not excluded and _named(config.get("target_modules"), path) and path not in grouped:
            absent.append(path)
    return absent


def _named(modules: list[str] | str | None, path: str) -> bool:
    """Whether PEFT's list of names, or its one regular expression, means a layer."""
    if isinstance(modules, str):
        return re.fullmatch(modules, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in modules or ())


def _layer_spec(spec: AdapterSpec, config: Mapping[str, Any], path: str) -> AdapterSpec:
    """The spec with PEFT's `rank_pattern` and `alpha_pattern` applied to one layer."""
    rank = _from_pattern(config.get("rank_pattern"), path, spec.r)
    return replace(spec, r=rank, lora_alpha=_from_pattern(config.get("alpha_pattern"), path, spec.lora_alpha))


def _from_pattern(pattern: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default


@torch.no_grad()
def _fill(adapter: nn.Module, parts: Mapping[str, Tensor], path: str) -> list[str]:
    faults = []
    own = dict(adapter.named_parameters())
    faults += [f"unexpected tensor {path}.{key}" for key in parts if key not in own]
    for key, parameter in own.items():
        if key not in parts:
            faults.append(f"missing tensor {path}.{key}")
        elif parts[key].shape != parameter.shape:
            faults.append(f"{path}.{key} has shape {list(parts[key].shape)}, the base needs {list(parameter.shape)}")
        elif not torch.isfinite(parts[key]).all():
            faults.append(f"{path}.{key} holds numbers that are not finite")
        else:
            parameter.copy_(parts[key])
    return faults
