"""MLX's affine format: w = scale * code + bias, with 2 to 8 bit codes in groups of 32, 64 or 128.

MLX keeps three tensors a matrix: codes as a stream of bits in 32-bit words, scales and biases in the model's type
(bfloat16, float16 or float32). Here a group's scale, bias (our offset) and codes stand together as one block, which
rearranges bytes and changes none. Scales may be negative.

Source: mlx, ops.cpp (affine_quantize, dequantize) and quantized.h (packing). Decoding is done in float32 and rounded
once; MLX itself computes in the model's type, so its own dequantized weights differ by that rounding.
"""

# O output rows, G groups in a row, S bytes of a stored scale

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.quant.ggml import Codec

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (32, 64, 128)
_LEAST_SCALE = 1e-7
STORED = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class MLXCodec(Codec):
    """One combination of bits, group size and type of the parameters.

    In bfloat16 an update of an offset below 2^-9 of it vanishes; training sees that.
    """

    stored: torch.dtype = torch.bfloat16

    @property
    def codes_at(self) -> int:
        """Byte at which the codes begin: after scale and bias."""
        return 2 * self.stored.itemsize

    def scale(self, blocks: Tensor) -> Tensor:
        """Scales float32 [O, G] of uint8 blocks [O, G, block_bytes]."""
        return self._read(blocks, 0)

    def offset(self, blocks: Tensor) -> Tensor:
        """MLX's biases, float32 [O, G]."""
        return self._read(blocks, self.stored.itemsize)

    def codes(self, blocks: Tensor) -> Tensor:
        """Codes uint8 [O, G, group]: the bits of a group are one stream, lowest first."""
        packed = blocks[..., self.codes_at :].unflatten(-1, (-1, self.bits)).long()  # 8 codes in so many bytes
        place = torch.arange(self.bits, device=blocks.device) * 8
        words = (packed << place).sum(-1, keepdim=True)
        shifts = torch.arange(8, device=blocks.device) * self.bits
        return ((words >> shifts) & self.largest_code).flatten(-2).to(torch.uint8)

    def assemble(self, scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
        """Blocks [O, G, block_bytes] from scale and offset [O, G] (rounded to `stored`) and codes [O, G, group]."""
        shifts = torch.arange(8, device=codes.device) * self.bits
        words = (codes.unflatten(-1, (-1, 8)).long() << shifts).sum(-1, keepdim=True)
        place = torch.arange(self.bits, device=codes.device) * 8
        packed = ((words >> place) & 255).flatten(-2).to(torch.uint8)
        return torch.cat([self._write(scale), self._write(offset), packed], dim=-1)

    def encode(self, weight: Tensor) -> Tensor:
        """Blocks of the dense matrix [O, G group], as mx.quantize makes them.

        The weight of largest magnitude becomes the bias, and the scale is changed a little so that zero is a code.

        Raises:
            ValueError: a scale or bias is too large for the type in which it is stored.
        """
        groups, levels = weight.float().unflatten(1, (-1, self.group_size)), self.largest_code
        low, high = groups.amin(-1), groups.amax(-1)
        from_low = low.abs() > high.abs()
        scale = ((high - low) / levels).clamp_min(_LEAST_SCALE)
        scale, edge = torch.where(from_low, scale, -scale), torch.where(from_low, low, high)
        zero = (edge / scale).round()
        scale, offset = torch.where(zero == 0, scale, edge / zero), torch.where(zero == 0, 0.0, edge)
        codes = ((groups - offset[..., None]) / scale[..., None]).round().clamp(0, levels)
        blocks = self.assemble(scale, offset, codes.to(torch.uint8))
        if not (torch.isfinite(self.scale(blocks)).all() and torch.isfinite(self.offset(blocks)).all()):
            raise ValueError(f"a scale or bias is too large for {self.stored}")
        return blocks

    def with_offset(self, blocks: Tensor, offset: Tensor) -> Tensor:
        """A copy of the blocks in which only the biases are other: float32 [O, G], already rounded."""
        blocks = blocks.clone()
        blocks[..., self.stored.itemsize : self.codes_at] = self._write(offset)
        return blocks

    def _read(self, blocks: Tensor, at: int) -> Tensor:
        return blocks.view(self.stored)[..., at // self.stored.itemsize].float()  # blocks are whole numbers of them

    def _write(self, values: Tensor) -> Tensor:
        return values.to(self.stored).unsqueeze(-1).view(torch.uint8)


def mlx_codec(bits: int, group: int, stored: str) -> str:
    """The name of a combination, such as `MLX4-G64-BF16`."""
    return f"MLX{bits}-G{group}-{stored}"


def _make(bits: int, group: int, stored: str) -> MLXCodec:
    dtype = STORED[stored]
    size = 2 * dtype.itemsize + group * bits // 8
    name = mlx_codec(bits, group, stored)
    return MLXCodec(
        name,
        -1,
        bits,
        size,
        affine=True,
        group_size=group,
        block_weights=group,
        coarse=stored == "BF16",
        stored=dtype,
    )


MLX_CODECS = tuple(_make(bits, group, stored) for bits in BITS for group in GROUPS for stored in STORED)
