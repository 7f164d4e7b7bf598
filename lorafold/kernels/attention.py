"""Causal attention over the segments of a pack on any processor: rotation, scores, softmax and sums in one pass.

A thread takes a segment and a key head, or one query head, at a time and keeps what it needs in its cache: some
queries, all keys that these see. Whatever the type of the rows, sums are float32. No attention weights are kept for the
backward pass, which computes them again (as in arXiv 2205.14135): memory grows with the tokens of the paths, not their
square. A key that is not finite makes the rows that see it undefined, such a value those of its segment, as in torch.
"""

# T tokens, H query heads, K key heads, D head width; a path is a segment after its ancestors, of N tokens rounded up
# to 48, which is whole panels of 16 and whole sixes

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lorafold.kernels import block
from lorafold.kernels.block import raw
from lorafold.kernels.compiled import address, empty, on_torch_threads, workspace
from lorafold.kernels.floats import ROWS, product
from lorafold.kernels.packs import Layout, columns, path_of, rotation_tables
from lorafold.kernels.rows import add_row, clear, rotate_row, scaled_row, softmax_backward_row, softmax_row, widen_row

_FLOAT = np.float32(0)  # the kind of rows between
_QUERIES = 36  # at a time, a multiple of 6
_MANY_TASKS = 24  # segments times key heads
_PARTS = 16  # of a pack whose segments see much in common, each with its own sums of gradients
_DEPTH = 256  # most keys of one product with values, which lie in the first cache


@njit(inline="always")
def _up(n, step):
    return (n + step - 1) // step * step


@njit(cache=True)
def _rotated(x, token, column, tables, out):
    """The head that begins at a column of x, rotated, goes to an address as float32."""
    cos, sin, _back = tables
    if len(cos) == 0:
        widen_row(x.dtype.type(0), address(x, token, column), cos.shape[1], out)
    else:
        angles = (address(cos, token, 0), address(sin, token, 0))
        rotate_row(x.dtype.type(0), _FLOAT, address(x, token, column), *angles, cos.shape[1], out)


@njit(cache=True)
def _rotated_back(sums, token, column, tables, out):
    """A row of float32 sums, rotated back, goes to a head of a token."""
    cos, _sin, back = tables
    if len(cos) == 0:
        scaled_row(out.dtype.type(0), sums, cos.shape[1], np.float32(1), address(out, token, column))
    else:
        angles = (address(cos, token, 0), address(back, token, 0))
        rotate_row(_FLOAT, out.dtype.type(0), sums, *angles, cos.shape[1], address(out, token, column))


@njit(cache=True)
def _gather(path, pack, x, column, tables, rotate, size, room, row, by_key, by_feature):
    """One head of a path's tokens, zeros after them, in panels: [size / 16, D, 16] and [D / 16, size, 16], if wanted.

    `row`, `by_key` and `by_feature` are places in the room; negative ones are not wanted.
    """
    (starts, lengths), base, width, n = pack[:2], room.ctypes.data, tables[0].shape[1], 0
    for to in (by_key, by_feature):
        if to >= 0:
            clear(base + 4 * to, 4 * size * width)
    for s in path:
        for token in range(starts[s], starts[s] + lengths[s]):
            if rotate:
                _rotated(x, token, column, tables, base + 4 * row)
            else:
                widen_row(x.dtype.type(0), address(x, token, column), width, base + 4 * row)
            if by_key >= 0:
                to = by_key + n // 16 * 16 * width + n % 16
                for d in range(width):
                    room[to + 16 * d] = room[row + d]
            if by_feature >= 0:
                for d in range(0, width, 16):
                    widen_row(_FLOAT, base + 4 * (row + d), 16, base + 4 * (by_feature + d * size + 16 * n))
            n += 1


@njit(cache=True)
def _mix(weights, stride, first, last, m, panels, size, width, sums):
    """m rows of weights, which begin at key `first`, times what belongs to the keys up to `last`: float32 [m, D]."""
    for k in range(first, last, _DEPTH):
        many = min(_DEPTH, last - k)
        begin = weights + 4 * (k - first)
        product(begin, stride, 4, m, panels + 64 * k, 64, 64 * size, width, many, sums, 4 * width, k > first)


