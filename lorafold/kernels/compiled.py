"""What the compiled kernels share: threads, memory, a cache that is forgotten in time, torch's rounding to bfloat16."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from pathlib import Path
from time import time as now
from typing import Any

import numpy as np
import torch
from numba import config, njit, set_num_threads
from torch import Tensor

_MOST_THREADS: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]


def forget_stale(package: Path) -> None:
    """Remove what numba has remembered of kernels and is older than code that they may have been compiled from.

    numba compares the file of the kernel itself, not those of the functions that it calls.
    """
    sources = [*package.glob("kernels/*.py"), *package.glob("quant/vectors.py")]
    changed = [path.stat().st_mtime for path in sources]
    newest = max((time for time in changed if time <= now()), default=0.0)  # a clock that was wrong costs no more
    for index in package.glob("*/__pycache__/*.nbi"):
        with contextlib.suppress(OSError):  # another process was faster, or nothing may be changed here
            if index.stat().st_mtime < newest:
                index.unlink()


forget_stale(Path(__file__).parents[1])


def on_torch_threads(kernel: Callable[..., None], *arguments: Any) -> None:
    """Run a parallel kernel on as many threads as torch uses."""
    threads = torch.get_num_threads()
    set_num_threads(min(threads, _MOST_THREADS))
    kernel(*arguments)
    if torch.get_num_threads() != threads:  # numba's first call sets OpenMP's number for torch too
        torch.set_num_threads(threads)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like torch.empty, on a CPU, but asked for without an alignment and aligned by hand.

    glibc before 2.38 hardly finds a freed piece again for what asks for one as torch does, so that the heap grows by
    everything that a layer forgets.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    held = np.empty(count * dtype.itemsize + 64, np.uint8)
    at = -held.ctypes.data % 64
    return torch.frombuffer(held, dtype=dtype, count=count, offset=at).resize_(shape)  # no view, which autograd guards


class _Kept(threading.local):
    rooms = torch.empty(0)


_kept = _Kept()


def workspace(floats: int) -> np.ndarray:
    """Memory for the threads of a kernel, reused by the next: float32 [threads, `floats` or more], aligned."""
    threads, floats = torch.get_num_threads(), -(-floats // 16) * 16
    if len(_kept.rooms) != threads or _kept.rooms.shape[1] < floats:
        _kept.rooms = torch.empty(threads, floats, dtype=torch.float32)
    assert _kept.rooms.data_ptr() % 64 == 0
    return _kept.rooms.numpy()


@njit(inline="always")
def address(x, row, column):
    """Where a number of a contiguous array of two dimensions stands."""
    return x.ctypes.data + x.itemsize * (row * x.shape[1] + column)


@njit(inline="always")
def round_bfloat16(bits, out):
    """Round float32 numbers, given as uint32, to bfloat16 as torch does: nearest, ties to even, NaN stays NaN."""
    for j in range(len(bits)):
        u = bits[j]
        if (u & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):  # not a number, and must stay so
            u = np.uint32(0x7FC00000)
        u += np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))
        out[j] = np.uint16(u >> np.uint32(16))
