"""Memory of this process."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch


def resident_bytes() -> int:
    """Memory in use now: the resident set, or what is allocated on the GPU where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.memory_allocated()
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: not Linux
        return peak_bytes()


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
