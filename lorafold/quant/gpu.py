"""Decoding on a GPU: one Triton kernel for all block formats beside the torch oracle in `ggml.py`.

Where the bits of a code stand in its block is a table of the format, for each weight one or two pieces: a byte, how far
it is shifted down, which bits are kept, and how far they are shifted up. The 6-bit parameters of K-quants are read in
the same way. Products and sums are rounded one by one (no fused multiply-add), so the bits are torch's, except that
another payload may stand for what is not a number.
"""

# pyright: reportInvalidTypeForm=false
# codec: a `Codec` of `ggml.py`, which imports this file
# B blocks in all, P groups in a block, S weights in a group; G groups in a row, O rows, I = G S

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lorafold.kernels.gpu import compiled, tl, triton, works
from lorafold.quant.kernels import INT8_STEP
from lorafold.quant.vectors import IQ4_NL_VALUES, NF4_VALUES

_TILE = 4096  # weights of a program
Piece = tuple[int, int, int, int]  # byte, shift down, mask, shift up


@compiled
def _field(raw, block, inside, table, at, count: tl.constexpr, pieces: tl.constexpr):
    """The whole numbers that a table [pieces, 4, count] places in blocks that begin at the bytes `block`."""
    number = 0
    for p in tl.static_range(pieces):
        piece = table + 4 * count * p + at
        byte = tl.load(raw + block + tl.load(piece), mask=inside, other=0).to(tl.int32)
        number |= ((byte >> tl.load(piece + count)) & tl.load(piece + 2 * count)) << tl.load(piece + 3 * count)
    return number


