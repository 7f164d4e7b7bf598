"""A model folder of MLX: config.json with a `quantization` map, and safetensors with codes, scales and biases.

Layout: mlx-lm (utils.py, load_model): a quantized layer `p` has `p.weight` (codes in 32-bit words), `p.scales` and
`p.biases`; bits and group size stand in `quantization`, where an entry `p` overrides them for one layer. Writing
changes nothing but the bytes of biases (and of scales), inside a copy of the folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from lorafold.errors import FormatError, bullet_list
from lorafold.files import replacing_folder
from lorafold.models.tensors import save_tensors
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantLinear
from lorafold.quant.mlx import BITS, GROUPS, STORED, mlx_codec
from lorafold.quant.weight import QuantizedWeight

CONFIG = "config.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U32": torch.uint32}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header.

    Attributes:
        file: the file it lies in.
        kind: type name, a key of `_DTYPES`.
        shape: its dimensions.
        start, end: its bytes, counted from the beginning of the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


def is_mlx(path: Path) -> bool:
    """Whether a folder holds a model quantized by MLX."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and isinstance(config.get("quantization"), dict)


class MLXFolder:
    """A mapped MLX folder.

    Attributes:
        path: the folder.
        config: config.json without the keys about quantization.
        tensors: name -> where it lies.
        quantized: layers with codes -> name of their codec.

    Raises:
        FormatError: files are damaged, or a layer is quantized in a way that is not supported; all faults are named.
    """

    def __init__(self, path: Path):
        self.path = path
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        self._quantization = config.pop("quantization")
        config.pop("quantization_config", None)
        self.config: dict[str, Any] = config
        self._maps: dict[Path, np.ndarray] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in sorted(path.glob("model*.safetensors")):
            self._maps[file] = np.memmap(file, np.uint8, mode="c")
            self.tensors |= _read_header(file, self._maps[file])
        if not self.tensors:
            raise FormatError(f"{path} holds no model*.safetensors file")
        self.quantized: dict[str, str] = {}
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
        return None

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, a view of the mapped file (writing to it changes no file)."""
        stored = self.tensors[name]
        return self._maps[stored.file][stored.start : stored.end]

    def dense(self, name: str) -> Tensor:
        """A copy of a tensor of plain numbers.

        Raises:
            FormatError: it is of another type.
        """
        stored = self.tensors[name]
        if stored.kind not in STORED:
            raise FormatError(f"{self.path}: {name} is stored as {stored.kind}; it must be {', '.join(STORED)}")
        return torch.from_numpy(self.raw(name).copy()).view(_DTYPES[stored.kind]).reshape(stored.shape)

    def packed(self, layer: str) -> QuantizedWeight:
        """A quantized layer; its bytes are brought together block by block."""
        codec = CODECS[self.quantized[layer]]
        rows, groups = self.tensors[f"{layer}.scales"].shape
        parts = [torch.from_numpy(self.raw(f"{layer}.{part}")) for part in ("scales", "biases", "weight")]
        blocks = torch.cat([part.reshape(rows, groups, -1) for part in parts], dim=-1)
        return QuantizedWeight(codec.name, (rows, groups * codec.group_size), blocks)


def _read_header(file: Path, data: np.ndarray) -> dict[str, StoredTensor]:
    try:
        length = int.from_bytes(bytes(data[:8]), "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + at for at in entry["data_offsets"])
                shape = tuple(int(n) for n in entry["shape"])
                size = _DTYPES[entry["dtype"]].itemsize * int(np.prod(shape, dtype=np.int64))
                if not 8 + length <= start <= end <= len(data) or end - start != size:
                    raise ValueError(f"the bytes of {name} lie outside the file")
                found[name] = StoredTensor(file, entry["dtype"], shape, start, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is damaged: {error}") from None
    return found


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
    """
    tied = {"lm_head"} if model.config.tie_word_embeddings else set()
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
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, QuantLinear) and module.bias is not None:
            own["bias"] = nn.Parameter(module.bias, requires_grad=False)
        for key, value in own.items():
            if name not in tied and f"{name}.{key}" not in tensors:
                tensors[f"{name}.{key}"] = value.detach().to(dtype).contiguous()
    groups = {"group_size": default.format.group_size, "bits": default.format.bits}
    config = mlx_config(model.config) | {"quantization": groups | overrides}
    with replacing_folder(path) as temporary:
        tokenizer.save_pretrained(temporary)
        save_tensors(temporary / "model.safetensors", tensors, {"format": "mlx"})
        (temporary / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


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


def write_mlx(base: MLXFolder, replaced: Mapping[str, QuantizedWeight], path: Path) -> None:
    """Write a copy of the folder in which scales and biases of some layers are other.

    Args:
        replaced: layer -> matrix in the same format, with the same codes.
        path: the new folder; it appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing_folder(path) as temporary:
        for source in sorted(base.path.iterdir()):
            if source.is_file():
                shutil.copyfile(source, temporary / source.name)
        for layer, weight in replaced.items():
            size = CODECS[weight.codec].codes_at // 2
            for part, at in (("scales", 0), ("biases", size)):
                stored = base.tensors[f"{layer}.{part}"]
                with (temporary / stored.file.name).open("r+b") as out:
                    out.seek(stored.start)
                    out.write(weight.blocks[..., at : at + size].contiguous().cpu().numpy().data)