@njit(cache=True)
def _attend(segment, first_head, each, heads, qkv, tables, pack, scale, window, room, out, found):
    """The outputs of one segment and `each` query heads that share a key head."""
    path, tokens = path_of(segment, pack)
    width, size = tables[0].shape[1], _up(tokens, 48)
    group = columns(qkv, width, 0, heads)[0]
    _, key, value = columns(qkv, width, first_head // group, heads)
    start, own, step = pack[0][segment], pack[1][segment], size * width
    stride, base = 4 * size + 64, room.ctypes.data  # rows of scores do not begin in the same line of the cache
    _gather(path, pack, qkv, key, tables, True, size, room, 2 * step, 0, -1)
    _gather(path, pack, qkv, value, tables, False, size, room, 2 * step, -1, step)
    keys, values, queries = base, base + 4 * step, base + 8 * step
    sums = queries + 4 * _QUERIES * width
    scores = sums + 4 * _QUERIES * width
    for h in range(first_head, first_head + each):
        for i in range(0, own, _QUERIES):
            rows, first = min(_QUERIES, own - i), tokens - own + i
            m, low, seen = _up(rows, ROWS), max(0, first + 1 - window) // 48 * 48, _up(first + rows, 16)
            for r in range(rows):
                _rotated(qkv, start + i + r, h * width, tables, queries + 4 * width * r)
            clear(queries + 4 * width * rows, 4 * width * (m - rows))
            begin = keys + 4 * low * width
            product(queries, 4 * width, 4, m, begin, 64, 64 * width, seen - low, width, scores, stride, False)
            for r in range(rows):
                here, at = first + r, scores + stride * r
                place = found.ctypes.data + 8 * (h * found.shape[1] + start + i + r)
                softmax_row(_FLOAT, at, seen - low, max(0, here + 1 - window) - low, here - low, scale, at, place)
            _mix(scores, stride, low, seen, m, values, size, width, sums)
            for r in range(rows):
                token = start + i + r
                place = address(out, token, h * width)
                scaled_row(out.dtype.type(0), sums + 4 * width * r, width, found[h, token, 1], place)


@njit(parallel=True, cache=True)
def _forward(qkv, heads, group, each, tables, pack, tasks, scale, window, rooms, out, found):
    threads = rooms.shape[0]
    parts = group // each
    for thread in prange(threads):
        for n in range(thread, len(tasks) * parts, threads):
            segment, head = tasks[n // parts]
            first = head * group + n % parts * each
            _attend(segment, first, each, heads, qkv, tables, pack, scale, window, rooms[thread], out, found)


@njit(cache=True)
def _attend_backward(
    segment, first_head, each, heads, qkv, found, dy, tables, pack, scale, window, room, d_qkv, places, dk, dv
):
    """The gradients of one segment and `each` query heads: of queries, and its shares in those of keys.

    The shares are added to what stands at the addresses dk and dv; `places` are the rows there of the path's segments.
    """
    path, tokens = path_of(segment, pack)
    width, size = tables[0].shape[1], _up(tokens, 48)
    group = columns(qkv, width, 0, heads)[0]
    _, key, value = columns(qkv, width, first_head // group, heads)
    start, own, step = pack[0][segment], pack[1][segment], size * width
    stride, base = 4 * size + 64, room.ctypes.data
    _gather(path, pack, qkv, key, tables, True, size, room, 3 * step, 0, step)
    _gather(path, pack, qkv, value, tables, False, size, room, 3 * step, 2 * step, -1)
    keys, keys_along, values, queries = base, base + 4 * step, base + 8 * step, base + 20 * step
    d_keys, d_values = base + 12 * step, base + 16 * step
    given = queries + 4 * _QUERIES * width
    sums = given + 4 * _QUERIES * width
    p = sums + 4 * _QUERIES * width
    d = p + _QUERIES * stride
    clear(d_keys, 4 * step)
    clear(d_values, 4 * step)
    for h in range(first_head, first_head + each):
        for i in range(0, own, _QUERIES):
            rows, first = min(_QUERIES, own - i), tokens - own + i
            m, low, seen = _up(rows, ROWS), max(0, first + 1 - window) // 48 * 48, _up(first + rows, 16)
            many, seen_keys = seen - low, _up(seen - low, ROWS)
            for r in range(rows):
                _rotated(qkv, start + i + r, h * width, tables, queries + 4 * width * r)
                given_row = address(dy, start + i + r, h * width)
                widen_row(dy.dtype.type(0), given_row, width, given + 4 * width * r)
            clear(queries + 4 * width * rows, 4 * width * (m - rows))
            clear(given + 4 * width * rows, 4 * width * (m - rows))
            product(queries, 4 * width, 4, m, keys + 4 * low * width, 64, 64 * width, many, width, p, stride, False)
            product(given, 4 * width, 4, m, values + 4 * low * width, 64, 64 * width, many, width, d, stride, False)
            for r in range(rows):
                largest, inverse = found[h, start + i + r]
                here, p_row, d_row = first + r, p + stride * r, d + stride * r
                least = max(0, here + 1 - window) - low
                softmax_backward_row(_FLOAT, p_row, d_row, many, least, here - low, scale, largest, inverse, d_row)
                clear(p_row + 4 * many, 64)  # as far as sixes of keys reach
                clear(d_row + 4 * many, 64)
            clear(p + stride * rows, stride * (m - rows))
            clear(d + stride * rows, stride * (m - rows))
            _mix(d, stride, low, seen, m, keys_along, size, width, sums)
            for r in range(rows):
                _rotated_back(sums + 4 * width * r, start + i + r, h * width, tables, d_qkv)
            at = 4 * low * width
            product(d, 4, stride, seen_keys, queries, 4 * width, 64, width, m, d_keys + at, 4 * width, True)
            product(p, 4, stride, seen_keys, given, 4 * width, 64, width, m, d_values + at, 4 * width, True)
    for s, place in zip(path, places):  # noqa: B905 (numba knows no other)
        many, to = pack[1][s] * width, 4 * width * place
        add_row(d_keys, many, dk + to)
        add_row(d_values, many, dv + to)
        d_keys, d_values = d_keys + 4 * many, d_values + 4 * many


@njit(parallel=True, cache=True)
def _backward(qkv, found, heads, each, dy, tables, pack, shares, scale, window, rooms, d_qkv, dk, dv):
    threads, width, path_at = rooms.shape[0], tables[0].shape[1], pack[2]
    (part_at, parts, begins, places), columns_of = shares, dk.shape[0]
    for thread in prange(threads):
        for n in range(thread, (len(part_at) - 1) * columns_of, threads):
            part, column = n // columns_of, n % columns_of
            first, size = begins[part], 4 * width * (begins[part + 1] - begins[part])
            to = (address(dk[column], 0, 0), address(dv[column], 0, 0))
            clear(to[0] + 4 * width * first, size)
            clear(to[1] + 4 * width * first, size)
            for segment in parts[part_at[part] : part_at[part + 1]]:
                here = places[path_at[segment] : path_at[segment + 1]]
                given = (tables, pack, scale, window, rooms[thread], d_qkv, here)
                _attend_backward(segment, column * each, each, heads, qkv, found, dy, *given, *to)


@njit(parallel=True, cache=True)
def _collect(segment_of, use_at, uses, starts, heads, tables, dk, dv, d_qkv):
    """The gradient of each key and value: the sum over the parts of the pack that see it, and of its query heads."""
    parts, width = dk.shape[0] // heads, tables[0].shape[1]
    for token in prange(len(segment_of)):
        s = segment_of[token]
        for head in range(heads):
            _, key, value = columns(d_qkv, width, head, heads)
            keys, values = np.intp(0), np.intp(0)
            for use in uses[use_at[s] : use_at[s + 1]]:
                for part in range(head * parts, (head + 1) * parts):
                    more = 4 * width * (part * dk.shape[1] + use + token - starts[s])
                    if keys == 0:
                        keys, values = dk.ctypes.data + more, dv.ctypes.data + more
                    else:
                        add_row(dk.ctypes.data + more, width, keys)
                        add_row(dv.ctypes.data + more, width, values)
            _rotated_back(keys, token, key, tables, d_qkv)
            scaled_row(d_qkv.dtype.type(0), values, width, np.float32(1), address(d_qkv, token, value))


@functools.lru_cache(maxsize=4)
def _shares(layout: Layout) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, np.ndarray, np.ndarray], int]:
    """Where the gradients of keys are summed: each part of a pack, some segments, has a place for all that it sees.

    Where paths have more than twice the tokens of the pack there are few parts, of about the same work, so that a
    common beginning of many rows has few places; elsewhere each segment is one. Sums do not depend on threads.

    Returns:
        For `_backward`: where the segments of each part begin in a list, that list, where its places begin, and the
        first places of all paths. For `_collect`: the segment of each token, and for each segment where in a list its
        first places begin, and that list. How many places there are.
    """
    (_starts, lengths, path_at, paths), count = layout.pack, len(layout.paths)
    work = lengths * np.array(layout.seen)
    part_of = np.arange(count)
    if sum(layout.seen) > 2 * lengths.sum():
        part_of = np.minimum((np.cumsum(work) - work) * _PARTS // max(1, work.sum()), _PARTS - 1)
    members = [np.flatnonzero(part_of == part) for part in np.unique(part_of)]
    members.sort(key=lambda own: -work[own].sum())
    begins, places, uses = [0], np.empty(len(paths), np.int64), [list[int]() for _ in range(count)]
    for own in members:
        place, end = dict[int, int](), begins[-1]
        for segment in own:
            for i in range(path_at[segment], path_at[segment + 1]):
                if (s := paths[i]) not in place:
                    place[s] = end
                    uses[s].append(end)
                    end += int(lengths[s])
                places[i] = place[s]
        begins.append(end)
    part_at, use_at = (np.cumsum([0, *map(len, lists)]) for lists in (members, uses))
    collected = (np.repeat(np.arange(count), lengths), use_at, np.concatenate(uses).astype(np.int64))
    return (part_at, np.concatenate(members), np.array(begins), places), collected, int(begins[-1])


def _together(layout: Layout, group: int) -> int:
    """Query heads of a task: all that share a key head, whose keys are gathered once then, if there are many tasks.

    That does not depend on threads, so that sums do not.
    """
    return group if len(layout.tasks) >= _MANY_TASKS else 1


def usable(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels cover projections of a type and heads of a width."""
    return block.computes(dtype) and width % 32 == 0


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Attention of queries, keys and values side by side [T, (H + 2 K) D] -> [T, H * D]; cos and sin [T, D].

    Args:
        cos, sin: of no rows [0, D], where queries and keys are rotated already.
        window: how many tokens back a token sees, itself included.

    Returns:
        That, and what `backward` wants to know of the scores: [H, T, 2], the largest and the inverse of their sum.
    """
    width, heads = cos.shape[1], layout.key_heads
    out = empty(len(qkv), qkv.shape[1] - 2 * heads * width, dtype=qkv.dtype)
    many = out.shape[1] // width
    found = torch.empty(many, len(qkv), 2, dtype=torch.float32)
    size = _up(layout.longest_path, 48)
    rooms = workspace(2 * size * width + _QUERIES * (2 * width + size + 16))
    group = many // heads
    given = (raw(qkv), heads, group, _together(layout, group), rotation_tables(cos, sin), layout.pack, layout.tasks)
    on_torch_threads(_forward, *given, np.float32(scale), window, rooms, raw(out), found.numpy())
    return out, found


def backward(
    qkv: Tensor, found: Tensor, cos: Tensor, sin: Tensor, layout: Layout, scale: float, window: int, dy: Tensor
) -> Tensor:
    """The gradient of `forward` with respect to queries, keys and values for dy [T, H * D]."""
    width, heads, many = cos.shape[1], layout.key_heads, len(found)
    d_qkv, size = empty(*qkv.shape, dtype=qkv.dtype), _up(layout.longest_path, 48)
    rooms = workspace(5 * size * width + _QUERIES * (3 * width + 2 * size + 32))
    parts, used, places = _shares(layout)
    group = many // heads
    each = _together(layout, group)
    shares = [empty(many // each, places, width).numpy() for _ in range(2)]
    tables, results = rotation_tables(cos, sin), raw(d_qkv)
    given = (raw(qkv), found.numpy(), heads, each, raw(dy), tables, layout.pack, parts)
    on_torch_threads(_backward, *given, np.float32(scale), window, rooms, results, *shares)
    on_torch_threads(_collect, *used, layout.pack[0], heads, tables, *shares, results)
    return d_qkv