@compiled
def _decode(
    raw,
    stored,
    scales,
    offsets,
    codes_at,
    scale_steps_at,
    offset_steps_at,
    values,
    out,
    blocks,
    BYTES: tl.constexpr,
    NUMBERS: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PIECES: tl.constexpr,
    STEP_PIECES: tl.constexpr,
    ZERO: tl.constexpr,
    SIGNED: tl.constexpr,
    STEP_ZERO: tl.constexpr,
    STEP_SIGNED: tl.constexpr,
    SCALE_AT: tl.constexpr,
    OFFSET_AT: tl.constexpr,
    ADDS: tl.constexpr,
    TILE: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # of the block
    inside = number < blocks
    place, group = tl.arange(0, P), number[:, None] * P + tl.arange(0, P)[None, :]
    one, byte = inside[:, None], (number * BYTES)[:, None]
    if scales is None:
        scale = tl.load(stored + number * NUMBERS + SCALE_AT, mask=inside, other=0).to(tl.float32)[:, None]
        if scale_steps_at is not None:
            steps = _field(raw, byte, one, scale_steps_at, place[None, :], P, STEP_PIECES)
            steps = (steps ^ 128) - 128 if STEP_SIGNED else steps - STEP_ZERO
            scale = scale * steps.to(tl.float32)
    else:
        scale = tl.load(scales + group, mask=one, other=0)
    weight = place[:, None] * S + tl.arange(0, S)[None, :]
    code = _field(raw, byte[:, :, None], one[:, :, None], codes_at, weight[None, :, :], P * S, PIECES)
    level = (code ^ 128) - 128 if SIGNED else code - ZERO
    level = level.to(tl.float32) if values is None else tl.load(values + code)
    w = level * scale[:, :, None]
    if offsets is not None:
        w += tl.load(offsets + group, mask=one, other=0)[:, :, None]
    elif ADDS:
        offset = tl.load(stored + number * NUMBERS + OFFSET_AT, mask=inside, other=0).to(tl.float32)[:, None]
        if offset_steps_at is not None:
            steps = _field(raw, byte, one, offset_steps_at, place[None, :], P, STEP_PIECES)
            offset = (offset * steps.to(tl.float32)) * -1.0  # Triton's minus is 0 - x, which loses -0.0
        w += offset[:, :, None]
    place_out = number[:, None, None] * (P * S) + weight[None, :, :]
    tl.store(out + place_out, w.to(out.dtype.element_ty), mask=one[:, :, None])


@compiled
def _decode_rows(raw, scales, out, width, STEP: tl.constexpr, TILE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE + tl.arange(0, TILE)
    code = tl.load(raw + row * (width + 4) + 4 + column, mask=column < width, other=0).to(tl.int32)
    w = ((code ^ 128) - 128).to(tl.float32) * tl.load(scales + row) * STEP
    tl.store(out + row * width + column, w.to(out.dtype.element_ty), mask=column < width)


def usable(blocks: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernel runs where these blocks lie, and makes this type."""
    known = dtype in (torch.bfloat16, torch.float16, torch.float32)
    return blocks.device.type == "cuda" and known and works(blocks.device)


def decode(
    codec: Any, blocks: Tensor, dtype: torch.dtype, offset: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """Dense [O, I] in `dtype` of blocks uint8 [O, B / O, bytes]; offset and scale float32 [O, G] replace the stored."""
    scale, offset = (x if x is None else x.detach().contiguous() for x in (scale, offset))
    raw = blocks.contiguous()
    with torch.cuda.device_of(raw):
        if codec.group_size == 0:
            return _rows(raw, codec.scale(raw) if scale is None else scale, dtype)
        out = torch.empty(len(raw), raw.shape[1] * codec.block_weights, dtype=dtype, device=raw.device)
        size, groups = codec.group_size, codec.block_weights // codec.group_size
        count, tile = raw.shape[0] * raw.shape[1], max(1, _TILE // codec.block_weights)
        if count:
            tables, constants = _layout(codec, raw.device)
            stored = raw if codec.block_bytes % codec.stored.itemsize else raw.view(codec.stored)
            options = {"P": groups, "S": size, "TILE": tile, "enable_fp_fusion": False}
            launch = _decode[(triton.cdiv(count, tile),)]
            launch(raw, stored, scale, offset, *tables, out, count, **constants, **options)
    return out


def _rows(raw: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(raw), raw.shape[2] - 4, dtype=dtype, device=raw.device)
    if out.numel():
        grid = (len(raw), triton.cdiv(out.shape[1], _TILE))
        _decode_rows[grid](raw, scale, out, out.shape[1], STEP=INT8_STEP, TILE=_TILE, enable_fp_fusion=False)
    return out


@lru_cache
def _layout(codec: Any, device: torch.device) -> tuple[list[Tensor | None], dict[str, Any]]:
    """What the kernel must know of a format: tables of codes, scale steps and offset steps, values; constants."""
    codes, codes_in = _table([_code(codec, j) for j in range(codec.block_weights)])
    scale_steps = offset_steps = values = None
    steps_in, at = 0, (0, 1)  # the offset stands behind the scale
    if codec.name.endswith("_K"):
        groups = range(codec.block_weights // codec.group_size)
        steps = [_STEPS[codec.name](g) for g in groups]
        both, steps_in = _table([pieces for pair in zip(*steps, strict=True) for pieces in pair])
        scale_steps, offset_steps = both[..., : len(groups)], both[..., len(groups) :]
        at = tuple((at or 0) // 2 for at in (codec.d_at, codec.dmin_at))
    if codec.name == "IQ4_NL" or codec.name.startswith("NF4"):
        values = torch.tensor(IQ4_NL_VALUES if codec.name == "IQ4_NL" else NF4_VALUES, dtype=torch.float32)
    constants = {
        "BYTES": codec.block_bytes,
        "NUMBERS": codec.block_bytes // codec.stored.itemsize,
        "PIECES": codes_in,
        "STEP_PIECES": steps_in,
        "ZERO": codec.zero,
        "SIGNED": codec.name == "Q8_0",
        "STEP_ZERO": 32 if codec.name == "Q3_K" else 0,
        "STEP_SIGNED": codec.name == "Q6_K",
        "SCALE_AT": at[0],
        "OFFSET_AT": at[1],
        "ADDS": codec.affine,
    }
    tables = (codes, scale_steps, offset_steps if codec.affine else None, values)
    return [None if x is None else x.contiguous().to(device) for x in tables], constants


def _table(fields: list[list[Piece]]) -> tuple[Tensor, int]:
    """int32 [pieces, 4, fields] and the number of pieces; what has fewer gets pieces without bits."""
    most = max(map(len, fields))
    padded = [field + [(0, 0, 0, 0)] * (most - len(field)) for field in fields]
    return torch.tensor(padded, dtype=torch.int32).permute(1, 2, 0), most


def _code(codec: Any, j: int) -> list[Piece]:
    """Where the code of weight j of a block stands."""
    at = codec.codes_at
    if codec.name in _CODES:
        return _CODES[codec.name](j)
    if codec.name.startswith("MLX"):  # one stream of bits
        byte, right = at + codec.bits * j // 8, codec.bits * j % 8
        low = min(codec.bits, 8 - right)
        rest = [(byte + 1, 0, (1 << (codec.bits - low)) - 1, low)] if low < codec.bits else []
        return [(byte, right, (1 << low) - 1, 0), *rest]
    if codec.name.startswith("NF4"):
        return [(at + j // 2, 4 - j % 2 * 4, 15, 0)]
    if codec.bits == 8:
        return [(at + j, 0, 255, 0)]
    high = [(at + j // 8, j % 8, 1, 4)] if codec.bits == 5 else []
    return [(at + 4 * len(high) + j % 16, j // 16 * 4, 15, 0), *high]


_CODES = {  # of weight j of 256
    "Q2_K": lambda j: [(16 + j // 128 * 32 + j % 32, j // 32 % 4 * 2, 3, 0)],
    "Q3_K": lambda j: [(32 + j // 128 * 32 + j % 32, j // 32 % 4 * 2, 3, 0), (j % 32, j // 32, 1, 2)],
    "Q4_K": lambda j: [(16 + j // 64 * 32 + j % 32, j // 32 % 2 * 4, 15, 0)],
    "Q5_K": lambda j: [(48 + j // 64 * 32 + j % 32, j // 32 % 2 * 4, 15, 0), (16 + j % 32, j // 32, 1, 4)],
    "Q6_K": lambda j: [
        (j // 128 * 64 + j % 64, j // 64 % 2 * 4, 15, 0),
        (128 + j // 128 * 32 + j % 32, j // 32 % 4 * 2, 3, 4),
    ],
}


def _six_bits(g: int) -> tuple[list[Piece], list[Piece]]:
    if g < 4:
        return [(4 + g, 0, 63, 0)], [(8 + g, 0, 63, 0)]
    return [(8 + g, 0, 15, 0), (g, 6, 3, 4)], [(8 + g, 4, 15, 0), (4 + g, 6, 3, 4)]


_STEPS = {  # sc and m of group g
    "Q2_K": lambda g: ([(g, 0, 15, 0)], [(g, 4, 15, 0)]),
    "Q3_K": lambda g: ([(96 + g % 8, g // 8 * 4, 15, 0), (104 + g % 4, g // 4 * 2, 3, 4)], []),
    "Q4_K": _six_bits,
    "Q5_K": _six_bits,
    "Q6_K": lambda g: ([(192 + g, 0, 255, 0)], []),
}
