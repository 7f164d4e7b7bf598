"""One packed matrix: the bytes that the file stores, and the codec that reads them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.quant.ggml import CODECS, Codec


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A matrix [out, in] kept in the blocks of its file format.

    Attributes:
        codec: the format's name, a key of `CODECS`, such as `"Q4_1"`.
        shape: (out, in) of the decoded matrix.
        blocks: uint8 [out, groups, block_bytes], row-major, byte for byte what the file holds.
    """

    codec: str
    shape: tuple[int, int]
    blocks: Tensor

    @property
    def format(self) -> Codec:
        """The codec that decodes the blocks."""
        return CODECS[self.codec]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed matrix."""
        return self.blocks.numel()

    def decode(self, dtype: torch.dtype = torch.float32, offset: Tensor | None = None) -> Tensor:
        """Dense [out, in] in `dtype`; `offset` [out, groups] replaces the stored offsets (affine codecs)."""
        return self.format.decode(self.blocks, dtype, offset)

    def rows(self, index: Tensor) -> QuantizedWeight:
        """The matrix with rows taken in the order of `index` [n]; groups run along a row, so they stay whole."""
        return QuantizedWeight(self.codec, (index.numel(), self.shape[1]), self.blocks[index])

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same bytes on another device."""
        return QuantizedWeight(self.codec, self.shape, self.blocks.to(device))


def encode(weight: Tensor, codec: str) -> QuantizedWeight:
    """Round a dense [out, in] matrix to the codec's nearest blocks, as ggml's reference quantizer does.

    Raises:
        ValueError: a weight is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("a weight is not finite and cannot be quantized")
    out, width = weight.shape
    return QuantizedWeight(codec, (out, width), CODECS[codec].encode(weight))


def promote(weight: QuantizedWeight) -> QuantizedWeight:
    """Give a symmetric format a stored offset without changing any weight: Q4_0 -> Q4_1, Q5_0 -> Q5_1.

    d (q - z) = d q + m with m = -z d. z is a power of two, so m is exact in float16 unless it
    overflows.

    Raises:
        ValueError: the codec has nothing to be promoted to, or a scale is too large for an exact m.
    """
    source = weight.format
    if source.promotes_to is None:
        raise ValueError(f"{weight.codec} has no affine counterpart")
    target = CODECS[source.promotes_to]
    scale = source.scale(weight.blocks)
    offset = -source.zero * scale
    if not torch.isfinite(offset).all() or not torch.equal(offset, offset.half().float()):
        raise ValueError(f"{weight.codec} scales above {65504 // source.zero} cannot be promoted exactly")
    blocks = target.assemble(scale, offset, source.codes(weight.blocks))
    return QuantizedWeight(target.name, weight.shape, blocks)
