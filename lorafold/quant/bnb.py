"""The formats of bitsandbytes: NF4 with or without double quantization, and 8 bits with one scale for each row.

NF4 (QLoRA, arXiv 2305.14314): a weight is one of 16 fixed values times the largest magnitude of its 64 weights. With
double quantization these magnitudes are stored as 8-bit codes: less their mean, relative to the largest of 256 of them,
by a table of 256 values that lie densest around 0 (arXiv 2110.02861). What is shared by many blocks is kept beside the
blocks as `extra`: the mean, then one magnitude for each 256 blocks.

Source: bitsandbytes (functional.py, backends/default/ops.py); encoded and decoded numbers are equal bit for bit.
"""

# O output rows, G groups of 64 in a row

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lorafold.quant.ggml import Codec
from lorafold.quant.kernels import INT8_STEP
from lorafold.quant.vectors import NF4_VALUES

BLOCK, NESTED = 64, 256
_TINY = 1e-38
_HALF_TABLE = 32767.5


@cache
def dynamic_values() -> Tensor:
    """The 256 values of the 8-bit table, ascending: seven decades, each with twice as many as the one below."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += means.tolist() + (-means).tolist()
    return torch.tensor(sorted(values))


@cache
def _dynamic_values_on(device: torch.device) -> Tensor:
    return dynamic_values().to(device)


def _nearest(scaled: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of ascending values; halfway between two the lower."""
    return torch.bucketize(scaled, (values[:-1] + values[1:]) / 2).to(torch.uint8)


def _blocks_of_one(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Numbers over the largest magnitude of their block, [n, size], and these [n]; the last block may be short."""
    short = -flat.numel() % size
    blocks = torch.cat([flat, flat.new_zeros(short)]).view(-1, size)
    largest = blocks.abs().amax(-1)
    return (blocks * (1 / largest.clamp_min(_TINY))[:, None]).clamp(-1, 1), largest


@dataclass(frozen=True)
class NF4Codec(Codec):
    """4-bit codes of `NF4_VALUES`, two in a byte, the first in the upper half, after the magnitude or its code."""

    nested: bool = False

    @property
    def codes_at(self) -> int:
        """Byte at which the codes begin."""
        return 1 if self.nested else 4

    def scale(self, blocks: Tensor) -> Tensor:
        """Largest magnitudes float32 [O, G]."""
        assert not self.nested
        return blocks[..., :4].contiguous().view(torch.float32)[..., 0]

    def nested_scale(self, blocks: Tensor, extra: Tensor) -> Tensor:
        """The same from 8-bit codes, with extra float32 [1 + blocks / 256]."""
        shared = extra[1:].repeat_interleave(NESTED)[: blocks.shape[0] * blocks.shape[1]]
        values = _dynamic_values_on(blocks.device)[blocks[..., 0].flatten().long()]
        return (values * shared + extra[0]).view(blocks.shape[:2])

    def codes(self, blocks: Tensor) -> Tensor:
        """Codes uint8 [O, G, 64]."""
        packed = blocks[..., self.codes_at :]
        return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(-2)

    def levels(self, blocks: Tensor) -> Tensor:
        """The values [O, G, 64] float32 that the magnitude multiplies."""
        return torch.tensor(NF4_VALUES, device=blocks.device)[self.codes(blocks).long()]

    def encode_with_extra(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Blocks [O, G, block_bytes] and `extra` of a dense matrix [O, 64 G]."""
        scaled, largest = _blocks_of_one(weight.float().flatten(), BLOCK)
        codes = _nearest(scaled, torch.tensor(NF4_VALUES))
        packed, extra = (codes[:, ::2] << 4) | codes[:, 1::2], None
        head = largest[:, None].view(torch.uint8)
        if self.nested:
            mean = largest.mean()
            scaled, shared = _blocks_of_one(largest - mean, NESTED)
            # bitsandbytes looks codes up in a table of 2^16 numbers between -1 and 1
            scaled = ((scaled + 1) * _HALF_TABLE + 0.5).trunc() / _HALF_TABLE - 1
            coded = torch.where(shared[:, None] > 0, _nearest(scaled, dynamic_values()), 0)  # as bitsandbytes does
            head, extra = coded.flatten()[: len(largest), None], torch.cat([mean[None], shared])
        return torch.cat([head, packed], dim=-1).view(len(weight), -1, self.block_bytes), extra


@dataclass(frozen=True)
class Int8Codec(Codec):
    """LLM.int8 (arXiv 2208.07339) without its outliers: one block a row, its largest magnitude, then 8-bit codes."""

    @property
    def codes_at(self) -> int:
        """Byte at which the codes begin."""
        return 4

    def scale(self, blocks: Tensor) -> Tensor:
        """Largest magnitudes float32 [O, 1]."""
        return blocks[..., :4].contiguous().view(torch.float32)[..., 0]

    def codes(self, blocks: Tensor) -> Tensor:
        """Codes int8 [O, 1, I]."""
        return blocks[..., 4:].contiguous().view(torch.int8)

    def decode_reference(self, blocks: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG002
        """Dense [O, I]; there are no offsets."""
        return (self.codes(blocks)[:, 0] * scale * INT8_STEP).to(dtype)

    def encode(self, weight: Tensor) -> Tensor:
        """Blocks [O, 1, 4 + I] of a dense matrix [O, I]; a row of zeros stays one."""
        wide = weight.half().float()  # as bitsandbytes does
        largest = wide.abs().amax(-1, keepdim=True)
        codes = torch.where(largest > 0, (wide * (127.0 / largest)).round(), 0.0).to(torch.int8)
        return torch.cat([largest.view(torch.uint8), codes.view(torch.uint8)], dim=-1)[:, None]


_NF4 = {"bits": 4, "group_size": BLOCK, "block_weights": BLOCK, "scalable": False, "stored": torch.float32}
BNB_CODECS = (
    NF4Codec("NF4", -1, block_bytes=36, **_NF4),  # type: ignore[arg-type]
    NF4Codec("NF4-DQ", -1, block_bytes=33, nested=True, **_NF4),  # type: ignore[arg-type]
    Int8Codec("INT8", -1, bits=8, block_bytes=0, group_size=0, block_weights=0, scalable=False, stored=torch.float32),
)
