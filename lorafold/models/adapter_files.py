"""Adapters on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Adapters that PEFT has are stored exactly as PEFT stores them (`peft_format.py`), so PEFT, vLLM and others read them. A
QA-LoRA adapter is stored in its own small form (`peft_type` QA_LORA, which PEFT refuses by name instead of misreading);
`lorafold export` expands it. The hash of the base weights and, for QA-LoRA, the pooling divisor stand in the
safetensors header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lorafold.adapters.adapted import plain_parameter, refuse_other_uses, set_active
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.group_bases import prepare_group_bases
from lorafold.adapters.inject import (
    Injection,
    attach,
    attach_parameter,
    check_name,
    make_adapter,
    make_parameter_adapter,
    make_whole,
)
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import ParameterDelta
from lorafold.adapters.targets import adaptable
from lorafold.adapters.tied import follow, pair_to_share
from lorafold.config import METHODS, AdapterSpec
from lorafold.errors import AdapterError, ConfigError, bullet_list
from lorafold.files import replacing_folder
from lorafold.models.load import LoadedModel
from lorafold.models.peft_format import (
    PREFIX,
    absent_layers,
    malformed,
    place,
    spec_of,
    stored_config,
    stored_tensors,
    unsupported,
    without_copies,
)
from lorafold.models.tensors import save_tensors
from lorafold.quant.linear import QuantEmbedding, QuantLinear

POOLING = "sqrt(group_size)"  # adapters/group.py
CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


def save_adapter(
    folder: Path,
    loaded: LoadedModel,
    spec: AdapterSpec,
    name: str = "default",
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write the adapter `name` of a model; the folder appears whole or not at all.

    Args:
        notes: what else the header of the tensors says.

    Raises:
        OutputError: it cannot be written.
    """
    config = {"base_model_name_or_path": str(loaded.path)} | stored_config(loaded.model, spec, name)
    header = {"format": "pt", "base_weights_sha256": loaded.weights_hash(), **(notes or {})}
    if spec.method == "qa-lora":
        header["pooling_divisor"] = POOLING
    write_adapter_folder(folder, config, stored_tensors(loaded.model, name), header)


def write_adapter_folder(
    folder: Path, config: Mapping[str, Any], tensors: dict[str, Tensor], header: dict[str, str]
) -> None:
    """Write the two files of an adapter folder."""
    with replacing_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_tensors(temporary / WEIGHTS, tensors, header)


