"""Products with a weight that was just decoded, X W^T and dY W in bfloat16, on processors with matrix tiles.

A low-rank branch adds  E F  to such a product: a few more steps of the same sum, where a product of its own would read
and write all of Y again.

Torch's library uses one of two threads for some shapes that training meets all the time (576 columns and 576 to
1,280 rows, for one), and compiles and keeps a kernel for every number of rows. Here the threads share the columns: each
lays out its part of the weight once and passes all rows by it.
"""

# X [M, K], W [N, K] or [K, N], Y [M, N]; of a branch E [M, R] and F [N, R] or [R, N]

from __future__ import annotations

import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from lorafold.kernels.compiled import on_torch_threads
from lorafold.kernels.tiles import SETTINGS, configure, lay, release, round_row, supported, two_panels, workspace

_FEWEST_ROWS = 64
_GROUP = 4  # panels of the weight that the same rows of X pass, and whose results are written at once
_CHUNK_BYTES = 1 << 20  # of X, read again and again from the cache


@njit(parallel=True, cache=True)
def _multiply(x, m, k, weight, stride, transposed, n, e, r, f, f_stride, chunk, rooms, settings, y):
    threads = rooms.shape[0]
    for thread in prange(threads):
        first, last = n // 32 * thread // threads, n // 32 * (thread + 1) // threads
        sums = rooms[thread].ctypes.data
        tiles = sums + 4096 * _GROUP
        configure(settings)
        for j in range(first, last):
            laid = tiles + 64 * (k + r) * (j - first)
            lay(weight, stride, transposed, j, k, laid)
            lay(f, f_stride, transposed, j, r, laid + 64 * k)
        for start in range(0, m, chunk):
            for j in range(first, last, _GROUP):
                width = min(_GROUP, last - j)
                for i in range(start, min(start + chunk, m), 32):
                    for p in range(width):
                        laid = tiles + 64 * (k + r) * (j - first + p)
                        two_panels(
                            x + 2 * k * i,
                            2 * k,
                            laid,
                            k // 32,
                            e + 2 * r * i,
                            2 * r,
                            laid + 64 * k,
                            r // 32,
                            sums + 128 * p,
                            128 * _GROUP,
                        )
                    for row in range(32):
                        for p in range(width):
                            round_row(sums + 128 * (_GROUP * row + p), y + 2 * n * (i + row) + 64 * (j + p))
        release()


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` covers a product of these types and sizes."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    return fits and not any(n % 32 for n in weight.shape) and x.numel() >= _FEWEST_ROWS * x.shape[-1] and supported()


def multiply(x: Tensor, weight: Tensor, transposed: bool, branch: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """X W^T (`transposed`; weight [N, K]) or X W (weight [K, N]) for X [..., K] -> [..., N]; for what is `usable`.

    Args:
        branch: E [M, R] and F [N, R] (`transposed`) or [R, N]; E F^T or E F is added.
    """
    assert supported()  # which also asks the system for the tiles
    n, k = weight.shape if transposed else weight.shape[::-1]
    rows, weight = _padded(x.detach().reshape(-1, k)), weight.contiguous()
    e, f = (_padded(part.detach()) for part in branch) if branch else (rows[:, :0], weight[:0])
    y, r = weight.new_empty(len(rows), n), e.shape[1]
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
        e.data_ptr(),
        r,
        f.data_ptr(),
        2 * f.shape[1],
        max(1, _CHUNK_BYTES // (64 * k)) * 32,
        workspace(1024 * _GROUP + 16 * (k + r) * -(-n // 32 // threads)),
        SETTINGS.ctypes.data,
        y.data_ptr(),
    )
    return y[: x.numel() // k].view(*x.shape[:-1], n)


def _padded(matrix: Tensor) -> Tensor:
    """With zeros, up to multiples of 32 both ways."""
    rows, columns = (-n % 32 for n in matrix.shape)
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix.contiguous()
