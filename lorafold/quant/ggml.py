"""The block formats of ggml: what 32 consecutive weights of a row look like in a GGUF file.

A block decodes to  w = scale * (code - zero) + offset.  Formats with a stored offset (Q4_1, Q5_1) can
take a QA-LoRA update exactly; the others have offset = 0 and a fixed zero.

Source: ggml-common.h (block layouts) and ggml-quants.c (reference quantizers) of llama.cpp. Every
function here is plain torch and serves as the oracle for the faster kernels in `kernels.py`; decode
and encode equal gguf-py's bit for bit.
"""

# O output rows, G groups in a row, 32 weights in a group

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lorafold.quant import gpu, kernels

GROUP = 32


@dataclass(frozen=True)
class Codec:
    """One block format.

    Attributes:
        name: ggml's name of the type.
        ggml_type: ggml's number of the type, as in a GGUF tensor table.
        bits: bits of a code.
        block_bytes: bytes of a block.
        zero: the code that stands for zero in formats without a stored offset.
        affine: whether a float16 offset is stored beside the scale.
        promotes_to: the affine format with a float16 offset that holds the same weights, if any.
        group_size: weights that share a scale and an offset.
        block_weights: weights in a block.
        coarse: whether offsets are stored so coarsely that a fold is expected to differ from the unrounded update.
        scalable: whether each group stores a scale of its own, in `stored`, that can be moved.
        stored: type of scales and offsets.
        encodes: whether `encode` and `assemble` make blocks of it; llama.cpp's quantizer makes the others.
    """

    name: str
    ggml_type: int
    bits: int
    block_bytes: int
    zero: int = 0
    affine: bool = False
    promotes_to: str | None = None
    group_size: int = GROUP
    block_weights: int = GROUP
    encodes: bool = True
    coarse: bool = False
    scalable: bool = True
    stored: torch.dtype = torch.float16

    @property
    def codes_at(self) -> int:
        """Byte at which the codes begin: after the float16 scale and, if there is one, the offset."""
        return 4 if self.affine else 2

    @property
    def largest_code(self) -> int:
        """The largest code where codes begin at 0."""
        return (1 << self.bits) - 1

    @property
    def bits_per_weight(self) -> float:
        """Storage per weight, parameters included."""
        return self.block_bytes * 8 / self.block_weights

    def scale(self, blocks: Tensor) -> Tensor:
        """Scales float32 [O, G] of uint8 blocks [O, G, block_bytes]."""
        return read_half(blocks, 0)

    def offset(self, blocks: Tensor) -> Tensor:
        """Offsets float32 [O, G]; -0.0 where none is stored, which adds nothing and keeps the sign of zeros."""
        if self.affine:
            return read_half(blocks, 2)
        return torch.full(blocks.shape[:2], -0.0, device=blocks.device)

    def parameters(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and offsets, as `scale` and `offset` give them."""
        return self.scale(blocks), self.offset(blocks)

    def as_stored(self, values: Tensor) -> Tensor:
        """Scales or offsets float32, rounded to the type in which they are stored."""
        return values.to(self.stored).float()

    def codes(self, blocks: Tensor) -> Tensor:
        """Codes [O, G, 32], unsigned 8-bit (signed for Q8_0)."""
        at = self.codes_at
        if self.bits == 8:
            return blocks[..., at:].contiguous().view(torch.int8)
        high = None
        if self.bits == 5:
            bit = torch.arange(8, dtype=torch.uint8, device=blocks.device)
            high = ((blocks[..., at : at + 4, None] >> bit) & 1).flatten(-2)
            at += 4
        packed = blocks[..., at:]
        codes = torch.cat([packed & 15, packed >> 4], dim=-1)
        return codes if high is None else codes | (high << 4)

    def assemble(self, scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
        """Blocks [O, G, block_bytes] from scale and offset [O, G] (rounded to float16) and codes [O, G, 32]."""
        parts = [write_half(scale)]
        if self.affine:
            parts.append(write_half(offset))
        if self.bits == 8:
            parts.append(codes.to(torch.int8).view(torch.uint8))
        else:
            codes = codes.to(torch.uint8)
            if self.bits == 5:
                weights = 1 << torch.arange(8, device=codes.device)
                high = (codes >> 4).unflatten(-1, (4, 8)).long()
                parts.append((high * weights).sum(-1).to(torch.uint8))
            low = codes & 15
            parts.append(low[..., :16] | (low[..., 16:] << 4))
        return torch.cat(parts, dim=-1)

    def move_offset(self, stored: Tensor, update: Tensor) -> Tensor:
        """Offsets [O, G] as the file can store them: stored + update, rounded.

        Where the update is zero the result is the stored number itself, bit for bit. The gradient passes to the
        update straight through the rounding.
        """
        moved: Tensor = _MoveRounded.apply(stored, update, self.stored)  # type: ignore[assignment]
        return moved

    def move_scale(self, stored: Tensor, update: Tensor) -> Tensor:
        """Scales [O, G] as the file can store them: stored (1 + update), rounded; otherwise as `move_offset`."""
        moved: Tensor = _MoveRounded.apply(stored, stored * update, self.stored)  # type: ignore[assignment]
        return moved

    def with_offset(self, blocks: Tensor, offset: Tensor) -> Tensor:
        """A copy of the blocks in which only the offsets are other: float32 [O, G], already rounded."""
        if not self.affine:
            raise ValueError(f"{self.name} stores no offset")
        blocks = blocks.clone()
        blocks[..., 2:4] = write_half(offset)
        return blocks

    def with_scale(self, blocks: Tensor, scale: Tensor) -> Tensor:
        """A copy of the blocks in which only the scales are other: float32 [O, G], already rounded."""
        if not self.scalable:
            raise ValueError(f"{self.name} has no scale for each group alone")
        blocks = blocks.clone()
        blocks[..., : self.stored.itemsize] = scale.to(self.stored).unsqueeze(-1).view(torch.uint8)
        return blocks

    def levels(self, blocks: Tensor) -> Tensor:
        """What a scale multiplies, code - zero, float32 [O, G, group]."""
        return self.codes(blocks).float() - self.zero

    def decode(
        self,
        blocks: Tensor,
        dtype: torch.dtype = torch.float32,
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        room: Tensor | None = None,
    ) -> Tensor:
        """Dense [O, group G] in `dtype`; computed in float32 and rounded once. A kernel does it where one exists.

        Args:
            offset, scale: float32 [O, G], in place of the stored ones.
            room: as many numbers in `dtype`, or more, that a kernel may use for the result.
        """
        if gpu.usable(blocks, dtype):
            return gpu.decode(self, blocks, dtype, offset, scale)
        kernel = kernels.usable(self.name, blocks, dtype)
        reads_scale = kernel and kernels.reads_scale(self.name)
        if scale is None and offset is None and not reads_scale:
            scale, offset = self.parameters(blocks)
        if scale is None and not reads_scale:
            scale = self.scale(blocks)
        offset = self.offset(blocks) if offset is None else offset
        if kernel:
            return kernels.decode(self.name, blocks, scale, offset, dtype, room)
        assert scale is not None
        return self.decode_reference(blocks, scale, offset, dtype)

    def decode_reference(self, blocks: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
        """What `decode` computes, in torch operations."""
        return (self.levels(blocks) * scale[..., None] + offset[..., None]).flatten(1).to(dtype)

    def nested_scale(self, blocks: Tensor, extra: Tensor) -> Tensor:
        """Scales float32 [O, G] of a format that keeps a part of them beside its blocks."""
        raise NotImplementedError(f"{self.name} keeps its scales in its blocks")

    def encode_with_extra(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Blocks of the dense matrix [O, 32 G], and the numbers that belong to many of them, if there are such."""
        return self.encode(weight), None

    def encode(self, weight: Tensor) -> Tensor:
        """Blocks of the dense matrix [O, 32 G], by ggml's reference quantizer (quantize_row_*_ref)."""
        groups = weight.float().unflatten(1, (-1, GROUP))
        if self.affine:
            low, high = groups.amin(-1), groups.amax(-1)
            scale, shift, offset = (high - low) / self.largest_code, 0.5, low
        else:
            # ggml keeps the sign of the entry of largest magnitude: it becomes the most negative code
            peak = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
            offset = torch.zeros_like(peak)
            scale, shift = (peak.abs() / 127, 0.0) if self.bits == 8 else (peak / -self.zero, self.zero + 0.5)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        scaled = (groups - offset[..., None]) * inverse[..., None]
        if self.bits == 8:
            whole = scaled.abs().floor()
            codes = scaled.sign() * (whole + (2 * (scaled.abs() - whole)).floor())  # C's roundf: halves go outward
        else:
            codes = (scaled + shift).trunc().clamp(0, self.largest_code)
        return self.assemble(scale, offset, codes)


class _MoveRounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stored: Tensor, update: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004
        return torch.where(update == 0, stored, (stored + update).to(dtype).float())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:  # noqa: ARG004
        return None, grads[0], None


def read_half(blocks: Tensor, at: int) -> Tensor:
    """The float16 numbers that stand at byte `at` of each block, as float32 [O, B]."""
    return blocks.view(torch.float16)[..., at // 2].float()  # every block has an even number of bytes


def write_half(values: Tensor) -> Tensor:
    """Numbers [...] as the bytes of float16, uint8 [..., 2]."""
    return values.half().unsqueeze(-1).view(torch.uint8)


GGML_CODECS = (
    Codec("Q4_0", 2, bits=4, block_bytes=18, zero=8, promotes_to="Q4_1"),
    Codec("Q4_1", 3, bits=4, block_bytes=20, affine=True),
    Codec("Q5_0", 6, bits=5, block_bytes=22, zero=16, promotes_to="Q5_1"),
    Codec("Q5_1", 7, bits=5, block_bytes=24, affine=True),
    Codec("Q8_0", 8, bits=8, block_bytes=34),
)
