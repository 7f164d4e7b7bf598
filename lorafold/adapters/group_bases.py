"""Packed layers made ready for a group adapter: their type stores what is learned, or they are promoted to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, bullet_list
from lorafold.quant.codecs import CODECS, GGUF_CODECS
from lorafold.quant.ggml import Codec
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import promote, steps_apart


@dataclass
class Promotions:
    """What `prepare_group_bases` did.

    Attributes:
        learned: what a group stores and the method learns, in words.
        codecs: names of layers whose format was changed -> (old codec, new codec).
        error: largest change of a weight by a promotion, in quantization steps.
        added_bytes: bytes the promotions add to the file.
    """

    learned: str = "offset"
    codecs: dict[str, tuple[str, str]] = field(default_factory=dict)
    error: float = 0.0
    added_bytes: int = 0


def prepare_group_bases(layers: Mapping[str, nn.Module], targets: list[str], spec: AdapterSpec) -> Promotions:
    """Make every target's format one that stores what is learned, or refuse them all at once.

    Raises:
        AdapterError: targets are dense or have a format that stores no such thing and is not promoted.
    """
    result = Promotions(_learned(spec))
    _refuse_unsuitable(layers, targets, spec)
    for path in targets:
        layer = layers[path]
        assert isinstance(layer, QuantLinear | QuantEmbedding)
        old = layer.packed
        if _codec_to_train(old.format, spec) is old.format:
            continue
        try:
            new = promote(old)
        except ValueError as error:
            raise AdapterError(f"{path} cannot be adapted with qa-lora: {error}") from None
        if old.format.affine:
            result.error = max(result.error, steps_apart(old.decode(), new))
        layer.packed = new
        result.codecs[path] = (old.codec, new.codec)
        result.added_bytes += new.nbytes - old.nbytes
    return result


def _learned(spec: AdapterSpec) -> str:
    return {"offset": "offset", "scale": "scale of its own", "both": "offset and scale of its own"}[spec.adapt]


def _codec_to_train(codec: Codec, spec: AdapterSpec) -> Codec:
    """The format that a matrix is trained in: its own, or the one that it is promoted to first."""
    wanted = spec.k_quants == "promote" if codec.affine else spec.adapt != "scale"
    return CODECS[codec.promotes_to] if codec.promotes_to and wanted else codec


def unsuitable(layer: nn.Module, spec: AdapterSpec) -> str | None:
    """The layer's type if that does not store what is learned, before and after promotion."""
    if not isinstance(layer, QuantLinear | QuantEmbedding):
        return str(layer.weight.dtype).removeprefix("torch.")
    return None if _suits(layer.packed.format, spec) else layer.packed.codec


def _suits(stored: Codec, spec: AdapterSpec) -> bool:
    codec = _codec_to_train(stored, spec)
    return (codec.affine or spec.adapt == "scale") and (codec.scalable or spec.adapt == "offset")


def _refuse_unsuitable(layers: Mapping[str, nn.Module], targets: list[str], spec: AdapterSpec) -> None:
    bad: dict[str, list[str]] = {}
    for path in targets:
        if kind := unsuitable(layers[path], spec):
            bad.setdefault(kind, []).append(path)
    if bad:
        faults = [
            f"{kind}: {len(paths)} layers ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
            for kind, paths in bad.items()
        ]
        able = [name for name, codec in GGUF_CODECS.items() if _suits(codec, spec)]
        promoted = replace(spec, k_quants="promote")
        mended = all(kind in CODECS and _suits(CODECS[kind], promoted) for kind in bad)
        ways = "promote them (--k-quants promote), " if mended else ""
        raise AdapterError(
            f"qa-lora learns the {_learned(spec)} that a quantized group stores, and these targets store none:\n"
            + bullet_list(faults)
            + f"\n{ways}leave them out with --exclude-modules, train them with --method lora, or start from a file "
            f"whose matrices are {', '.join(able)}, or from an MLX folder that lorafold quantize makes"
        )
