"""Rows laid end to end without padding; what rows have in common from their start can stand once, as a tree.

rows        a0 a1 a2   b0 b1          (a1, a2 and b1 supervised)
ids         a0 a1 a2 b0 b1
positions    0  1  2  0  1
segments     [3, 2]                    rows do not see each other
parents      [-1, -1]
target_at    0  1     3                the hidden state that predicts ...
targets     a1 a2    b1                ... this token

rows        p0 p1 a2 a3   p0 p1 b2     (a2, a3 and b2 supervised), what two tokens or more have in common shared
ids         p0 p1  a2 a3  b2
positions    0  1   2  3   2
segments     [2, 2, 1]
parents      [-1, 0, 0]                a segment sees its ancestors
target_at    1  2  1
targets     a2 a3 b2                   one hidden state predicts for several rows
wanted       1  2                      each position that predicts, once
target_in    0  1  0                   where in `wanted` that of a target stands
"""

# T tokens of the pack, S supervised tokens, W positions that predict them

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorafold.data.tokens import Tokens

_TRIALS = 4  # limits that are tried for groups in order


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows laid end to end.

    Attributes:
        ids: token ids, int64 [T].
        positions: place within the row, from 0, int64 [T]; what a row is lengthened by stands at its last place.
        segments: lengths of the segments, in order; their sum is T.
        parents: for each segment the one that its rows have before it, which stands earlier; -1 where a row begins.
        target_at: positions in the pack whose hidden states predict a supervised token, int64 [S], row by row.
        targets: these tokens, int64 [S].
        wanted: the positions of `target_at`, each once and in order, and as many others as round their number up,
            int64 [W].
        target_in: where in `wanted` those of `target_at` stand, int64 [S].
    """

    ids: Tensor
    positions: Tensor
    segments: list[int]
    parents: list[int]
    target_at: Tensor
    targets: Tensor
    wanted: Tensor
    target_in: Tensor

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on another device; on a GPU once it gets there, without waiting for it."""
        at_once = torch.device(device).type != "cpu"
        tensors = {key: x.to(device, non_blocking=at_once) for key, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class _Segment:
    """Tokens `start` to `end` of a row, which all rows below this segment have in common."""

    row: int
    start: int
    end: int
    parent: int


def pack(rows: Sequence[Tokens], align: int = 1, shared: int | None = None, whole: int = 1) -> Pack:
    """Lay rows end to end; at least one row.

    Args:
        align: lengthen the end of each row to a multiple of this with its last token. What follows a row's end is seen
            by nothing before it and is never a target, so this changes no result; it keeps the number of different
            matrix shapes small, for each of which a CPU's matrix library compiles and keeps a kernel.
        shared: least number of tokens for which it pays to let rows share them; None shares nothing.
        whole: lengthen the last row so that T is a multiple of this; W is one as well.
    """
    assert rows
    tree, leaves, lengths = _lay_out(rows, align, shared)
    total = sum(lengths)
    lengths[-1] += _up(total, whole) - total
    starts = [0, *itertools.accumulate(lengths)]
    ids: list[int] = []
    for segment, length in zip(tree, lengths, strict=True):
        own = rows[segment.row].ids[segment.start : segment.end]
        ids += own + own[-1:] * (length - len(own))
    target_at: list[int] = []
    targets: list[int] = []
    for row, leaf in zip(rows, leaves, strict=True):
        places = _places(tree, starts, leaf)
        learned = [i for i, supervised in enumerate(row.supervised) if supervised]  # never 0
        target_at += [places[i - 1] for i in learned]
        targets += [row.ids[i] for i in learned]
    wanted, target_in = _wanted(torch.tensor(target_at, dtype=torch.int64), len(ids), whole)
    return Pack(
        ids=torch.tensor(ids, dtype=torch.int64),
        positions=torch.cat(
            [torch.arange(s.start, s.start + n).clamp_(max=s.end - 1) for s, n in zip(tree, lengths, strict=True)]
        ),
        segments=lengths,
        parents=[segment.parent for segment in tree],
        target_at=torch.tensor(target_at, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        wanted=wanted,
        target_in=target_in,
    )


def _wanted(target_at: Tensor, tokens: int, whole: int) -> tuple[Tensor, Tensor]:
    """Of so many tokens those that predict, in order, with others up to a multiple; where in it each stands."""
    chosen = torch.zeros(tokens, dtype=torch.bool).index_fill_(0, target_at, True)
    found = int(chosen.sum())
    others = (~chosen).nonzero()[: _up(max(found, 1), whole) - found, 0]  # one at least: kernels take no empty matrix
    chosen[others] = True
    return chosen.nonzero()[:, 0], (chosen.cumsum(0) - 1)[target_at]


def _lay_out(rows: Sequence[Tokens], align: int, shared: int | None) -> tuple[list[_Segment], list[int], list[int]]:
    """Segments, for each row its last one, and the length of each segment; the last segment is the end of a row."""
    if shared is None:
        tree = [_Segment(row, 0, len(tokens), -1) for row, tokens in enumerate(rows)]
        return tree, list(range(len(rows))), [_up(len(row), align) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: rows[i].ids)
    common = [common_tokens(rows[a], rows[b]) for a, b in itertools.pairwise(order)]
    tree, leaves = [], [0] * len(rows)
    waiting = [(0, len(rows), 0, -1)]  # rows of `order` whose first tokens stand in the tree, how many, and where
    while waiting:
        first, last, start, parent = waiting.pop()
        begin = first
        for end in range(first + 1, last + 1):
            if end < last and common[end - 1] >= start + shared:
                continue
            row, alone = order[begin], end == begin + 1
            until = len(rows[row]) if alone else min(common[begin : end - 1])
            tree.append(_Segment(row, start, until, parent))
            if alone:
                leaves[row] = len(tree) - 1
            else:
                waiting.append((begin, end, until, len(tree) - 1))
            begin = end
    ends = set(leaves)
    lengths = [_up(s.end - s.start, align) if i in ends else s.end - s.start for i, s in enumerate(tree)]
    return tree, leaves, lengths


def _places(tree: list[_Segment], starts: list[int], leaf: int) -> list[int]:
    """Where the tokens of a row stand in the pack."""
    path = [leaf]
    while tree[path[-1]].parent >= 0:
        path.append(tree[path[-1]].parent)
    return [starts[i] + j for i in reversed(path) for j in range(tree[i].end - tree[i].start)]


def common_tokens(a: Tokens, b: Tokens) -> int:
    """How many tokens two rows share from their start; each keeps at least one of its own."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a.ids[i] != b.ids[i]), most)


def _size(rows: Sequence[Tokens], align: int, shared: int | None) -> int:
    """Tokens of the rows' pack, or those that are predicted, where these are more."""
    return max(sum(_lay_out(rows, align, shared)[2]), sum(sum(row.supervised) for row in rows))


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def even_batches(
    rows: Sequence[Tokens], max_tokens: int, align: int = 1, shared: int | None = None
) -> list[list[Tokens]]:
    """No more groups and no more tokens than `micro_batches` makes, of near the same size, which decides the memory.

    The longest rows are dealt first; where that would share less, rows stay in order.

    Args:
        max_tokens, align, shared: as in `micro_batches`.
    """
    best = list(micro_batches(rows, max_tokens, align, shared))
    if len(best) < 2:
        return best
    sizes = [_size(group, align, shared) for group in best]
    total, largest = sum(sizes), max(sizes)
    dealt = [[rows[i] for i in part] for part in deal([len(row) for row in rows], len(best))]
    sizes = [_size(group, align, shared) for group in dealt]
    if sum(sizes) <= total and max(sizes) < largest:
        return dealt
    enough = min(largest, max_tokens)
    too_few = min(total // len(best), enough)
    for _ in range(_TRIALS):
        limit = (enough + too_few) // 2
        trial = list(micro_batches(rows, limit, align, shared))
        sizes = [_size(group, align, shared) for group in trial]
        if len(trial) <= len(best) and sum(sizes) <= total:
            best, enough = trial, min(limit, max(sizes))
        else:
            too_few = limit
    return best


def deal(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Which of the lengths are in which part, in order, for sums near each other: the longest first, to the least.

    With more parts than lengths some are empty.
    """
    sums, dealt = [0] * parts, [list[int]() for _ in range(parts)]
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        part = sums.index(min(sums))
        sums[part] += lengths[i]
        dealt[part].append(i)
    return [sorted(part) for part in dealt]


def micro_batches(
    rows: Iterable[Tokens], max_tokens: int, align: int = 1, shared: int | None = None
) -> Iterator[list[Tokens]]:
    """Split rows, in order, into groups of at most `max_tokens` tokens; a longer row stands alone.

    Args:
        align, shared: as in `pack`. With `shared` the tokens of the pack are counted, and those that are predicted, of
            which several may belong to one token of the pack; without, the tokens of the rows.
    """
    group: list[Tokens] = []
    filled = 0
    for row in rows:
        if shared is None:
            filled += _up(len(row), align)
        elif group:
            filled = _size([*group, row], align, shared)
        if group and filled > max_tokens:
            yield group
            group, filled = [], 0
        if not group:
            filled = _up(len(row), align)
        group.append(row)
    if group:
        yield group
