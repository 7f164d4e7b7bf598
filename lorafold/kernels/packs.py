"""What the attention kernels share: the segments of a pack as compiled code reads them, and tables of angles."""

# T tokens, H query heads, K key heads, D head width

from __future__ import annotations

import threading

import numpy as np
from numba import njit
from torch import Tensor


@njit(cache=True)
def path_of(segment, pack):
    """The segments of a path, and their tokens."""
    _starts, lengths, path_at, paths = pack
    path, tokens = paths[path_at[segment] : path_at[segment + 1]], 0
    for s in path:
        tokens += lengths[s]
    return path, tokens


@njit(cache=True)
def columns(qkv, width, head, heads):
    """How many query heads share one of `heads` key heads, and the columns where that one's keys and values begin."""
    group = qkv.shape[1] // width // heads - 2
    key = (group * heads + head) * width
    return group, key, key + heads * width


class Layout:
    """The segments of a pack as the kernels read them.

    Args:
        segments: lengths of the segments.
        paths: for each segment its ancestors, the oldest first, and itself.
        key_heads: K.

    Attributes:
        key_heads, paths: as given.
        seen: tokens of each path.
        pack: starts and lengths of the segments, where the path of each begins in a list of all paths, and that list.
        tasks: a segment and a key head, those with most to compute first.
        longest, longest_path: tokens of the longest segment, and of the longest path.
    """

    def __init__(self, segments: list[int], paths: list[list[int]], key_heads: int):
        lengths = np.array(segments, np.int64)
        starts = np.cumsum(lengths) - lengths
        path_at = np.cumsum([0, *map(len, paths)])
        self.key_heads, self.paths = key_heads, paths
        self.pack = (starts, lengths, path_at, np.array([i for path in paths for i in path], np.int64))
        self.seen = [sum(segments[i] for i in path) for path in paths]
        largest_first = sorted(range(len(paths)), key=lambda i: -segments[i] * self.seen[i])
        self.tasks = np.array([(i, head) for i in largest_first for head in range(key_heads)], np.int64)
        self.longest_path, self.longest = max(self.seen), max(segments)


class _Tables(threading.local):
    """The tables of the last angles: all layers of a pack ask for the same."""

    angles: tuple[Tensor, ...] = ()
    made: tuple[np.ndarray, ...] = ()


_kept = _Tables()


def _identity(x: Tensor) -> tuple[object, ...]:
    """What tells a tensor that is alive from others, and from itself before it was changed."""
    return x.data_ptr(), x.shape, x.stride(), 0 if x.is_inference() else x._version


def rotation_tables(cos: Tensor, sin: Tensor) -> tuple[np.ndarray, ...]:
    """What a rotation multiplies with, and its transpose."""
    kept = _kept
    if [_identity(x) for x in kept.angles] != [_identity(cos), _identity(sin)]:
        wide, turned = sin.float().contiguous(), -sin.float().roll(sin.shape[1] // 2, dims=-1)
        kept.angles = (cos, sin)  # held, so that no other tensor can lie in their place
        kept.made = (cos.float().contiguous().numpy(), wide.numpy(), turned.numpy())
    return kept.made
