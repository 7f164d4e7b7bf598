"""A model folder of MLX: config.json with a `quantization` map, and safetensors with codes, scales and biases.

Layout: mlx-lm (utils.py, load_model): a quantized layer `p` has `p.weight` (codes in 32-bit words), `p.scales` and
`p.biases`; bits and group size stand in `quantization`, where an entry `p` overrides them for one layer. Writing
changes nothing but the bytes of biases (and of scales), inside a copy of the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lorafold.errors import FormatError, bullet_list
from lorafold.files import replacing_folder
from lorafold.models.tensors import SafetensorsFolder, create_folder, save_tensors, untie_folder
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import plain_parameters
from lorafold.quant.mlx import BITS, GROUPS, STORED, mlx_codec
from lorafold.quant.weight import QuantizedWeight

CONFIG = "config.json"
HEAD_FILE = "model-head.safetensors"  # mlx-lm reads whatever is named model*.safetensors


def is_mlx(path: Path) -> bool:
    """Whether a folder holds a model quantized by MLX."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("quantization"), dict)


class MLXFolder(SafetensorsFolder):
    """A mapped MLX folder.

    Attributes:
        path: the folder.
        config: config.json without the keys about quantization.
        tensors: name -> where it lies.
        quantized: layers with codes -> name of their codec.
        beside: tensors that belong to the weight of a quantized layer.

    Raises:
        FormatError: files are damaged, or a layer is quantized in a way that is not supported; all faults are named.
    """

    def __init__(self, path: Path):
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        self._quantization = config.pop("quantization")
        config.pop("quantization_config", None)
        self.config: dict[str, Any] = config
        super().__init__(path)
        self.quantized: dict[str, str] = {}
        self.beside: set[str] = set()
        faults = []
        for name in self.tensors:
            if name.endswith(".scales"):
                layer = name.removesuffix(".scales")
                fault = self._add_layer(layer)
                faults += [f"{layer}: {fault}"] if fault else []
        if faults:
            raise FormatError(f"{path}: these layers cannot be read:\n" + bullet_list(faults[:10]))

    def _add_layer(self, layer: str) -> str | None:
        own = self._quantization.get(layer)
        options = {**self._quantization, **own} if isinstance(own, dict) else self._quantization
        bits, group, mode = options.get("bits"), options.get("group_size"), options.get("mode", "affine")
        if mode != "affine" or bits not in BITS or group not in GROUPS:
            return f"mode {mode!r}, {bits} bits, groups of {group} are not supported yet (affine is)"
        if not {f"{layer}.weight", f"{layer}.biases"} <= self.tensors.keys():
            return "it has scales, but no weight or no biases"
        weight, scales, biases = (self.tensors[f"{layer}.{part}"] for part in ("weight", "scales", "biases"))
        if weight.kind != "U32" or scales.kind not in STORED or biases.kind != scales.kind:
            return f"types {weight.kind}, {scales.kind}, {biases.kind} of weight, scales, biases do not go together"
        groups = weight.shape[-1] * 32 // bits // group
        if len(weight.shape) != 2 or scales.shape != (weight.shape[0], groups) or biases.shape != scales.shape:
            return f"shapes {weight.shape}, {scales.shape}, {biases.shape} do not fit {bits} bits in groups of {group}"
        self.quantized[layer] = mlx_codec(bits, group, scales.kind)
        self.beside |= {f"{layer}.scales", f"{layer}.biases"}
        return None

    def packed(self, layer: str) -> QuantizedWeight:
        """A quantized layer; its bytes are brought together block by block."""
        codec = CODECS[self.quantized[layer]]
        rows, groups = self.tensors[f"{layer}.scales"].shape
        parts = [torch.from_numpy(self.raw(f"{layer}.{part}")) for part in ("scales", "biases", "weight")]
        blocks = torch.cat([part.reshape(rows, groups, -1) for part in parts], dim=-1)
        return QuantizedWeight(codec.name, (rows, groups * codec.group_size), blocks)


