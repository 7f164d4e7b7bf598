"""What glibc does with memory that is freed, where there is glibc."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


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
