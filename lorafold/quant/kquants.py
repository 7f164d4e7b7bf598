"""The block formats of ggml with 256 weights and two levels of parameters, and IQ4_NL.

A K-quant block decodes to  w = (d sc) (code - zero) - dmin m,  with float16 d and dmin for 256 weights and small
whole numbers sc and m for each group of 16 or 32. In the terms of `ggml.py` the scale of a group is d sc, its offset
-dmin m. Q2_K, Q4_K and Q5_K have offsets, of which a file can store only multiples of dmin: `move_offset` gives the
nearest offsets that one dmin and whole m can express, so training sees what will be stored.

Source: ggml-common.h (block layouts), ggml-quants.c and gguf-py's quants.py of llama.cpp (decoding); decoded weights
equal gguf-py's bit for bit. Only offsets are written: no quantizer of dense weights is here.
"""

# O output rows, B blocks of 256 in a row, P groups in a block, G = B P groups in a row

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.quant.ggml import Codec, read_half, write_half
from lorafold.quant.kernels import k_parameters, usable
from lorafold.quant.vectors import IQ4_NL_VALUES

BLOCK = 256


@dataclass(frozen=True)
class KCodec(Codec):
    """A K-quant.

    Attributes:
        d_at, dmin_at: bytes at which the float16 numbers begin; dmin_at is None without offsets.
        most: largest m that is stored.
    """

    block_weights: int = BLOCK
    encodes: bool = False
    coarse: bool = True
    scalable: bool = False
    d_at: int = 0
    dmin_at: int | None = None
    most: int = 63

    def scale(self, blocks: Tensor) -> Tensor:
        """Scales d sc, float32 [O, G]."""
        return (read_half(blocks, self.d_at)[..., None] * self.steps(blocks)[0]).flatten(1)

    def offset(self, blocks: Tensor) -> Tensor:
        """Offsets -dmin m, float32 [O, G]; -0.0 without offsets."""
        if self.dmin_at is None:
            groups = blocks.shape[1] * self.block_weights // self.group_size
            return torch.full((blocks.shape[0], groups), -0.0, device=blocks.device)
        return -(read_half(blocks, self.dmin_at)[..., None] * self.steps(blocks)[1]).flatten(1)

    def parameters(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """As `scale` and `offset` give them; in one pass where there is a kernel."""
        covered = usable(self.name, blocks, torch.float32)
        return k_parameters(self.name, blocks) if covered else super().parameters(blocks)

    def steps(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """sc and m as float32 [O, B, P]; m is empty without offsets."""
        if self.name == "Q2_K":
            return (blocks[..., :16] & 15).float(), (blocks[..., :16] >> 4).float()
        if self.name == "Q3_K":
            low, high = blocks[..., 96:104], blocks[..., 104:108]
            four = torch.cat([low & 15, low >> 4], -1)
            two = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], -1)
            return (four | (two << 4)).float() - 32, blocks.new_empty(0).float()
        if self.name == "Q6_K":
            return blocks[..., 192:208].contiguous().view(torch.int8).float(), blocks.new_empty(0).float()
        a, b, c = blocks[..., 4:8], blocks[..., 8:12], blocks[..., 12:16]
        sc = torch.cat([a & 63, (c & 15) | ((a >> 2) & 48)], -1)
        m = torch.cat([b & 63, (c >> 4) | ((b >> 2) & 48)], -1)
        return sc.float(), m.float()

    def codes(self, blocks: Tensor) -> Tensor:
        """Codes uint8 [O, G, group]."""
        unpack = {"Q2_K": _codes2, "Q3_K": _codes3, "Q4_K": _codes4, "Q5_K": _codes5, "Q6_K": _codes6}[self.name]
        return unpack(blocks).unflatten(-1, (self.block_weights // self.group_size, self.group_size)).flatten(1, 2)

    def move_offset(self, stored: Tensor, update: Tensor) -> Tensor:
        """Offsets [O, G] as a block can store them: the nearest to stored + update; straight-through gradient.

        Blocks whose update is zero keep their offsets bit for bit.
        """
        moved: Tensor = _MoveToSteps.apply(stored, update, self)  # type: ignore[assignment]
        return moved

    def with_offset(self, blocks: Tensor, offset: Tensor) -> Tensor:
        """A copy of the blocks in which only dmin and m are other: offsets [O, G] from `move_offset`."""
        if self.dmin_at is None:
            raise ValueError(f"{self.name} stores no offset")
        wanted = self._in_blocks(offset)
        changed = (wanted != self._in_blocks(self.offset(blocks))).any(-1)
        dmin, m = self.nearest_steps(-wanted, least=1)
        m = m.to(torch.uint8)
        new = blocks.clone()
        new[..., self.dmin_at : self.dmin_at + 2] = write_half(dmin)
        if self.name == "Q2_K":
            new[..., :16] = (blocks[..., :16] & 15) | (m << 4)
        else:
            new[..., 8:12] = (m[..., :4] & 63) | ((m[..., 4:] & 48) << 2)
            new[..., 12:16] = (blocks[..., 12:16] & 15) | ((m[..., 4:] & 15) << 4)
        return torch.where(changed[..., None], new, blocks)

    def nearest_steps(self, target: Tensor, least: int | None = None) -> tuple[Tensor, Tensor]:
        """dmin [O, B], a float16 number, and whole m [O, B, P] in [0, most] with dmin m nearest to target [O, B, P].

        dmin is tried so that the entry farthest from zero becomes each m from `most` down to `least`, by default 3/4
        of it. With 1, numbers that such a pair expresses exactly are found again. Entries of the other sign become
        zero: the format has none. Where a target is not finite or beyond float16, dmin is not a number.
        """
        least = 3 * self.most // 4 if least is None else least
        best, dmin = torch.full(target.shape[:2], torch.inf), torch.zeros(target.shape[:2])
        best, dmin = best.to(target.device), dmin.to(target.device)
        for peak in (target.amax(-1), target.amin(-1)):
            for top in range(self.most, least - 1, -1):
                trial = (peak / top).half().float()
                error = (self._whole(target, trial) * trial[..., None] - target).square().sum(-1)
                better = error < best
                best, dmin = torch.where(better, error, best), torch.where(better, trial, dmin)
        fits = target.abs().amax(-1) <= torch.finfo(torch.float16).max * self.most
        dmin = torch.where(fits, dmin, torch.nan)
        return dmin, self._whole(target, dmin).nan_to_num(0)

    def _whole(self, target: Tensor, dmin: Tensor) -> Tensor:
        inverse = torch.where(dmin == 0, 0.0, 1 / dmin)
        return (target * inverse[..., None]).round().clamp(0, self.most)

    def _in_blocks(self, values: Tensor) -> Tensor:
        return values.unflatten(1, (-1, self.block_weights // self.group_size))


class _MoveToSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, stored: Tensor, update: Tensor, codec: KCodec) -> Tensor:  # noqa: ARG004
        target = codec._in_blocks(stored + update)
        dmin, m = codec.nearest_steps(-target)
        moved = (-(dmin[..., None] * m)).flatten(1)
        unmoved = (codec._in_blocks(update) == 0).all(-1, keepdim=True).expand_as(target).flatten(1)
        return torch.where(unmoved, stored, moved)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[None, Tensor, None]:  # noqa: ARG004
        return None, grads[0], None


@dataclass(frozen=True)
class CodeBook(Codec):
    """IQ4_NL: sixteen fixed values instead of evenly spaced codes; no offset.

    Source: ggml-common.h, kvalues_iq4nl.
    """

    encodes: bool = False

    def codes(self, blocks: Tensor) -> Tensor:
        """The values that the codes stand for, int8 [O, G, 32]."""
        return torch.tensor(IQ4_NL_VALUES, dtype=torch.int8, device=blocks.device)[super().codes(blocks).long()]


def _fields(data: Tensor, parts: int, shifts: range, mask: int) -> Tensor:
    """Bit fields of data [..., n]: its `parts` equal pieces one by one, each read whole at every shift."""
    data = data.unflatten(-1, (parts, 1, -1))
    shift = torch.tensor(list(shifts), dtype=torch.uint8, device=data.device)[:, None]
    return ((data >> shift) & mask).flatten(-3)


def _codes2(blocks: Tensor) -> Tensor:
    return _fields(blocks[..., 16:80], 2, range(0, 8, 2), 3)


def _codes3(blocks: Tensor) -> Tensor:
    high = _fields(blocks[..., :32], 1, range(8), 1)
    return _fields(blocks[..., 32:96], 2, range(0, 8, 2), 3) | (high << 2)


def _codes4(blocks: Tensor) -> Tensor:
    return _fields(blocks[..., 16:144], 4, range(0, 8, 4), 15)


def _codes5(blocks: Tensor) -> Tensor:
    high = _fields(blocks[..., 16:48], 1, range(8), 1)
    return _fields(blocks[..., 48:176], 4, range(0, 8, 4), 15) | (high << 4)


def _codes6(blocks: Tensor) -> Tensor:
    high = _fields(blocks[..., 128:192], 2, range(0, 8, 2), 3)
    return _fields(blocks[..., :128], 2, range(0, 8, 4), 15) | (high << 4)


K_CODECS = (
    KCodec("Q2_K", 10, bits=2, block_bytes=84, affine=True, group_size=16, d_at=80, dmin_at=82, most=15),
    KCodec("Q3_K", 11, bits=3, block_bytes=110, zero=4, group_size=16, d_at=108),
    KCodec("Q4_K", 12, bits=4, block_bytes=144, affine=True, promotes_to="Q4_1", dmin_at=2),
    KCodec("Q5_K", 13, bits=5, block_bytes=176, affine=True, promotes_to="Q5_1", dmin_at=2),
    KCodec("Q6_K", 14, bits=6, block_bytes=210, zero=32, group_size=16, d_at=208),
    CodeBook("IQ4_NL", 20, bits=4, block_bytes=18),
)
