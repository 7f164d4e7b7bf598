"""A transformers folder quantized by bitsandbytes: NF4 with or without double quantization, or 8 bits by row.

Layout: bitsandbytes, nn/modules.py and functional.py (QuantState.as_dict). A 4-bit layer `p` has `p.weight` (codes, two
in a byte), `p.weight.absmax`, the tables, and JSON as bytes in `p.weight.quant_state.bitsandbytes__nf4`; an 8-bit
layer has `p.weight` and `p.SCB`, the largest magnitude of each row. transformers loads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lorafold.errors import FormatError, bullet_list
from lorafold.models.tensors import SafetensorsFolder, create_folder
from lorafold.quant.bnb import BLOCK, NESTED, dynamic_values
from lorafold.quant.linear import plain_parameters
from lorafold.quant.vectors import NF4_VALUES
from lorafold.quant.weight import QuantizedWeight

CONFIG = "config.json"
_STATE = "quant_state.bitsandbytes__nf4"
_METHOD = "bitsandbytes"


def is_bnb(path: Path) -> bool:
    """Whether a folder holds a model quantized by bitsandbytes."""
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        stated = config["quantization_config"]
        return stated.get("quant_method", _METHOD) == _METHOD and bool({"load_in_4bit", "load_in_8bit"} & stated.keys())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


class BnbFolder(SafetensorsFolder):
    """A mapped folder.

    Attributes:
        config: config.json without the part about quantization.
        quantized: quantized layers -> name of their codec.
        beside: tensors that belong to the weight of a quantized layer.

    Raises:
        FormatError: files are damaged, or a layer is quantized in a way that is not supported; all faults are named.
    """

    def __init__(self, path: Path):
        self.config: dict[str, Any] = json.loads((path / CONFIG).read_text(encoding="utf-8"))
        self.config.pop("quantization_config")
        super().__init__(path)
        self.quantized: dict[str, str] = {}
        self.beside: set[str] = set()
        self._states: dict[str, dict[str, Any]] = {}
        faults = []
        for name in self.tensors:
            layer, _, rest = name.partition(".weight.quant_state.")
            if rest:
                fault = self._add_nf4(layer, name)
                faults += [f"{layer}: {fault}"] if fault else []
            elif name.endswith(".SCB"):
                layer = name.removesuffix(".SCB")
                fault = self._add_int8(layer)
                faults += [f"{layer}: {fault}"] if fault else []
        self.beside &= self.tensors.keys()
        if faults:
            raise FormatError(f"{path}: these layers cannot be read:\n" + bullet_list(faults[:10]))

    @property
    def dtype(self) -> torch.dtype:
        """In which its plain numbers are stored and its 16-bit version is written."""
        name = str(self.config.get("dtype") or self.config.get("torch_dtype")).removeprefix("torch.")
        return {"float16": torch.float16, "float32": torch.float32}.get(name, torch.bfloat16)

    def _add_nf4(self, layer: str, name: str) -> str | None:
        try:
            state = json.loads(self.raw(name).tobytes())
            kind, size, shape, nested = (state.get(k) for k in ("quant_type", "blocksize", "shape", "nested_blocksize"))
        except (ValueError, AttributeError) as error:
            return f"its state is damaged: {error}"
        if kind != "nf4" or size != BLOCK or nested not in (None, NESTED):
            return f"{kind} in blocks of {size} is not supported yet (nf4 in blocks of {BLOCK} is)"
        if nested and not isinstance(state.get("nested_offset"), float | int):
            return "it lacks nested_offset"
        if not isinstance(shape, list) or len(shape) != 2 or not all(type(n) is int and n > 0 for n in shape):
            return f"its shape {shape} is that of no matrix"
        if shape[1] % BLOCK:
            return f"rows of {shape[1]} weights share blocks, which is not supported yet"
        parts = ["absmax", "quant_map", *(("nested_absmax", "nested_quant_map") if nested else ())]
        beside = {f"{layer}.weight.{part}" for part in parts}
        if not {f"{layer}.weight", *beside} <= self.tensors.keys():
            return "it lacks " + ", ".join(sorted({f"{layer}.weight", *beside} - self.tensors.keys()))
        blocks = shape[0] * shape[1] // BLOCK
        sizes = {"weight": 32 * blocks, "weight.absmax": blocks * (1 if nested else 4), "weight.quant_map": 64}
        sizes |= {"weight.nested_absmax": -(-blocks // NESTED) * 4} if nested else {}
        wrong = [part for part, bytes_ in sizes.items() if self.raw(f"{layer}.{part}").size != bytes_]
        if wrong:
            return f"{', '.join(wrong)} do not have the size that the shape {shape} asks for"
        if not torch.equal(self.dense(f"{layer}.weight.quant_map"), torch.tensor(NF4_VALUES)) or (
            nested and not torch.equal(self.dense(f"{layer}.weight.nested_quant_map"), dynamic_values())
        ):
            return "its table of values is another than bitsandbytes'"
        self.quantized[layer] = "NF4-DQ" if nested else "NF4"
        self.beside |= {name, *beside}
        self._states[layer] = state
        return None

    def _add_int8(self, layer: str) -> str | None:
        weight, scale = self.tensors.get(f"{layer}.weight"), self.tensors[f"{layer}.SCB"]
        if weight is None or weight.kind != "I8" or len(weight.shape) != 2:
            return "it has SCB, but no matrix of 8-bit numbers"
        if scale.kind != "F32" or scale.shape != weight.shape[:1]:
            return f"its SCB is {scale.kind} {scale.shape}; it must hold a float32 for each of {weight.shape[0]} rows"
        order = f"{layer}.weight_format"
        if order in self.tensors and self.raw(order).any():
            return "its rows are permuted for an old kernel (weight_format is not row); save it again with bitsandbytes"
        self.quantized[layer] = "INT8"
        self.beside |= {f"{layer}.SCB", order}
        return None

    def packed(self, layer: str) -> QuantizedWeight:
        """A quantized layer; its bytes are brought together block by block."""
        codec = self.quantized[layer]
        if codec == "INT8":
            rows, width = self.tensors[f"{layer}.weight"].shape
            parts = [torch.from_numpy(self.raw(f"{layer}.{part}")).view(rows, -1) for part in ("SCB", "weight")]
            return QuantizedWeight(codec, (rows, width), torch.cat(parts, dim=-1)[:, None])
        rows, width = self._states[layer]["shape"]
        names = (f"{layer}.weight.absmax", f"{layer}.weight")
        blocks = torch.cat([torch.from_numpy(self.raw(n)).view(rows, width // BLOCK, -1) for n in names], dim=-1)
        extra = None
        if codec == "NF4-DQ":
            offset = torch.tensor([self._states[layer]["nested_offset"]], dtype=torch.float32)
            extra = torch.cat([offset, self.dense(f"{layer}.weight.nested_absmax")])
        return QuantizedWeight(codec, (rows, width), blocks, extra)


def create_bnb(
    path: Path, model: PreTrainedModel, tokenizer: Any, quantized: Mapping[str, QuantizedWeight], dtype: torch.dtype
) -> None:
    """Write a model as bitsandbytes and transformers would.

    Args:
        path: the new folder; it appears whole or not at all.
        model: its other parameters are written in `dtype`.
        quantized: layer -> its weight in one of the three formats; empty for a plain folder.

    Raises:
        OutputError: it cannot be written.
        FormatError: a parameter is too large for `dtype`.
    """
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors: dict[str, Tensor] = {}
    for name, weight in quantized.items():
        tensors |= {f"{name}.{part}": value for part, value in _layer_tensors(weight, dtype).items()}
    try:
        plain = plain_parameters(model, dtype)
    except ValueError as error:
        raise FormatError(f"{path} is not written: {error}") from None
    tensors |= {name: value for name, value in plain.items() if name not in tied and name not in tensors}
    kinds = {weight.codec for weight in quantized.values()}
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    if quantized:
        config["quantization_config"] = _quantization(kinds)
    create_folder(path, model, tokenizer, tensors, config, "pt")


def _quantization(kinds: set[str]) -> dict[str, Any]:
    """What config.json says of it."""
    return {
        "quant_method": _METHOD,
        "load_in_4bit": "INT8" not in kinds,
        "load_in_8bit": "INT8" in kinds,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": "NF4-DQ" in kinds,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }


def _layer_tensors(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    blocks, at = weight.blocks, weight.format.codes_at
    head, codes = blocks[..., :at].contiguous(), blocks[..., at:].contiguous()
    if weight.codec == "INT8":
        return {
            "weight": codes[:, 0].view(torch.int8),
            "SCB": head.view(torch.float32).flatten(),
            "weight_format": torch.tensor(0, dtype=torch.uint8),
        }
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    parts = {"weight": codes.view(-1, 1), "weight.quant_map": torch.tensor(NF4_VALUES)}
    if weight.extra is None:
        parts["weight.absmax"] = head.view(torch.float32).flatten()
    else:
        state |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": weight.extra[0].item()}
        parts |= {
            "weight.absmax": head.flatten(),
            "weight.nested_absmax": weight.extra[1:].clone(),
            "weight.nested_quant_map": dynamic_values().clone(),
        }
    parts[f"weight.{_STATE}"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts
