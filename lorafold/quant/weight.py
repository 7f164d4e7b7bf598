"""One packed matrix: the bytes that the file stores, and the codec that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.quant.codecs import CODECS
from lorafold.quant.ggml import Codec


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [out, in] kept in the blocks of its file format.

    Attributes:
        codec: the format's name, a key of `CODECS`, such as `"Q4_1"`.
        shape: (out, in) of the decoded matrix.
        blocks: uint8 [out, groups, block_bytes], row-major, byte for byte what the file holds.
        extra: float32 numbers that belong to many blocks, in formats that have such (NF4-DQ).
    """

    codec: str
    shape: tuple[int, int]
    blocks: Tensor
    extra: Tensor | None = None

    @property
    def format(self) -> Codec:
        """The codec that decodes the blocks."""
        return CODECS[self.codec]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.blocks.numel() + (0 if self.extra is None else 4 * self.extra.numel())

    def decode(
        self,
        dtype: torch.dtype = torch.float32,
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Dense [out, in] in `dtype`; `offset` and `scale` [out, groups] replace the stored ones.

        `room` holds as many numbers in `dtype`, or more, and may be used for the result.
        """
        if scale is None and self.extra is not None:
            scale = self.format.nested_scale(self.blocks, self.extra)
        return self.format.decode(self.blocks, dtype, offset, scale, room)

    def rows(self, index: Tensor | slice) -> QuantizedWeight:
        """The matrix with rows taken in the order of `index` [n] (or a slice of them); groups in a row stay whole."""
        assert self.extra is None
        blocks = self.blocks[index]
        return QuantizedWeight(self.codec, (len(blocks), self.shape[1]), blocks)

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same bytes on another device."""
        extra = None if self.extra is None else self.extra.to(device)
        return QuantizedWeight(self.codec, self.shape, self.blocks.to(device), extra)


@dataclass(frozen=True, eq=False)
class StackedWeight:
    """Matrices [out, in] of one input on a CPU, one below the other, each with its own codec."""

    parts: tuple[QuantizedWeight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(sum of out, in)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    @property
    def one_group_size(self) -> bool:
        """Whether the groups of all are of one size."""
        return len({part.format.group_size for part in self.parts}) == 1

    @property
    def format(self) -> Codec:
        """Of the first."""
        return self.parts[0].format

    def decode(self, dtype: torch.dtype, offset: Tensor | None, scale: Tensor | None, room: Tensor) -> Tensor:
        """As of one matrix, in a room."""
        (out, width), at = self.shape, 0
        for part in self.parts:
            rows, here = slice(at, at + part.shape[0]), room[at * width : (at + part.shape[0]) * width]
            own = [None if values is None else values[rows] for values in (offset, scale)]
            dense = part.decode(dtype, *own, here)
            if dense.data_ptr() != here.data_ptr():
                here.view(part.shape).copy_(dense)
            at += part.shape[0]
        return room[: out * width].view(out, width)


def check_encodable(weight: Tensor, codec: Codec) -> None:
    """Refuse a dense [out, in] matrix that no blocks of a format can hold.

    Raises:
        ValueError: a weight is not finite, or its rows do not divide into groups.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight is not finite and cannot be quantized")
    if codec.group_size and weight.shape[1] % codec.group_size:
        raise ValueError(f"rows of {weight.shape[1]} weights do not divide into groups of {codec.group_size}")


def encode(weight: Tensor, codec: str) -> QuantizedWeight:
    """Round a dense [out, in] matrix to the codec's nearest blocks, as ggml's reference quantizer does.

    Raises:
        ValueError: as `check_encodable`, or the codec is read only.
    """
    if not CODECS[codec].encodes:
        raise ValueError(f"{codec} is read here; llama.cpp's quantizer makes it from dense weights")
    check_encodable(weight, CODECS[codec])
    blocks, extra = CODECS[codec].encode_with_extra(weight)
    return QuantizedWeight(codec, (weight.shape[0], weight.shape[1]), blocks, extra)


def promote(weight: QuantizedWeight) -> QuantizedWeight:
    """Give a matrix a float16 offset for each group: Q4_0 and Q4_K -> Q4_1, Q5_0 and Q5_K -> Q5_1.

    The codes stay. Q4_0 and Q5_0 keep every weight: d (q - z) = d q + m with m = -z d, and z is a power of two, so m is
    exact in float16 unless it overflows. The two-level parameters of a K-quant are rounded to float16; what the scale
    loses is given to the offset at the middle of the codes, which halves the largest error (0.008 of a step).

    Raises:
        ValueError: the codec has nothing to be promoted to, or a scale is too large for float16.
    """
    source = weight.format
    if source.promotes_to is None:
        raise ValueError(f"{weight.codec} has no counterpart with a float16 offset")
    target = CODECS[source.promotes_to]
    scale = source.scale(weight.blocks)
    if source.affine:
        middle = ((1 << source.bits) - 1) / 2
        offset = source.offset(weight.blocks) + middle * (scale - scale.half().float())
        fits = torch.isfinite(scale.half()).all() and torch.isfinite(offset.half()).all()
    else:
        offset = -source.zero * scale
        fits = torch.isfinite(offset).all() and torch.equal(offset, offset.half().float())
    if not fits:
        limit = 65504 // (source.zero or 1)
        raise ValueError(f"{weight.codec} scales above {limit} cannot be promoted to {target.name}")
    blocks = target.assemble(scale, offset, source.codes(weight.blocks))
    return QuantizedWeight(target.name, weight.shape, blocks)


def steps_apart(wanted: Tensor, weight: QuantizedWeight) -> float:
    """Largest difference between a dense [out, in] matrix and a packed one, in the latter's quantization steps."""
    step = weight.format.scale(weight.blocks).abs().clamp_min(torch.finfo(torch.float16).tiny)
    apart = (weight.decode() - wanted).abs().unflatten(1, (step.shape[1], -1)).amax(-1)
    return float((apart / step).max())
