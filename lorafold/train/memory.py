"""Memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from pathlib import Path

import torch

_GROWTH = 1.15
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def resident_bytes() -> int:
    """Memory in use now: the resident set, or what is allocated on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: not Linux
        return peak_bytes()


class HeapTrimmer:
    """Gives freed memory back to the system when the resident set has grown, where the C library can (glibc).

    After a step half of the heap is free, in pieces that the next step, whose rows have other lengths, fits into badly:
    without this the peak of a run grows by half in fifty steps. Getting the pages again costs about a tenth of a step,
    so it is done only when the process is `_GROWTH` times as large as after the first step, which is every few steps.
    """

    def __init__(self) -> None:
        self._first: int | None = None
        if _TRIM is not None:
            _TRIM(0)  # what was done before leaves pieces too

    def after_step(self) -> None:
        """Trim if it is time."""
        if _TRIM is None or (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return
        now = resident_bytes()
        self._first = self._first or now
        if now > _GROWTH * self._first:
            _TRIM(0)


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
