"""Products with a weight that was just decoded, X W^T and dY W in bfloat16, on processors with matrix tiles.

Torch's library uses one of two threads for some shapes that training meets all the time (576 columns and 576 to
1,280 rows, for one), and compiles and keeps a kernel for every number of rows. Here the threads share the columns: each
lays out its part of the weight once and passes all rows by it.
"""

# X [M, K], W [N, K] or [K, N], Y [M, N]

from __future__ import annotations

import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from lorafold.kernels.compiled import on_torch_threads
from lorafold.kernels.tiles import SETTINGS, configure, lay, panel, release, round_row, supported, workspace

_FEWEST_ROWS = 64
_GROUP = 4  # panels of the weight that the same rows of X pass, and whose results are written at once
_CHUNK_BYTES = 1 << 20  # of X, read again and again from the cache


@njit(parallel=True, cache=True)
def _multiply(x, m, k, weight, stride, transposed, n, chunk, rooms, settings, y):
    threads = rooms.shape[0]
    for thread in prange(threads):
        first, last = n // 32 * thread // threads, n // 32 * (thread + 1) // threads
        sums = rooms[thread].ctypes.data
        tiles = sums + 4096 * _GROUP
        configure(settings)
        for j in range(first, last):
            lay(weight, stride, transposed, j, k, tiles + 64 * k * (j - first))
        for start in range(0, m, chunk):
            for j in range(first, last, _GROUP):
                width = min(_GROUP, last - j)
                for i in range(start, min(start + chunk, m), 32):
                    for p in range(width):
                        laid = tiles + 64 * k * (j - first + p)
                        panel(x + 2 * k * i, 2 * k, laid, k // 32, sums + 128 * p, 128 * _GROUP)
                    for r in range(32):
                        for p in range(width):
                            round_row(sums + 128 * (_GROUP * r + p), y + 2 * n * (i + r) + 64 * (j + p))
        release()


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` covers a product of these types and sizes."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    return fits and not any(n % 32 for n in weight.shape) and x.numel() >= _FEWEST_ROWS * x.shape[-1] and supported()


def multiply(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """X W^T (`transposed`; weight [N, K]) or X W (weight [K, N]) for X [..., K] -> [..., N]; for what is `usable`."""
    assert supported()  # which also asks the system for the tiles
    n, k = weight.shape if transposed else weight.shape[::-1]
    rows, weight = x.detach().reshape(-1, k).contiguous(), weight.contiguous()
    m = len(rows)
    if m % 32:
        rows = F.pad(rows, (0, 0, 0, -m % 32))
    y = weight.new_empty(len(rows), n)
    threads = torch.get_num_threads()
    on_torch_threads(
        _multiply,
        rows.data_ptr(),
        len(rows),
        k,
        weight.data_ptr(),
        2 * weight.shape[1],
        transposed,
        n,
        max(1, _CHUNK_BYTES // (64 * k)) * 32,
        workspace(1024 * _GROUP + 16 * k * -(-n // 32 // threads)),
        SETTINGS.ctypes.data,
        y.data_ptr(),
    )
    return y[:m].view(*x.shape[:-1], n)
