"""Products with a weight that was just decoded, X W^T and dY W in bfloat16, on processors with matrix tiles.

A low-rank branch adds  E F  to such a product: a few more steps of the same sum, where a product of its own would read
and write all of Y again.

Torch's library uses one of two threads for some shapes that training meets all the time (576 columns and 576 to
1,280 rows, for one), and compiles and keeps a kernel for every number of rows. Here the threads share the columns: each
lays out as much of its part of the weight as its cache holds and passes all rows by it. While tiles multiply, the sums
before them are rounded and the rows after them are fetched, which otherwise takes as long again.
"""

# X [M, K], W [N, K] or [K, N], Y [M, N]; of a branch E [M, R] and F [N, R] or [R, N]; C = P^T D, P [T, G], D [T, N]

from __future__ import annotations

import torch
from numba import njit, prange
from torch import Tensor
from torch.nn import functional as F

from lorafold.kernels.compiled import empty, on_torch_threads, workspace
from lorafold.kernels.tiles import (
    SETTINGS,
    add_half_panel,
    configure,
    lay,
    panel_while_moving,
    release,
    round_row,
    supported,
)

_FEWEST_ROWS = 64
_LAID_ROWS = 256  # of D: 16 KiB a panel
_LAID_BYTES = 1 << 20  # of the weight, that all rows of X pass: what a core's own cache holds


@njit(parallel=True, cache=True)
def _multiply(x, m, k, weight, stride, transposed, n, e, r, f, f_stride, group, rooms, settings, y):
    threads, laid_bytes, panels = rooms.shape[0], 64 * (k + r), n // 32
    by_rows = panels < threads
    for thread in prange(threads):
        first, last = (0, panels) if by_rows else (panels * thread // threads, panels * (thread + 1) // threads)
        top, bottom = (m // 32 * thread // threads * 32, m // 32 * (thread + 1) // threads * 32) if by_rows else (0, m)
        sums, done = rooms[thread].ctypes.data, rooms[thread].ctypes.data + 4096
        tiles, target = done + 4096, 0
        configure(settings)
        for begin in range(first, last, group):
            width = min(group, last - begin)
            for p in range(width):
                lay(weight, stride, transposed, begin + p, k, tiles + laid_bytes * p)
                lay(f, f_stride, transposed, begin + p, r, tiles + laid_bytes * p + 64 * k)
            for i in range(top, bottom, 32):
                for p in range(width):
                    laid = tiles + laid_bytes * p
                    panel_while_moving(
                        x + 2 * k * i,
                        2 * k,
                        laid,
                        k // 32,
                        e + 2 * r * i,
                        2 * r,
                        laid + 64 * k,
                        r // 32,
                        sums,
                        done,
                        target,
                        2 * n,
                        32 * p // width,
                        32 * (p + 1) // width,
                    )
                    sums, done, target = done, sums, y + 2 * n * i + 64 * (begin + p)
        for row in range(32 if target else 0):
            round_row(done + 128 * row, target + 2 * n * row)
        release()


@njit(parallel=True, cache=True)
def _cross(p, g, d, t, n, rooms, settings, c):
    threads = rooms.shape[0]
    for thread in prange(threads):
        laid = rooms[thread].ctypes.data
        configure(settings)
        for start in range(0, t, _LAID_ROWS):
            rows = min(_LAID_ROWS, t - start)
            for j in range(n // 32 * thread // threads, n // 32 * (thread + 1) // threads):
                lay(d + 2 * n * start, 2 * n, False, j, rows, laid)
                for i in range(0, g, 16):
                    target = c + 4 * (n * i + 32 * j)
                    add_half_panel(p + 2 * (t * i + start), 2 * t, laid, rows // 32, start > 0, target, 4 * n)
        release()


def usable(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` covers a product of these types and sizes."""
    fits = x.device.type == "cpu" and x.dtype == weight.dtype == torch.bfloat16
    return fits and not any(n % 32 for n in weight.shape) and x.numel() >= _FEWEST_ROWS * x.shape[-1] and supported()


def crosses(p: Tensor, d: Tensor) -> bool:
    """Whether `cross` covers a product of these types and sizes."""
    fits = d.device.type == "cpu" and p.dtype == d.dtype == torch.bfloat16
    return fits and d.shape[1] % 32 == 0 and len(d) >= _FEWEST_ROWS and supported()


def multiply(
    x: Tensor,
    weight: Tensor,
    transposed: bool,
    branch: tuple[Tensor, Tensor] | None = None,
    room: Tensor | None = None,
) -> Tensor:
    """X W^T (`transposed`; weight [N, K]) or X W (weight [K, N]) for X [..., K] -> [..., N]; for what is `usable`.

    Args:
        branch: E [M, R] and F [N, R] (`transposed`) or [R, N]; E F^T or E F is added.
        room: as many numbers as the result has with M rounded up to 32, contiguous, which it is put into.
    """
    assert supported()  # which also asks the system for the tiles
    n, k = weight.shape if transposed else weight.shape[::-1]
    rows, weight = _padded(x.detach().reshape(-1, k)), weight.contiguous()
    e, f = (_padded(part.detach()) for part in branch) if branch else (rows[:, :0], weight[:0])
    y, r = empty(len(rows), n, dtype=x.dtype) if room is None else room.view(len(rows), n), e.shape[1]
    group = max(1, min(n // 32, _LAID_BYTES // (64 * (k + r))))
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
        group,
        workspace(2048 + 16 * (k + r) * group),
        SETTINGS.ctypes.data,
        y.data_ptr(),
    )
    return y[: x.numel() // k].view(*x.shape[:-1], n)


def cross(p: Tensor, d: Tensor) -> Tensor:
    """P^T D float32 [G, N] for P [T, G] and D [T, N] that `crosses` covers."""
    assert supported()
    (t, n), g = d.shape, p.shape[1]
    d = _padded(d.detach())
    p = F.pad(p.detach().t(), (0, len(d) - t, 0, -g % 16)).contiguous()
    c = torch.empty(len(p), n, dtype=torch.float32)
    rooms = workspace(16 * _LAID_ROWS)
    on_torch_threads(_cross, p.data_ptr(), len(p), d.data_ptr(), len(d), n, rooms, SETTINGS.ctypes.data, c.data_ptr())
    return c[:g]


def _padded(matrix: Tensor) -> Tensor:
    """With zeros, up to multiples of 32 both ways."""
    rows, columns = (-n % 32 for n in matrix.shape)
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix.contiguous()
