"""Causal attention over the segments of a pack with matrix tiles: rotary embedding, scores, softmax, sums in one pass.

A thread takes a segment and a key head at a time and keeps what it needs in its cache. No attention weights are kept
for the backward pass, which computes them again (as arXiv 2205.14135 does).
"""

# T tokens, H query heads, K key heads, D head width; a path is a segment after its ancestors, of N tokens rounded up
# to 32; bfloat16 is uint16 here; `at` is the address of memory that is still free

from __future__ import annotations

import functools

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lorafold.kernels.block import raw
from lorafold.kernels.compiled import address, empty, on_torch_threads, workspace
from lorafold.kernels.packs import Layout, columns, path_of, rotation_tables
from lorafold.kernels.rows import (
    clear,
    copy,
    rotate_row,
    scaled_row,
    softmax_backward_row,
    softmax_row,
)
from lorafold.kernels.tiles import (
    SETTINGS,
    configure,
    lay,
    panel,
    release,
    round_pair,
    round_row,
    supported,
    turn,
)

_MOST_BYTES = 64 << 20  # of a thread
_WORD, _FLOAT = np.uint16(0), np.float32(0)  # kinds of rows


@njit(inline="always")
def _up(n):
    return (n + 31) // 32 * 32


@njit(cache=True)
def _rotated(x, token, column, tables, out):
    """The head that begins at a column of x, rotated, goes to an address."""
    cos, sin, _back = tables
    place = address(x, token, column)
    rotate_row(_WORD, _WORD, place, address(cos, token, 0), address(sin, token, 0), cos.shape[1], out)


@njit(cache=True)
def _rotated_back(sums, token, column, tables, out):
    """A row of float32 sums, rotated back, goes to a head of a token."""
    cos, _sin, back = tables
    target = address(out, token, column)
    rotate_row(_FLOAT, _WORD, sums, address(cos, token, 0), address(back, token, 0), cos.shape[1], target)


@njit(cache=True)
def _gather(path, pack, key, value, qkv, tables, keys, values, size):
    """Rotated keys and values of a path's tokens, of two columns, zeros after them: bfloat16 [size, D] at addresses."""
    starts, lengths, bytes_ = pack[0], pack[1], 2 * tables[0].shape[1]
    n = 0
    for s in path:
        for token in range(starts[s], starts[s] + lengths[s]):
            _rotated(qkv, token, key, tables, keys + bytes_ * n)
            copy(address(qkv, token, value), bytes_, values + bytes_ * n)
            n += 1
    clear(keys + bytes_ * n, bytes_ * (size - n))
    clear(values + bytes_ * n, bytes_ * (size - n))


