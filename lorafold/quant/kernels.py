"""Decoding on a CPU at memory speed: numba kernels beside the torch oracle in `ggml.py`.

A block of 32 is decoded to float32 in cache and then copied, or rounded to bfloat16 (nearest, ties to even, as
torch does). Compiled code is cached on disk, for which each kernel must be a function of its own.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import config, njit, prange, set_num_threads
from torch import Tensor

_GROUP = 32
_MOST_THREADS: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def usable(blocks: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel covers this case; otherwise the caller uses torch operations."""
    return blocks.device.type == "cpu" and dtype in (torch.float32, torch.bfloat16)


def decode(
    blocks: Tensor, scale: Tensor, offset: Tensor, bits: int, zero: int, codes_at: int, dtype: torch.dtype
) -> Tensor:
    """Dense [O, 32 G] of blocks uint8 [O, G, bytes] with scale and offset float32 [O, G]."""
    rows, groups, _ = blocks.shape
    out = torch.empty(rows, groups * _GROUP, dtype=dtype)
    raw, s, o = blocks.numpy(), scale.contiguous().numpy(), offset.detach().contiguous().numpy()
    threads = torch.get_num_threads()
    set_num_threads(min(threads, _MOST_THREADS))
    half = dtype == torch.bfloat16
    _KERNELS[bits, half](raw, s, o, zero, codes_at, (out.view(torch.uint16) if half else out).numpy())
    if (
        torch.get_num_threads() != threads
    ):  # numba's first call starts its threads and sets OpenMP's number for torch too
        torch.set_num_threads(threads)
    return out


@njit(inline="always")
def _block4(raw, r, g, at, s, o, zero, w):
    for j in range(16):
        byte = raw[r, g, at + j]
        w[j] = s * np.float32(np.int32(byte & 15) - zero) + o
        w[16 + j] = s * np.float32(np.int32(byte >> 4) - zero) + o


@njit(inline="always")
def _block5(raw, r, g, at, s, o, zero, w):
    high = np.uint32(raw[r, g, at]) | np.uint32(raw[r, g, at + 1]) << np.uint32(8)
    high |= np.uint32(raw[r, g, at + 2]) << np.uint32(16) | np.uint32(raw[r, g, at + 3]) << np.uint32(24)
    for j in range(16):
        byte = raw[r, g, at + 4 + j]
        low_code = np.int32(byte & 15) | np.int32((high >> np.uint32(j)) & np.uint32(1)) << 4
        high_code = np.int32(byte >> 4) | np.int32((high >> np.uint32(j + 16)) & np.uint32(1)) << 4
        w[j] = s * np.float32(low_code - zero) + o
        w[16 + j] = s * np.float32(high_code - zero) + o


@njit(inline="always")
def _block8(raw, r, g, at, s, o, zero, w):  # noqa: ARG001 (one signature for all)
    for j in range(32):
        w[j] = s * np.float32(np.int8(raw[r, g, at + j])) + o


@njit(inline="always")
def _round(bits, r, g, out):
    for j in range(32):
        u = bits[j]
        if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # not a number, and must stay so
            u = np.uint32(0x7FC00000)
        u += np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
        out[r, g * 32 + j] = np.uint16(u >> np.uint32(16))


@njit(parallel=True, cache=True)
def _q4_float32(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block4(raw, r, g, at, scale[r, g], offset[r, g], zero, out[r, g * 32 : g * 32 + 32])


@njit(parallel=True, cache=True)
def _q4_bfloat16(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        w = np.empty(32, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block4(raw, r, g, at, scale[r, g], offset[r, g], zero, w)
            _round(bits, r, g, out)


@njit(parallel=True, cache=True)
def _q5_float32(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block5(raw, r, g, at, scale[r, g], offset[r, g], zero, out[r, g * 32 : g * 32 + 32])


@njit(parallel=True, cache=True)
def _q5_bfloat16(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        w = np.empty(32, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block5(raw, r, g, at, scale[r, g], offset[r, g], zero, w)
            _round(bits, r, g, out)


@njit(parallel=True, cache=True)
def _q8_float32(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block8(raw, r, g, at, scale[r, g], offset[r, g], zero, out[r, g * 32 : g * 32 + 32])


@njit(parallel=True, cache=True)
def _q8_bfloat16(raw, scale, offset, zero, at, out):
    for r in prange(raw.shape[0]):
        w = np.empty(32, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block8(raw, r, g, at, scale[r, g], offset[r, g], zero, w)
            _round(bits, r, g, out)


_KERNELS = {  # (bits of a code, whether the result is bfloat16)
    (4, False): _q4_float32,
    (4, True): _q4_bfloat16,
    (5, False): _q5_float32,
    (5, True): _q5_bfloat16,
    (8, False): _q8_float32,
    (8, True): _q8_bfloat16,
}
