"""Decoding on a CPU at memory speed: numba kernels beside the torch oracle in `ggml.py` and `kquants.py`.

A kernel walks through the blocks of a family of formats; `vectors.py` turns their codes into weights, in float32 or
rounded to bfloat16 (nearest, ties to even, as torch does). Compiled code is cached on disk, for which each kernel must
be a function of its own; numba looks at the kernel's file alone for changes, so `make test` forgets what is older than
the code in vectors that kernels call.
"""

# raw uint8 [O, B, bytes], scale and offset float32 [O, G], out float32 or uint16 (bfloat16) [O, I]; a table is the
# address of the 16 float32 values of the codes, or the float32 code that stands for zero

from __future__ import annotations

import numpy as np
import torch
from numba import config, njit, prange
from torch import Tensor

from lorafold.kernels.compiled import on_torch_threads
from lorafold.quant.vectors import (
    IQ4_NL_VALUES,
    NF4_VALUES,
    half,
    permutes,
    store_2,
    store_3,
    store_5,
    store_6,
    store_bytes,
    store_fifth,
    store_halves,
    store_high_first,
    store_low_first,
    store_parts,
    store_steps,
)

INT8_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it
_NO_SCALES = np.empty((0, 0), np.float32)


def usable(name: str, blocks: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel covers this case of the format `name`; otherwise the caller uses torch operations."""
    known = (name in _FORMATS or name.startswith("MLX")) and not config.DISABLE_JIT  # type: ignore[attr-defined]
    return known and blocks.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def decode(
    name: str, blocks: Tensor, scale: Tensor | None, offset: Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Dense [O, I] of blocks uint8 [O, B, bytes] of the format `name`, with scale and offset float32 [O, G].

    The scale may be None where the kernel `reads_scale`. `room`, O I numbers in `dtype` or more, takes the result.
    """
    kernel, weights, values, *form = _FORMATS[name] if name in _FORMATS else _mlx(name)
    shape = blocks.shape[0], blocks.shape[1] * weights
    out = torch.empty(shape, dtype=dtype) if room is None else room[: shape[0] * shape[1]].view(shape)
    s = _NO_SCALES if scale is None else scale.detach().contiguous().numpy()
    given = blocks.contiguous().numpy(), s, offset.detach().contiguous().numpy()
    written = out.numpy() if dtype == torch.float32 else out.view(torch.uint16).numpy()
    on_torch_threads(kernel, *given, _table(values, dtype), *form, written)
    return out


def reads_scale(name: str) -> bool:
    """Whether the kernel takes the scales out of the blocks itself."""
    return name in _FORMATS and _FORMATS[name][0] is _groups


def k_parameters(name: str, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales d sc and offsets -dmin m, float32 [O, G], of the K-quant `name`; offsets are -0.0 without m."""
    kernel, *_, bits = _FORMATS[name]
    assert kernel is _k
    groups = (8 if bits in (4, 5) else 16) * blocks.shape[1]
    scale, offset = torch.empty(blocks.shape[0], groups), torch.full((blocks.shape[0], groups), -0.0)
    on_torch_threads(_k_parameters, blocks.contiguous().numpy(), bits, scale.numpy(), offset.numpy())
    return scale, offset


@njit(parallel=True, cache=True)
def _k_parameters(raw, bits, scale, offset):
    for r in prange(raw.shape[0]):
        source, scales, offsets = raw[r].ctypes.data, scale[r].ctypes.data, offset[r].ctypes.data
        for b in range(raw.shape[1]):
            block, place = raw[r, b], source + b * raw.shape[2]
            g = b * (scale.shape[1] // raw.shape[1])
            if bits == 2:
                store_steps(half(place + 80), (place, 0, 15, 0), scales + 4 * g)
                store_steps(-half(place + 82), (place, 4, 15, 0), offsets + 4 * g)
            elif bits == 3:
                d = half(place + 108)
                for i in range(8):
                    low, high, shift = np.int32(block[96 + i]), np.int32(block[104 + i % 4]), 2 * (i // 4)
                    scale[r, g + i] = d * np.float32(((low & 15) | (((high >> shift) & 3) << 4)) - 32)
                    scale[r, g + i + 8] = d * np.float32(((low >> 4) | (((high >> (shift + 4)) & 3) << 4)) - 32)
            elif bits == 6:
                store_steps(half(place + 208), (place + 192, 0, 255, 128), scales + 4 * g)
            else:
                d, dmin = half(place), half(place + 2)
                for i in range(4):
                    a, m, c = block[4 + i], block[8 + i], block[12 + i]
                    scale[r, g + i] = d * np.float32(a & 63)
                    scale[r, g + i + 4] = d * np.float32((c & 15) | ((a >> 2) & 48))
                    offset[r, g + i] = -(dmin * np.float32(m & 63))
                    offset[r, g + i + 4] = -(dmin * np.float32((c >> 4) | ((m >> 2) & 48)))


@njit(parallel=True, cache=True)
def _groups(raw, scale, offset, table, at, out):
    """Groups of 32, by the bytes of their codes, from byte `at`: 16 (Q4_0, Q4_1, IQ4_NL), 20 (Q5_0, Q5_1), 32 (Q8_0).

    16 bytes are low halves, then high halves, before which 4 hold fifth bits. Without scales (an array of no rows)
    those at the beginning of each block are taken. Of signed bytes the table is 128 more than the code of zero.
    """
    stored, size = len(scale) == 0, raw.shape[2] - at
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data, out[r].ctypes.data
        for g in range(raw.shape[1]):
            place, to = source + g * raw.shape[2], target + 32 * out.itemsize * g
            scales = (half(place) if stored else scale[r, g], offset[r, g])
            if size == 16:
                store_halves(kind, table, scales, place + at, to)
            elif size == 20:
                store_fifth(kind, table, scales, place + at, to)
            else:
                store_bytes(kind, table, scales, place + at, to)


@njit(parallel=True, cache=True)
def _in_a_row(raw, scale, offset, table, at, bits, out):
    """MLX: groups of 32, 64 or 128 codes one after the other, the lowest bits first."""
    chunks = (raw.shape[2] - at) // (4 * bits)
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            scales = (scale[r, g], offset[r, g])
            for c in range(chunks):
                place, to = source + g * raw.shape[2] + 4 * bits * c, target + 32 * out.itemsize * (g * chunks + c)
                if bits == 2:
                    store_2(kind, table, scales, place, to)
                elif bits == 3:
                    store_3(kind, table, scales, place, to)
                elif bits == 4:
                    store_low_first(kind, table, scales, place, to)
                elif bits == 5:
                    store_5(kind, table, scales, place, to)
                elif bits == 6:
                    store_6(kind, table, scales, place, to)
                else:
                    store_parts(kind, table, scales, (place, 0, 255), to)


@njit(parallel=True, cache=True)
def _high_first(raw, scale, offset, table, at, out):
    """NF4: groups of 64; the high half of a byte is the code before its low half."""
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data + at, out[r].ctypes.data
        for g in range(raw.shape[1]):
            scales, place = (scale[r, g], offset[r, g]), source + g * raw.shape[2]
            for c in range(2):
                store_high_first(kind, table, scales, place + 16 * c, target + 32 * out.itemsize * (2 * g + c))


@njit(parallel=True, cache=True)
def _k(raw, scale, offset, table, bits, out):
    """K-quants: 256 weights in 8 times 32, of which each takes some bits of 32 bytes and of 32 others.

    A scale is for 16 weights in 2, 3 and 6 bits, and for 32 in 4 and 5.
    """
    each = 2 if bits in (2, 3, 6) else 1
    for r in prange(raw.shape[0]):
        kind, source, target = out.dtype.type(0), raw[r].ctypes.data, out[r].ctypes.data
        for b in range(raw.shape[1]):
            place = source + b * raw.shape[2]
            if bits == 4:
                for c in range(4):
                    g, codes, to = 8 * b + 2 * c, place + 16 + 32 * c, target + 32 * out.itemsize * (8 * b + 2 * c)
                    store_parts(kind, table, (scale[r, g], offset[r, g]), (codes, 0, 15), to)
                    to += 32 * out.itemsize
                    store_parts(kind, table, (scale[r, g + 1], offset[r, g + 1]), (codes, 4, 15), to)
                continue
            for h in range(2):
                for k in range(4):
                    to, g = target + 32 * out.itemsize * (8 * b + 4 * h + k), each * (8 * b + 4 * h + k)
                    scales = (scale[r, g], offset[r, g], scale[r, g + each - 1], offset[r, g + each - 1])
                    if bits == 2:
                        store_parts(kind, table, scales, (place + 16 + 32 * h, 2 * k, 3), to)
                    elif bits == 3:
                        parts = (place + 32 + 32 * h, 2 * k, 3, place, 4 * h + k, 1, 2)
                        store_parts(kind, table, scales, parts, to)
                    elif bits == 5:
                        parts = (place + 48 + 32 * (2 * h + k // 2), 4 * (k % 2), 15, place + 16, 4 * h + k, 1, 4)
                        store_parts(kind, table, scales, parts, to)
                    else:
                        low, high = place + 64 * h + 32 * (k % 2), place + 128 + 32 * h
                        store_parts(kind, table, scales, (low, 4 * (k // 2), 15, high, 2 * k, 3, 4), to)


def _counts(bits: int, zero: int = 0) -> np.ndarray:
    return np.arange(1 << bits, dtype=np.float32) - zero


_FORMATS = {  # format -> kernel, weights of a block, what the codes stand for, and the byte at which they begin
    "Q4_0": (_groups, 32, _counts(4, 8), 2),
    "Q4_1": (_groups, 32, _counts(4), 4),
    "Q5_0": (_groups, 32, _counts(5, 16), 2),
    "Q5_1": (_groups, 32, _counts(5), 4),
    "Q8_0": (_groups, 32, _counts(8, 128), 2),
    "IQ4_NL": (_groups, 32, np.array(IQ4_NL_VALUES, np.float32), 2),
    "NF4": (_high_first, 64, np.array(NF4_VALUES, np.float32), 4),
    "NF4-DQ": (_high_first, 64, np.array(NF4_VALUES, np.float32), 1),
    "Q2_K": (_k, 256, _counts(2), 2),  # bits of a code instead
    "Q3_K": (_k, 256, _counts(3, 4), 3),
    "Q4_K": (_k, 256, _counts(4), 4),
    "Q5_K": (_k, 256, _counts(5), 5),
    "Q6_K": (_k, 256, _counts(6, 32), 6),
}
_MLX_COUNTS = {bits: _counts(bits) for bits in (2, 3, 4, 5, 6, 8)}


def _mlx(name: str) -> tuple:
    """The row of `_FORMATS` for one of MLX's combinations, such as MLX4-G64-BF16, with the bits of a code."""
    bits, group, stored = name.removeprefix("MLX").split("-")
    return _in_a_row, int(group[1:]), _MLX_COUNTS[int(bits)], 8 if stored == "F32" else 4, int(bits)


def _table(values: np.ndarray, dtype: torch.dtype) -> int | np.float32:
    """How a kernel is told what codes stand for."""
    counts_steps = values[-1] - values[0] == len(values) - 1
    if counts_steps and not (dtype == torch.bfloat16 and len(values) == 16 and permutes()):
        return np.float32(-values[0])
    return values.ctypes.data