@njit(cache=True)
def _lay_all(source, rows, width, transposed, out):
    """Lay out bfloat16 [rows, width], where the width is summed (`transposed`: 32 rows a panel) or the rows are."""
    k, panels = (width, rows // 32) if transposed else (rows, width // 32)
    for j in range(panels):
        lay(source, 2 * width, transposed, j, k, out + 64 * k * j)


@njit(cache=True)
def _scores(rows, width, laid, panels, sums, across):
    """32 rows [32, D] times `panels` panels of 32 keys: float32 sums, `across` bytes from row to row."""
    for j in range(panels):
        panel(rows, 2 * width, laid + 64 * width * j, width // 32, sums + 128 * j, across)


@njit(cache=True)
def _mix(weights, stride, laid, steps, depth, width, sums):
    """32 rows of weights, 32 * `steps` long, times values laid out by rows of `depth`: float32 [32, D]."""
    for d in range(width // 32):
        panel(weights, stride, laid + 64 * depth * d, steps, sums + 128 * d, 4 * width)


@njit(cache=True)
def _round(source, length, out):
    """So many numbers at an address become bfloat16 at another."""
    for j in range(length // 32):
        round_row(source + 128 * j, out + 64 * j)


@njit(cache=True)
def _attend(segment, head, heads, qkv, tables, pack, scale, window, at, out, found):
    """The outputs of one segment and the query heads of one key head."""
    path, tokens = path_of(segment, pack)
    width, size = tables[0].shape[1], _up(tokens)
    group, key, value = columns(qkv, width, head, heads)
    start, own = pack[0][segment], pack[1][segment]
    step = 2 * size * width
    keys, values, laid_keys, laid_values = at, at + step, at + 2 * step, at + 3 * step
    queries = at + 4 * step
    scores = queries + 64 * width
    weights = scores + 128 * size
    sums = weights + 64 * size
    _gather(path, pack, key, value, qkv, tables, keys, values, size)
    _lay_all(keys, size, width, True, laid_keys)
    _lay_all(values, size, width, False, laid_values)
    for h in range(head * group, (head + 1) * group):
        for i in range(0, own, 32):
            rows, first = min(32, own - i), tokens - own + i
            seen = min(size, _up(first + 32))
            for r in range(rows):
                _rotated(qkv, start + i + r, h * width, tables, queries + 2 * width * r)
            clear(queries + 2 * width * rows, 2 * width * (32 - rows))
            _scores(queries, width, laid_keys, seen // 32, scores, 4 * size)
            for r in range(rows):
                row, words, place = scores + 4 * size * r, weights + 2 * size * r, address(found[h], start + i + r, 0)
                softmax_row(_WORD, row, seen, max(0, first + r + 1 - window), first + r, scale, words, place)
            _mix(weights, 2 * size, laid_values, seen // 32, size, width, sums)
            for r in range(rows):
                token = start + i + r
                scaled_row(_WORD, sums + 4 * width * r, width, found[h, token, 1], address(out, token, h * width))


@njit(parallel=True, cache=True)
def _forward(qkv, heads, tables, pack, tasks, scale, window, rooms, settings, out, found):
    threads = rooms.shape[0]
    for thread in prange(threads):
        configure(settings)
        for task in range(thread, len(tasks), threads):
            room = rooms[thread].ctypes.data
            _attend(tasks[task, 0], tasks[task, 1], heads, qkv, tables, pack, scale, window, room, out, found)
        release()


@njit(cache=True)
def _put_transposed(source, across, spare, out, stride):
    """32 x 32 float32 numbers at an address, rows and columns exchanged, become bfloat16 at another."""
    for a in range(2):
        for b in range(2):
            turn(source + 16 * a * across + 64 * b, across, spare + 1024 * (2 * a + b))
    for b in range(2):  # a quarter is 16 columns of the block (b) by 16 of its rows (a)
        for r in range(16):
            quarter = spare + 1024 * b + 64 * r
            round_pair(quarter, quarter + 2048, out + stride * (16 * b + r))


@njit(cache=True)
def _attend_backward(
    segment, head, heads, qkv, found, dy, tables, pack, spills, scale, window, at, d_qkv, dk_spilled, dv_spilled
):
    """The gradients of one segment's queries, and its share in those of the keys and values of its path."""
    path, tokens = path_of(segment, pack)
    width, size = tables[0].shape[1], _up(tokens)
    group, key_at, value_at = columns(qkv, width, head, heads)
    start, own = pack[0][segment], pack[1][segment]
    many = group * _up(own)  # the queries of all heads of this key head, one head after the other
    step, tall = 2 * size * width, 2 * many * width
    keys, values, turned_keys, turned_values, laid_keys = at, at + step, at + 2 * step, at + 3 * step, at + 4 * step
    at += 5 * step
    queries, given, laid_queries, laid_given = at, at + tall, at + 2 * tall, at + 3 * tall
    at += 4 * tall
    p_turned, d_turned = at, at + 2 * size * many  # weights and gradients of scores, bfloat16 [size, many]
    at += 4 * size * many
    p, d, d_words = at, at + 128 * size, at + 256 * size
    at += 320 * size
    sums, other, spare = at, at + 128 * width, at + 256 * width
    _gather(path, pack, key_at, value_at, qkv, tables, keys, values, size)
    _lay_all(keys, size, width, True, turned_keys)
    _lay_all(values, size, width, True, turned_values)
    _lay_all(keys, size, width, False, laid_keys)
    for h in range(group):
        column = (head * group + h) * width
        for i in range(0, own, 32):
            rows, first, base = min(32, own - i), tokens - own + i, h * _up(own) + i
            seen = min(size, _up(first + 32))
            q_rows, dy_rows = queries + 2 * width * base, given + 2 * width * base
            for r in range(rows):
                _rotated(qkv, start + i + r, column, tables, q_rows + 2 * width * r)
                copy(address(dy, start + i + r, column), 2 * width, dy_rows + 2 * width * r)
            clear(q_rows + 2 * width * rows, 2 * width * (32 - rows))
            clear(dy_rows + 2 * width * rows, 2 * width * (32 - rows))
            _scores(q_rows, width, turned_keys, seen // 32, p, 4 * size)
            _scores(dy_rows, width, turned_values, seen // 32, d, 4 * size)
            for r in range(rows):
                p_row, d_row = p + 4 * size * r, d + 4 * size * r
                largest, inverse = found[head * group + h, start + i + r]
                low = max(0, first + r + 1 - window)
                words = d_words + 2 * size * r
                softmax_backward_row(_WORD, p_row, d_row, seen, low, first + r, scale, largest, inverse, words)
            clear(p + 4 * size * rows, 4 * size * (32 - rows))
            clear(d + 4 * size * rows, 4 * size * (32 - rows))
            _mix(d_words, 2 * size, laid_keys, seen // 32, size, width, sums)
            for r in range(rows):
                _rotated_back(sums + 4 * width * r, start + i + r, column, tables, d_qkv)
            for j in range(0, seen, 32):
                _put_transposed(p + 4 * j, 4 * size, spare, p_turned + 2 * (j * many + base), 2 * many)
                _put_transposed(d + 4 * j, 4 * size, spare, d_turned + 2 * (j * many + base), 2 * many)
            for j in range(seen, size):
                clear(p_turned + 2 * (j * many + base), 64)
                clear(d_turned + 2 * (j * many + base), 64)
    _lay_all(queries, many, width, False, laid_queries)
    _lay_all(given, many, width, False, laid_given)
    (shared, spill_at), n, column = spills, 0, head * width
    spilled = spill_at[segment]
    for s in path:
        for token in range(pack[0][s], pack[0][s] + pack[1][s]):
            if n % 32 == 0:
                _mix(d_turned + 2 * many * n, 2 * many, laid_queries, many // 32, many, width, sums)
                _mix(p_turned + 2 * many * n, 2 * many, laid_given, many // 32, many, width, other)
            key, value = sums + 4 * width * (n % 32), other + 4 * width * (n % 32)
            if shared[s]:
                copy(key, 4 * width, address(dk_spilled, spilled, column))
                copy(value, 4 * width, address(dv_spilled, spilled, column))
                spilled += 1
            else:
                _rotated_back(key, token, key_at, tables, d_qkv)
                _round(value, width, address(d_qkv, token, value_at))
            n += 1


@njit(parallel=True, cache=True)
def _backward(
    qkv, found, heads, dy, tables, pack, tasks, spills, scale, window, rooms, settings, d_qkv, dk_spilled, dv_spilled
):
    threads = rooms.shape[0]
    for thread in prange(threads):
        configure(settings)
        for task in range(thread, len(tasks), threads):
            given = (tables, pack, spills, scale, window, rooms[thread].ctypes.data)
            results = (d_qkv, dk_spilled, dv_spilled)
            _attend_backward(tasks[task, 0], tasks[task, 1], heads, qkv, found, dy, *given, *results)
        release()


@functools.lru_cache(maxsize=4)
def _spills(layout: Layout) -> tuple[tuple[np.ndarray, np.ndarray], Tensor, Tensor]:
    """Keys and values of ancestors get gradients from several segments: all shares are listed, to be summed.

    Returns:
        Which segments are ancestors, and where the list begins for each path; the tokens that it names; where each of
        its lines stands among these.
    """
    starts, lengths = layout.pack[:2]
    shared, spill_at, tokens = np.zeros_like(starts), np.zeros_like(starts), []
    shared[[i for path in layout.paths for i in path[:-1]]] = 1
    for i, path in enumerate(layout.paths):
        spill_at[i] = len(tokens)
        tokens += [t for s in path if shared[s] for t in range(starts[s], starts[s] + lengths[s])]
    return (shared, spill_at), *torch.tensor(tokens, dtype=torch.int64).unique(return_inverse=True)


def most_tokens(group: int) -> int:
    """The longest row, where so many query heads share a key head: a thread keeps 4 bytes for each of their weights."""
    return int((_MOST_BYTES / (4 * group)) ** 0.5) // 32 * 32


def usable(dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels cover projections of a type and heads of a width."""
    return dtype == torch.bfloat16 and width % 32 == 0 and supported()


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout, scale: float, window: int) -> tuple[Tensor, Tensor]:
    """Attention of queries, keys and values side by side [T, (H + 2 K) D] -> [T, H * D]; cos and sin [T, D].

    Returns:
        That, and what `backward` wants to know of the scores: [H, T, 2], the largest and the inverse of their sum.
    """
    assert supported()  # which also asks the system for the tiles
    size, width, heads = _up(layout.longest_path), cos.shape[1], layout.key_heads
    out = empty(len(qkv), qkv.shape[1] - 2 * heads * width, dtype=qkv.dtype)
    found = torch.empty(out.shape[1] // width, len(qkv), 2, dtype=torch.float32)
    rooms = workspace(2 * size * width + 48 * (size + width))
    given = (raw(qkv), heads, rotation_tables(cos, sin), layout.pack, layout.tasks, np.float32(scale), window)
    on_torch_threads(_forward, *given, rooms, SETTINGS.ctypes.data, raw(out), found.numpy())
    return out, found


def backward(
    qkv: Tensor, found: Tensor, cos: Tensor, sin: Tensor, layout: Layout, scale: float, window: int, dy: Tensor
) -> Tensor:
    """The gradient of `forward` with respect to queries, keys and values for dy [T, H * D]."""
    assert supported()
    d_qkv, heads = empty(*qkv.shape, dtype=qkv.dtype), layout.key_heads
    size, width = _up(layout.longest_path), cos.shape[1]
    keys_wide = heads * width
    many = dy.shape[1] // keys_wide * _up(layout.longest)
    rooms = workspace(5 * size * width // 2 + 2 * many * width + size * many + 80 * size + 64 * width + 1024)
    spills, tokens, share_of = _spills(layout)
    spilled = [torch.empty(len(share_of), keys_wide, dtype=torch.float32) for _ in range(2)]
    given = (raw(qkv), found.numpy(), heads, raw(dy), rotation_tables(cos, sin), layout.pack, layout.tasks, spills)
    results = (raw(d_qkv), *(x.numpy() for x in spilled))
    on_torch_threads(_backward, *given, np.float32(scale), window, rooms, SETTINGS.ctypes.data, *results)
    if len(tokens):
        keys, values = (torch.zeros(len(tokens), keys_wide).index_add_(0, share_of, x) for x in spilled)
        by_head, c, s = keys.view(len(keys), -1, width), cos[tokens, None].float(), sin[tokens, None].float()
        low, high = (by_head * s).chunk(2, -1)
        keys = (by_head * c + torch.cat([high, -low], -1)).flatten(1)
        d_qkv[tokens, dy.shape[1] :] = torch.cat([keys, values], 1).to(d_qkv.dtype)
    return d_qkv