def read_spec(folder: Path) -> tuple[AdapterSpec, dict[str, Any]]:
    """The spec an adapter folder states, and the whole configuration; of MLX's only the base, as PEFT names it.

    Raises:
        AdapterError: no adapter lies there, or it uses what is not supported; all of it is named.
    """
    if (folder / MLX_WEIGHTS).is_file():
        return _mlx_spec(folder)
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise AdapterError(f"{folder} is not an adapter folder: it lacks {' and '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        faults = unsupported(config)
    except (ValueError, AttributeError) as error:
        raise AdapterError(f"{folder / CONFIG} is not a JSON object: {error}") from None
    if faults:
        raise AdapterError(f"{folder} uses what is not supported yet:\n" + bullet_list(faults))
    faults = malformed(config)
    if faults:
        raise AdapterError(f"{folder / CONFIG} is incomplete or impossible:\n" + bullet_list(faults))
    try:
        return spec_of(config), config
    except (KeyError, TypeError, ConfigError) as error:
        raise AdapterError(f"{folder / CONFIG} is incomplete or impossible: {error}") from None


def stated_spec(folder: Path) -> tuple[AdapterSpec, dict[str, Any]]:
    """`read_spec` of a folder of ours, PEFT's or MLX's, whose configuration is empty.

    Raises:
        AdapterError: as there.
    """
    return _read_mlx(folder)[:2] if (folder / MLX_WEIGHTS).is_file() else read_spec(folder)


def load_adapter(loaded: LoadedModel, folder: Path, name: str = "default") -> Injection:
    """Put the adapter of a folder, ours, PEFT's or MLX's, on a model and make it active.

    Raises:
        AdapterError: the base weights differ from those it was trained on, or tensors are missing, unexpected or of
            the wrong shape; all faults are in one message and the model is left as it was.
    """
    spec, config = read_spec(folder)
    tensors, header = read_tensors(folder)
    faults = _base_faults(loaded, header)
    if spec.method == "qa-lora" and header.get("pooling_divisor") != POOLING:
        faults.append(f"its pooling divisor is {header.get('pooling_divisor')}, here it is {POOLING}")
    try:
        return attach_tensors(loaded.model, spec, config, tensors, name, faults)
    except AdapterError as error:
        raise AdapterError(f"the adapter {folder} does not fit {loaded.path}:\n{error}") from None


def attach_tensors(
    model: nn.Module,
    spec: AdapterSpec,
    config: Mapping[str, Any],
    tensors: dict[str, Tensor],
    name: str = "default",
    faults: list[str] | None = None,
) -> Injection:
    """Put an adapter on a model whose tensors are known by PEFT's names, frozen and active.

    Args:
        faults: what is wrong already, to be named with the rest.

    Raises:
        AdapterError: as `load_adapter`.
    """
    faults = list(faults or [])
    tensors = without_copies(model, tensors, spec)
    pair = pair_to_share(model) if spec.ensure_weight_tying else None
    shared = tensors.pop("base_model.vera_A", None), tensors.pop("base_model.vera_B", None)
    grouped: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        found = place(model, key, config)
        if found is None:
            faults.append(f"unexpected tensor {key}")
        else:
            grouped.setdefault(found[0], {})[found[1]] = value
    if pair is not None and grouped.keys() & {pair[1], f"{pair[1]}.weight"}:
        faults.append(f"ensure_weight_tying is set, and {pair[1]} has other numbers than {pair[0]}")
    faults += [f"no tensors for the layer {path}" for path in absent_layers(model, config, grouped)]
    faults += [] if tensors else ["it holds no tensors"]
    if spec.method == "vera" and (shared[0] is None or shared[1] is None):
        faults.append("it lacks the random matrices (vera_A, vera_B): save it with save_projection")
    if config.get("fan_in_fan_out"):
        plain = [path for path in grouped if type(adaptable(model).get(path)).__name__ == "Linear"]
        faults += [f"fan_in_fan_out is for GPT-2's Conv1D, and {plain[0]} is none"] if plain else []
    check_name(model, name, (*grouped, *(pair or ())))
    every_use = list(grouped) if METHODS[spec.method].whole else [f"{pair[0]}.weight"] if pair else []
    for path in grouped:
        if "" in grouped[path]:
            refuse_other_uses(model, path, path in every_use)
    built: dict[str, Any] = {}
    layers = adaptable(model, spec.method)
    for path, parts in grouped.items():
        own = spec.for_layer(path)
        if "" in parts:
            plain = plain_parameter(model, path)
            assert plain is not None
            built[path] = make_whole(model, path, spec)
            new = parts[""].to(plain.device).float()
            faults += _part_faults(path, "", new, plain) or _fill(
                built[path],
                {"change": new - plain.detach().float()} if isinstance(built[path], ParameterDelta) else {"value": new},
                path,
            )
        elif path not in layers and plain_parameter(model, path) is None:
            faults.append(f"{path} cannot be adapted with {spec.method}")
        elif path not in layers:
            built[path] = make_parameter_adapter(model, path, own)
            faults += _fill(built[path], parts, path)
        elif spec.method == "qa-lora" and not isinstance(layers[path], QuantLinear | QuantEmbedding):
            faults.append(f"{path} is not quantized, and the adapter trains quantization offsets")
        else:
            matrices = (shared[0], shared[1]) if shared[0] is not None and shared[1] is not None else None
            adapter = built[path] = make_adapter(layers[path], own, matrices, fresh=False)
            faults += _fill(adapter, parts, path)
    if faults:
        raise AdapterError(bullet_list(faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else [])))
    result = Injection(list(built), trainable=sum(t.numel() for t in tensors.values()))
    if spec.method == "qa-lora":
        packed = [path for path in built if "" not in grouped[path]]
        result.promoted = prepare_group_bases(layers, packed, spec)
    if pair is not None and pair[0] in built:
        built[pair[1]] = follow(model, pair, built[pair[0]], spec)
    for path, adapter in built.items():
        adapter.requires_grad_(False)
        if isinstance(adapter, LoRA | GroupAdapter):
            attach(model, path, adapter, name)
        else:
            attach_parameter(model, path, adapter, name, path in every_use)
    set_active(model, name)
    return result


def _mlx_spec(folder: Path) -> tuple[AdapterSpec, dict[str, Any]]:
    """What the configuration of a LoRA adapter in MLX's layout says, in the terms of PEFT's."""
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
    return spec, {"base_model_name_or_path": values.get("model")}  # as mlx_lm.lora writes it


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of an adapter folder, ours, PEFT's or MLX's, by PEFT's names, and the header of their file.

    Raises:
        AdapterError: the file is damaged.
    """
    if not (folder / MLX_WEIGHTS).is_file():
        return _read_file(folder / WEIGHTS)
    stored, header = _read_file(folder / MLX_WEIGHTS)
    parts = {".lora_a": ".lora_A.weight", ".lora_b": ".lora_B.weight"}
    return {f"{PREFIX}{key[:-7]}{parts.get(key[-7:], key[-7:])}": value.T for key, value in stored.items()}, header


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
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


def _part_faults(path: str, key: str, value: Tensor, wanted: Tensor) -> list[str]:
    name = f"{path}.{key}" if key else path
    if value.numel() != wanted.numel() or value.squeeze().shape != wanted.squeeze().shape:
        return [f"{name} has shape {list(value.shape)}, the base needs {list(wanted.shape)}"]
    return [] if torch.isfinite(value).all() else [f"{name} holds numbers that are not finite"]


@torch.no_grad()
def _fill(adapter: nn.Module, parts: Mapping[str, Tensor], path: str) -> list[str]:
    faults = []
    own = dict(adapter.named_parameters())
    faults += [f"unexpected tensor {path}.{key}" for key in parts if key not in own]
    for key, parameter in own.items():
        if key not in parts:
            faults.append(f"missing tensor {path}.{key}")
        elif wrong := _part_faults(path, key, parts[key], parameter):
            faults += wrong
        else:
            parameter.copy_(parts[key].view(parameter.shape))
    return faults
