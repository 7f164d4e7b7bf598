"""Decoding on a CPU at memory speed: numba kernels beside the torch oracle in `ggml.py` and `kquants.py`.

A block is decoded to float32 in cache and then copied, or rounded to bfloat16 (nearest, ties to even, as
torch does). Compiled code is cached on disk, for which each kernel must be a function of its own.
"""

# raw uint8 [O, B, bytes], scale and offset float32 [O, G], out [O, I]; w float32 [32] or [256] is one decoded block

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lorafold.kernels.compiled import on_torch_threads, round_bfloat16
from lorafold.quant import vectors
from lorafold.quant.vectors import IQ4_NL_VALUES, NF4_VALUES

INT8_STEP = 7.874015718698502e-3  # 1 / 127, as bitsandbytes writes it


def usable(name: str, blocks: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel covers this case of the format `name`; otherwise the caller uses torch operations."""
    return (
        (name in _KERNELS or name.startswith("MLX"))
        and blocks.device.type == "cpu"
        and dtype in (torch.float32, torch.bfloat16)
    )


def decode(
    name: str, blocks: Tensor, scale: Tensor | None, offset: Tensor, dtype: torch.dtype, room: Tensor | None = None
) -> Tensor:
    """Dense [O, I] of blocks uint8 [O, B, bytes] of the format `name`, with scale and offset float32 [O, G].

    The scale may be None where the kernel `reads_scale`. `room`, O I numbers in `dtype` or more, takes the result.
    """
    exact, rounded, weights, *arguments = _KERNELS[name] if name in _KERNELS else _mlx_kernels(name)
    shape = blocks.shape[0], blocks.shape[1] * weights
    out = torch.empty(shape, dtype=dtype) if room is None else room[: shape[0] * shape[1]].view(shape)
    s = _NO_SCALES if scale is None else scale.detach().contiguous().numpy()
    raw, o = blocks.contiguous().numpy(), offset.detach().contiguous().numpy()
    if (found := vectors.covering(name, dtype)) is not None:
        kernel, table, at = found
        on_torch_threads(
            kernel, raw, s, o, table, at, (out if dtype == torch.float32 else out.view(torch.uint16)).numpy()
        )
    elif dtype == torch.bfloat16:
        on_torch_threads(rounded, raw, s, o, *arguments, out.view(torch.uint16).numpy())
    else:
        on_torch_threads(exact, raw, s, o, *arguments, out.numpy())
    return out


def reads_scale(name: str, dtype: torch.dtype) -> bool:
    """Whether the kernel takes the scales out of the blocks itself."""
    found = vectors.covering(name, dtype)
    return found is not None and found[0] is vectors.groups


def six_bit_parameters(blocks: Tensor, d: Tensor, dmin: Tensor) -> tuple[Tensor, Tensor]:
    """Scales d sc and offsets -dmin m [O, 8 B] of Q4_K or Q5_K blocks uint8 [O, B, bytes]; d and dmin [O, B]."""
    scale, offset = (d.new_empty(blocks.shape[0], 8 * blocks.shape[1]) for _ in range(2))
    on_torch_threads(_six_bit, blocks.numpy(), d.numpy(), dmin.numpy(), scale.numpy(), offset.numpy())
    return scale, offset


@njit(parallel=True, cache=True)
def _six_bit(raw, d, dmin, scale, offset):
    for r in prange(raw.shape[0]):
        for b in range(raw.shape[1]):
            for i in range(4):
                a, m, c, g = raw[r, b, 4 + i], raw[r, b, 8 + i], raw[r, b, 12 + i], 8 * b + i
                scale[r, g] = d[r, b] * np.float32(a & 63)
                scale[r, g + 4] = d[r, b] * np.float32((c & 15) | ((a >> 2) & 48))
                offset[r, g] = -(dmin[r, b] * np.float32(m & 63))
                offset[r, g + 4] = -(dmin[r, b] * np.float32((c >> 4) | ((m >> 2) & 48)))


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
            round_bfloat16(bits, out[r, g * 32 : g * 32 + 32])


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
            round_bfloat16(bits, out[r, g * 32 : g * 32 + 32])


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
            round_bfloat16(bits, out[r, g * 32 : g * 32 + 32])


@njit(inline="always")
def _block2k(raw, s, o, w):
    for h in range(2):
        for j in range(32):
            byte, g = raw[16 + 32 * h + j], 8 * h + j // 16
            for k in range(4):
                w[128 * h + 32 * k + j] = s[g + 2 * k] * np.float32((byte >> (2 * k)) & 3) + o[g + 2 * k]


@njit(inline="always")
def _block3k(raw, s, o, w):
    for h in range(2):
        for j in range(32):
            byte, high, g = raw[32 + 32 * h + j], raw[j] >> (4 * h), 8 * h + j // 16
            for k in range(4):
                code = np.int32((byte >> (2 * k)) & 3) + (np.int32((high >> k) & 1) << 2) - 4
                w[128 * h + 32 * k + j] = s[g + 2 * k] * np.float32(code) + o[g + 2 * k]


@njit(inline="always")
def _block4k(raw, s, o, w):
    for c in range(4):
        for j in range(32):
            byte = raw[16 + 32 * c + j]
            w[64 * c + j] = s[2 * c] * np.float32(byte & 15) + o[2 * c]
            w[64 * c + 32 + j] = s[2 * c + 1] * np.float32(byte >> 4) + o[2 * c + 1]


@njit(inline="always")
def _block5k(raw, s, o, w):
    for c in range(4):
        for j in range(32):
            byte, high = raw[48 + 32 * c + j], raw[16 + j] >> (2 * c)
            low_code, high_code = (byte & 15) | ((high & 1) << 4), (byte >> 4) | ((high & 2) << 3)
            w[64 * c + j] = s[2 * c] * np.float32(low_code) + o[2 * c]
            w[64 * c + 32 + j] = s[2 * c + 1] * np.float32(high_code) + o[2 * c + 1]


@njit(inline="always")
def _block6k(raw, s, o, w):
    for h in range(2):
        for j in range(32):
            first, second, high, g = raw[64 * h + j], raw[64 * h + 32 + j], raw[128 + 32 * h + j], 8 * h + j // 16
            at = 128 * h + j
            w[at] = s[g] * np.float32(np.int32((first & 15) | ((high & 3) << 4)) - 32) + o[g]
            w[at + 32] = s[g + 2] * np.float32(np.int32((second & 15) | ((high & 12) << 2)) - 32) + o[g + 2]
            w[at + 64] = s[g + 4] * np.float32(np.int32((first >> 4) | (high & 48)) - 32) + o[g + 4]
            w[at + 96] = s[g + 6] * np.float32(np.int32((second >> 4) | ((high & 192) >> 2)) - 32) + o[g + 6]


@njit(inline="always")
def _block4nl(raw, r, g, values, s, o, w):
    for j in range(16):
        byte = raw[r, g, 2 + j]
        w[j] = s * values[byte & 15] + o
        w[16 + j] = s * values[byte >> 4] + o


@njit(parallel=True, cache=True)
def _iq4nl_float32(raw, scale, offset, values, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block4nl(raw, r, g, values, scale[r, g], offset[r, g], out[r, g * 32 : g * 32 + 32])


@njit(parallel=True, cache=True)
def _iq4nl_bfloat16(raw, scale, offset, values, out):
    for r in prange(raw.shape[0]):
        w = np.empty(32, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block4nl(raw, r, g, values, scale[r, g], offset[r, g], w)
            round_bfloat16(bits, out[r, g * 32 : g * 32 + 32])


@njit(inline="always")
def _block_k(bits, raw, s, o, w):
    if bits == 2:
        _block2k(raw, s, o, w)
    elif bits == 3:
        _block3k(raw, s, o, w)
    elif bits == 4:
        _block4k(raw, s, o, w)
    elif bits == 5:
        _block5k(raw, s, o, w)
    else:
        _block6k(raw, s, o, w)


@njit(parallel=True, cache=True)
def _k_float32(raw, scale, offset, bits, n, out):
    for r in prange(raw.shape[0]):
        for b in range(raw.shape[1]):
            g = slice(n * b, n * b + n)
            _block_k(bits, raw[r, b], scale[r, g], offset[r, g], out[r, 256 * b : 256 * b + 256])


@njit(parallel=True, cache=True)
def _k_bfloat16(raw, scale, offset, bits, n, out):
    for r in prange(raw.shape[0]):
        w = np.empty(256, np.float32)
        u = w.view(np.uint32)
        for b in range(raw.shape[1]):
            g = slice(n * b, n * b + n)
            _block_k(bits, raw[r, b], scale[r, g], offset[r, g], w)
            round_bfloat16(u, out[r, 256 * b : 256 * b + 256])


@njit(inline="always")
def _block_mlx4(raw, r, g, at, s, o, w):
    for j in range(raw.shape[2] - at):
        byte = raw[r, g, at + j]
        w[2 * j] = s * np.float32(byte & 15) + o
        w[2 * j + 1] = s * np.float32(byte >> 4) + o


@njit(inline="always")
def _block_mlx(raw, r, g, at, bits, s, o, w):
    mask = np.uint64((1 << bits) - 1)
    for chunk in range(len(w) // 8):
        word = np.uint64(0)
        for j in range(bits):
            word |= np.uint64(raw[r, g, at + bits * chunk + j]) << np.uint64(8 * j)
        for j in range(8):
            w[8 * chunk + j] = s * np.float32((word >> np.uint64(bits * j)) & mask) + o


@njit(parallel=True, cache=True)
def _mlx4_float32(raw, scale, offset, at, n, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block_mlx4(raw, r, g, at, scale[r, g], offset[r, g], out[r, n * g : n * g + n])


@njit(parallel=True, cache=True)
def _mlx4_bfloat16(raw, scale, offset, at, n, out):
    for r in prange(raw.shape[0]):
        w = np.empty(n, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block_mlx4(raw, r, g, at, scale[r, g], offset[r, g], w)
            round_bfloat16(bits, out[r, n * g : n * g + n])


@njit(parallel=True, cache=True)
def _mlx_float32(raw, scale, offset, at, n, width, out):
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block_mlx(raw, r, g, at, width, scale[r, g], offset[r, g], out[r, n * g : n * g + n])


@njit(parallel=True, cache=True)
def _mlx_bfloat16(raw, scale, offset, at, n, width, out):
    for r in prange(raw.shape[0]):
        w = np.empty(n, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block_mlx(raw, r, g, at, width, scale[r, g], offset[r, g], w)
            round_bfloat16(bits, out[r, n * g : n * g + n])


def _mlx_kernels(name: str) -> tuple:
    """The row of `_KERNELS` for one of MLX's combinations, such as MLX4-G64-BF16."""
    bits, group, stored = name.removeprefix("MLX").split("-")
    n, at = int(group[1:]), 8 if stored == "F32" else 4
    if bits == "4":
        return _mlx4_float32, _mlx4_bfloat16, n, at, n
    return _mlx_float32, _mlx_bfloat16, n, at, n, int(bits)


@njit(inline="always")
def _block_nf4(raw, s, at, values, w):
    for j in range(32):
        byte = raw[at + j]
        w[2 * j] = values[byte >> 4] * s
        w[2 * j + 1] = values[byte & 15] * s


@njit(parallel=True, cache=True)
def _nf4_float32(raw, scale, offset, at, values, out):  # noqa: ARG001 (one signature for all)
    for r in prange(raw.shape[0]):
        for g in range(raw.shape[1]):
            _block_nf4(raw[r, g], scale[r, g], at, values, out[r, g * 64 : g * 64 + 64])


@njit(parallel=True, cache=True)
def _nf4_bfloat16(raw, scale, offset, at, values, out):  # noqa: ARG001
    for r in prange(raw.shape[0]):
        w = np.empty(64, np.float32)
        bits = w.view(np.uint32)
        for g in range(raw.shape[1]):
            _block_nf4(raw[r, g], scale[r, g], at, values, w)
            round_bfloat16(bits, out[r, g * 64 : g * 64 + 64])


_KERNELS = {  # format -> kernels for float32 and bfloat16, weights of a block, and what else they take
    "Q4_0": (_q4_float32, _q4_bfloat16, 32, 8, 2),  # the code of zero, and the byte at which codes begin
    "Q4_1": (_q4_float32, _q4_bfloat16, 32, 0, 4),
    "Q5_0": (_q5_float32, _q5_bfloat16, 32, 16, 2),
    "Q5_1": (_q5_float32, _q5_bfloat16, 32, 0, 4),
    "Q8_0": (_q8_float32, _q8_bfloat16, 32, 0, 2),
    "IQ4_NL": (_iq4nl_float32, _iq4nl_bfloat16, 32, np.array(IQ4_NL_VALUES, np.float32)),
    "NF4": (_nf4_float32, _nf4_bfloat16, 64, 4, np.array(NF4_VALUES, np.float32)),
    "NF4-DQ": (_nf4_float32, _nf4_bfloat16, 64, 1, np.array(NF4_VALUES, np.float32)),
    "Q2_K": (_k_float32, _k_bfloat16, 256, 2, 16),  # bits of a code, and groups of a block
    "Q3_K": (_k_float32, _k_bfloat16, 256, 3, 16),
    "Q4_K": (_k_float32, _k_bfloat16, 256, 4, 8),
    "Q5_K": (_k_float32, _k_bfloat16, 256, 5, 8),
    "Q6_K": (_k_float32, _k_bfloat16, 256, 6, 16),
}
_NO_SCALES = np.empty((0, 0), np.float32)