def create_mlx(
    path: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    quantized: Mapping[str, QuantizedWeight],
    default: QuantizedWeight,
    dtype: torch.dtype,
) -> None:
    """Write a model as an MLX folder.

    Args:
        path: the new folder; it appears whole or not at all.
        model: its other parameters are written in `dtype`.
        quantized: module name -> its weight, in formats of MLX with parameters in `dtype`.
        default: one of them, whose bits and group size stand for all that are not named one by one.

    Raises:
        OutputError: it cannot be written.
        FormatError: a parameter is too large for `dtype`.
    """
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors: dict[str, Tensor] = {}
    overrides: dict[str, Any] = {}
    for name, weight in quantized.items():
        codec, size = weight.format, CODECS[weight.codec].codes_at // 2
        blocks = weight.blocks
        for part, at in (("scales", 0), ("biases", size)):
            tensors[f"{name}.{part}"] = blocks[..., at : at + size].contiguous().view(dtype)[..., 0]
        tensors[f"{name}.weight"] = blocks[..., codec.codes_at :].flatten(1).contiguous().view(torch.uint32)
        if weight.codec != default.codec:
            overrides[name] = {"group_size": codec.group_size, "bits": codec.bits}
    try:
        plain = plain_parameters(model, dtype)
    except ValueError as error:
        raise FormatError(f"{path} is not written: {error}") from None
    tensors |= {name: value for name, value in plain.items() if name not in tied and name not in tensors}
    groups = {"group_size": default.format.group_size, "bits": default.format.bits}
    config = mlx_config(model.config) | {"quantization": groups | overrides}
    create_folder(path, model, tokenizer, tensors, config, "mlx")


def mlx_config(config: PretrainedConfig) -> dict[str, Any]:
    """A config as mlx-lm reads it: rope options where transformers 4 had them."""
    values = config.to_dict()
    rope = values.pop("rope_parameters", None) or {}
    if "full_attention" in rope:
        values |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    if scaling.get("rope_type", "default") != "default":
        values["rope_scaling"] = scaling
    for key in ("quantization_config", "_name_or_path"):
        values.pop(key, None)
    return values


def write_mlx(
    base: MLXFolder,
    replaced: Mapping[str, QuantizedWeight],
    plain: Mapping[str, Tensor],
    path: Path,
    apart: tuple[str, str] | None = None,
) -> None:
    """Write a copy of the folder in which some layers are other.

    Args:
        replaced: layer -> matrix in the same format.
        plain: tensor -> other numbers, in the type it has.
        path: the new folder; it appears whole or not at all.
        apart: names of the embedding and of a head that has its weight, and gets one of its own.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing_folder(path) as temporary:
        for source in sorted(base.path.iterdir()):
            if source.is_file():
                shutil.copyfile(source, temporary / source.name)
        parts = dict(plain)
        for layer, weight in replaced.items():
            codes = CODECS[weight.codec].codes_at
            parts[f"{layer}.scales"] = weight.blocks[..., : codes // 2]
            parts[f"{layer}.biases"] = weight.blocks[..., codes // 2 : codes]
            parts[f"{layer}.weight"] = weight.blocks[..., codes:]
        if apart is not None:
            _add_head(temporary, base, parts, *apart)
        for name, value in parts.items():
            stored = base.tensors[name]
            with (temporary / stored.file.name).open("r+b") as out:
                out.seek(stored.start)
                out.write(value.cpu().contiguous().view(torch.uint8).numpy().data)


def _add_head(folder: Path, base: MLXFolder, parts: dict[str, Tensor], embedding: str, head: str) -> None:
    """Write the head's own tensors, taken out of `parts` or as the embedding's are, to a file beside the others."""
    new: dict[str, Tensor] = {}
    for part in ("weight", "scales", "biases"):
        stored = base.tensors.get(f"{embedding}.{part}")
        if stored is not None:
            value = parts.pop(f"{head}.{part}", torch.from_numpy(base.raw(f"{embedding}.{part}")))
            numbers = (
                value.cpu().contiguous().view(torch.uint8).flatten().view(base.stored_dtype(f"{embedding}.{part}"))
            )
            new[f"{head}.{part}"] = numbers.reshape(stored.shape)
    save_tensors(folder / HEAD_FILE, new, {"format": "mlx"})
    untie_folder(folder, dict.fromkeys(new, HEAD_FILE))
    (folder / CONFIG).write_text(json.dumps(config_apart(base.path, embedding, head), indent=2), encoding="utf-8")


def config_apart(path: Path, embedding: str, head: str) -> dict[str, Any]:
    """config.json of a folder, as it is when the head has tensors of its own, quantized like the embedding."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8")) | {"tie_word_embeddings": False}
    for key in ("quantization", "quantization_config"):
        if embedding in config.get(key, {}):
            config[key][head] = config[key][embedding]
    return config
