"""Merge an adapter into the weights it was trained on.

A group adapter folds exactly: only the stored offsets (and scales) change, and they change to the very numbers that
the forward pass computed with. LoRA has no such place in a quantized block: it can only be merged into the dense weight
and quantized again, which is lossy and has to be asked for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafold.adapters.adapted import AdaptedLayer, adapted_layers
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.tied import follows
from lorafold.errors import FoldError, bullet_list
from lorafold.quant.codecs import CODECS, GGUF_CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import QuantizedWeight, encode, steps_apart

LEAST_KEPT = 0.99  # a fold that keeps less of an update than this is refused
ENCODABLE = [name for name, codec in GGUF_CODECS.items() if codec.encodes]
SMALL_UPDATE = (
    "\nan update this small hardly moves what the file can store: train longer or with a higher rate. Training saw "
    "the same rounding, so the file would still be what was trained; --lossy writes it"
)


@dataclass(frozen=True)
class LayerFold:
    """What folding did to one layer.

    Attributes:
        name: the layer.
        weight: the folded matrix.
        kept: <realized update, wanted update> / <wanted, wanted>; 1 is everything, and 1 for a zero update.
        error_steps: largest difference between wanted and realized, in quantization steps (scales).
    """

    name: str
    weight: QuantizedWeight
    kept: float
    error_steps: float


def kept_fraction(realized: Tensor, wanted: Tensor) -> float:
    """<realized, wanted> / <wanted, wanted> in float64; 1 where nothing was wanted."""
    wanted = wanted.double()
    norm = wanted.square().sum()
    return 1.0 if norm == 0 else float((realized.double() * wanted).sum() / norm)


def fold(model: nn.Module, name: str = "default", least_kept: float | None = LEAST_KEPT) -> list[LayerFold]:
    """Exact fold of a group adapter into the packed weights; the model itself is left as it is.

    Args:
        least_kept: smallest share of a layer's update that must survive rounding to a fine storage type; None allows
            any. Formats that store offsets coarsely are not held to it: what was trained is what they store.

    Raises:
        FoldError: the adapter is not of this kind, an offset is not finite, or rounding to the file's storage
            type keeps less than 99 % of a layer's update; all layers concerned are named.
    """
    folds, faults, advice = [], [], ""
    for path, layer in adapted_layers(model):
        if name not in layer.adapters:
            continue
        adapter = layer.adapters[name]
        if follows(adapter):
            continue
        if not isinstance(adapter, GroupAdapter):
            raise FoldError(
                "a LoRA update varies inside a quantization group, so it has no exact place in the file: export it "
                "(lorafold export --to gguf-adapter or mlx-adapter), or merge and quantize again with loss "
                "(fold --lossy; of a GGUF file also --to TYPE)"
            )
        result = _fold_layer(path, layer, adapter)
        folds.append(result)
        if not _storable(result):
            faults.append(f"{path}: an offset or scale is beyond {_type_name(result.weight)}")
        elif least_kept is not None and not result.weight.format.coarse and not result.kept >= least_kept:
            faults.append(f"{path}: {result.weight.codec} keeps only {result.kept:.1%} of the update")
            advice = SMALL_UPDATE
    if faults:
        raise FoldError("the adapter cannot be folded:\n" + bullet_list(faults) + advice)
    return folds


def _type_name(weight: QuantizedWeight) -> str:
    return str(weight.format.stored).removeprefix("torch.")


def _storable(result: LayerFold) -> bool:
    codec, blocks = result.weight.format, result.weight.blocks
    return bool(torch.isfinite(codec.offset(blocks)).all() and torch.isfinite(codec.scale(blocks)).all())


@torch.no_grad()
def _fold_layer(path: str, layer: AdaptedLayer, adapter: GroupAdapter) -> LayerFold:
    assert isinstance(layer.base, QuantLinear | QuantEmbedding)
    packed = layer.base.packed
    codec, blocks = packed.format, packed.blocks
    step = codec.scale(blocks)
    wanted = realized = torch.zeros_like(step)
    update = adapter.offset_update()
    if update is not None:
        stored = codec.offset(blocks)
        offset = codec.move_offset(stored, update)
        wanted, realized = update, offset - stored
        blocks = codec.with_offset(blocks, offset)
    update = adapter.scale_update()
    if update is not None:
        scale = codec.move_scale(step, update)
        levels = codec.levels(blocks)  # a scale moves each weight by another amount
        wanted = wanted[..., None] + (step * update)[..., None] * levels
        realized = realized[..., None] + (scale - step)[..., None] * levels
        blocks = codec.with_scale(blocks, scale)
        step = step[..., None]
    error = float(((realized - wanted).abs() / step.abs().clamp_min(torch.finfo(torch.float16).tiny)).max())
    new = QuantizedWeight(packed.codec, packed.shape, blocks)
    return LayerFold(path, new, kept_fraction(realized, wanted), error)


def base_weight(base: nn.Module, offset: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """Dense float32 weight of a layer without its adapters; `offset`, `scale` replace the stored ones."""
    if isinstance(base, QuantLinear | QuantEmbedding):
        return base.packed.decode(torch.float32, offset, scale)
    return base.weight.detach().float()  # type: ignore[union-attr, operator]


@torch.no_grad()
def merged_weight(layer: AdaptedLayer) -> Tensor:
    """Dense float32 weight of a layer with its active adapters merged in, in the shape of the base's."""
    weight = base_weight(layer.base, layer.offset(), layer.scale())
    for adapter in layer.active_adapters():
        if isinstance(adapter, LoRA):
            weight = weight + adapter.delta()
    return weight


@torch.no_grad()
def requantize(model: nn.Module, codec: str | None, name: str = "default") -> list[LayerFold]:
    """The lossy way: merge the adapter into the dense weights and quantize them again.

    A group adapter on a matrix that already has the wanted format needs no such thing and keeps its exact place.

    Args:
        codec: the format to quantize to; None keeps each matrix's own, and leaves out those that are not packed.

    Raises:
        FoldError: a format is one that is not encoded here, or an offset is beyond float16.
    """
    folds, faults, foreign = [], [], Counter[str]()
    for path, layer in adapted_layers(model):
        if name not in layer.adapters or follows(layer.adapters[name]):
            continue
        packed = layer.base.packed if isinstance(layer.base, QuantLinear | QuantEmbedding) else None
        target = codec or (packed.codec if packed else None)
        if target is None:
            continue
        adapter = layer.adapters[name]
        if isinstance(adapter, GroupAdapter) and packed and packed.codec == target:
            folds.append(_fold_layer(path, layer, adapter))
            if not _storable(folds[-1]):
                faults.append(f"{path}: an offset or scale is beyond {_type_name(packed)}")
            continue
        if not CODECS[target].encodes:
            foreign[target] += 1
        if foreign:
            continue
        before, wanted = base_weight(layer.base), merged_weight(layer)
        new = encode(wanted, target)
        kept = kept_fraction(new.decode() - before, wanted - before)
        folds.append(LayerFold(path, new, kept, steps_apart(wanted, new)))
    if foreign:
        kinds = ", ".join(f"{kind} ({count} matrices)" for kind, count in foreign.items())
        types = ", ".join(kind.lower() for kind in ENCODABLE)
        faults.append(
            f"{kinds}: only llama.cpp's quantizer makes them; choose --to f16 and run it on that, or --to {types}"
        )
    if faults:
        raise FoldError("the adapter cannot be folded:\n" + bullet_list(faults))
    return folds
