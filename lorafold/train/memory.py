"""Memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def resident_bytes() -> int:
    """Memory in use now: the resident set, or what is allocated on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: not Linux
        return peak_bytes()


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step, rather than return it and meet page faults when it is used again.

    Tensors up to 32 MiB come from the heap then, larger ones are mapped.
    """
    _tune_malloc(mmap_threshold=32 << 20, trim_threshold=(1 << 31) - 1)


def free_at_once() -> None:
    """Let glibc map all but small tensors and unmap them when they are freed: slower, and nothing lies about in pieces.

    glibc before 2.38 does not find a freed piece again for the aligned memory that torch asks for.
    """
    _tune_malloc(mmap_threshold=256 << 10, trim_threshold=128 << 10)
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _tune_malloc(mmap_threshold: int, trim_threshold: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, mmap_threshold)
        libc.mallopt(_M_TRIM_THRESHOLD, trim_threshold)


def restart_peak() -> None:
    """Let `peak_bytes` count from now on, where the system can (Linux, CUDA): several runs may share a process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """Largest resident set of the process since `restart_peak`; on a GPU the most that was allocated there."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
