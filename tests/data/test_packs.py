"""Packs hold every row's tokens and predictions, and no prediction from one row into the next."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafold.data.packs import deal, even_batches, micro_batches, pack
from lorafold.data.tokens import Tokens
from tests.practice import related_rows


def _rows(lengths: list[int]) -> list[Tokens]:
    draw = random.Random(0)
    return [
        Tokens([draw.randrange(100) for _ in range(n)], [i > 0 and draw.random() < 0.5 for i in range(n)], row)
        for row, n in enumerate(lengths)
    ]


def test_the_example_of_the_module() -> None:
    found = pack([Tokens([10, 11, 12], [False, True, True], 0), Tokens([20, 21], [False, True], 1)])
    assert found.ids.tolist() == [10, 11, 12, 20, 21]
    assert found.positions.tolist() == [0, 1, 2, 0, 1]
    assert found.segments == [3, 2]
    assert found.target_at.tolist() == [0, 1, 3]
    assert found.targets.tolist() == [11, 12, 21]


def test_a_pack_is_its_rows_one_after_another() -> None:
    rows = _rows([5, 1, 9, 2])
    found, start = pack(rows), 0
    for row in rows:
        alone = pack([row])
        inside = (found.target_at >= start) & (found.target_at < start + len(row))
        assert torch.equal(found.target_at[inside] - start, alone.target_at)
        assert torch.equal(found.targets[inside], alone.targets)
        assert torch.equal(found.positions[start : start + len(row)], torch.arange(len(row)))
        start += len(row)
    assert len(found.targets) == sum(sum(row.supervised) for row in rows)
    assert all(t.dtype == torch.int64 for t in (found.ids, found.positions, found.target_at, found.targets))


def test_rows_without_targets_pack_too() -> None:
    found = pack([Tokens([1, 2], [False, False], 0)])
    assert (found.target_at.shape, found.targets.shape, len(found.wanted)) == ((0,), (0,), 1)


@pytest.mark.parametrize("whole", [1, 4, 16, 64])
@given(seed=st.integers(0, 10**6), count=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_what_is_wanted_is_every_position_that_predicts(whole: int, seed: int, count: int) -> None:
    """Once, in order, with as few others as a multiple takes."""
    found = pack(related_rows(count, seed), 1, 2, whole)
    predicting = set(found.target_at.tolist())
    assert torch.equal(found.wanted[found.target_in], found.target_at)
    assert found.wanted.tolist() == sorted({*found.wanted.tolist()} | predicting)
    assert len(found.wanted) == max(1, -(-len(predicting) // whole)) * whole
    assert found.wanted.max() < len(found.ids)


def test_to_moves_every_tensor() -> None:
    moved = pack(_rows([3, 4])).to("meta")
    devices = [value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert devices == ["meta"] * 6


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([3, 4, 3, 1], 7, [[3, 4], [3, 1]]),
        ([9, 2, 2], 4, [[9], [2, 2]]),
        ([2, 9, 2], 4, [[2], [9], [2]]),
        ([1, 1, 1], 1, [[1], [1], [1]]),
        ([], 5, []),
    ],
)
def test_micro_batches(lengths: list[int], limit: int, expected: list[list[int]]) -> None:
    rows = _rows(lengths)
    groups = list(micro_batches(rows, limit))
    assert [[len(row) for row in group] for group in groups] == expected
    assert [row for group in groups for row in group] == rows


def test_the_tree_of_the_module() -> None:
    rows = [Tokens([7, 8, 12, 13], [False, False, True, True], 0), Tokens([7, 8, 22], [False, False, True], 1)]
    found = pack(rows, shared=2)
    assert found.ids.tolist() == [7, 8, 12, 13, 22]
    assert found.positions.tolist() == [0, 1, 2, 3, 2]
    assert (found.segments, found.parents) == ([2, 2, 1], [-1, 0, 0])
    assert found.target_at.tolist() == [1, 2, 1]
    assert found.targets.tolist() == [12, 13, 22]
    apart = pack(rows, shared=3)
    assert (apart.segments, apart.parents) == ([4, 3], [-1, -1])


@given(count=st.integers(1, 12), seed=st.integers(0, 2**20), shared=st.integers(1, 9), align=st.sampled_from([1, 4]))
@settings(max_examples=200, deadline=None)
def test_every_row_is_a_path_of_the_tree(count: int, seed: int, shared: int, align: int) -> None:
    """The tokens that stand before a target, in its segment and in those above, are those before it in its row."""
    rows = related_rows(count, seed)
    found = pack(rows, align, shared, 4 * align)
    starts = [sum(found.segments[:i]) for i in range(len(found.segments))]
    owner = [i for i, n in enumerate(found.segments) for _ in range(n)]

    def before(place: int) -> list[int]:
        """The tokens that the one at this place sees, itself included."""
        at, parent = starts[owner[place]], found.parents[owner[place]]
        own = found.ids[at : place + 1].tolist()
        return own if parent < 0 else before(starts[parent] + found.segments[parent] - 1) + own

    expected = [(row.ids[:i], row.ids[i]) for row in rows for i, flag in enumerate(row.supervised) if flag]
    actual = [(before(p), t) for p, t in zip(found.target_at.tolist(), found.targets.tolist(), strict=True)]
    assert actual == expected
    last = [int(positions.max()) for positions in found.positions.split(found.segments)]
    assert all(found.positions[i] == min(len(before(i)) - 1, last[owner[i]]) for i in range(len(found.ids)))
    leaves = set(range(len(found.segments))) - set(found.parents)
    assert sorted(last[i] + 1 for i in leaves) == sorted(len(row) for row in rows)  # lengthening needs no position
    for index, parent in enumerate(found.parents):
        assert -1 <= parent < index
    inner = set(found.parents) - {-1}
    assert all(found.segments[i] >= shared for i in inner)
    assert all(found.parents.count(i) >= 2 for i in inner)
    assert len(found.segments) - len(inner) == count
    assert len(found.ids) % (4 * align) == 0


def test_what_is_shared_stands_once() -> None:
    system = list(range(40))
    rows = [Tokens([*system, 50 + i, 60], [False] * 41 + [True], i) for i in range(5)]
    assert len(pack(rows, shared=16).ids) == 40 + 5 * 2
    assert len(pack(rows).ids) == 5 * 42
    assert [len(g) for g in micro_batches(rows, 46, shared=16)] == [3, 2]
    assert [len(g) for g in micro_batches(rows, 46, align=4, shared=16)] == [1] * 5
    assert [len(g) for g in micro_batches(rows, 46)] == [1] * 5


@given(count=st.integers(1, 15), seed=st.integers(0, 2**20), shared=st.integers(1, 9), align=st.sampled_from([1, 4]))
@settings(max_examples=100, deadline=None)
def test_micro_batches_hold_what_they_may(count: int, seed: int, shared: int, align: int) -> None:
    """Neither the tokens of a pack nor its targets are more than was allowed."""
    rows = sorted(related_rows(count, seed), key=lambda row: row.ids)
    groups = list(micro_batches(rows, 40, align, shared))
    assert [row for group in groups for row in group] == rows
    for group in groups:
        found = pack(group, align, shared)
        assert len(group) == 1 or len(found.ids) <= 40
        assert len(group) == 1 or len(found.targets) <= 40


@given(
    count=st.integers(1, 15),
    seed=st.integers(0, 2**20),
    shared=st.none() | st.integers(1, 9),
    align=st.sampled_from([1, 4]),
    limit=st.integers(1, 90),
)
@settings(max_examples=200, deadline=None)
def test_even_batches_hold_what_micro_batches_do(
    count: int, seed: int, shared: int | None, align: int, limit: int
) -> None:
    """The same rows in no more groups, the largest of which is no larger."""
    rows = sorted(related_rows(count, seed), key=lambda row: row.ids)
    plain, even = list(micro_batches(rows, limit, align, shared)), even_batches(rows, limit, align, shared)
    assert sorted(row.row for group in even for row in group) == sorted(row.row for row in rows)
    assert len(even) <= len(plain)
    assert all(even)
    held = [[max(len(p.ids), len(p.targets)) for p in (pack(g, align, shared) for g in x)] for x in (plain, even)]
    assert max(held[1]) <= max(held[0])
    assert sum(held[1]) <= sum(held[0])
    assert all(size <= limit or len(group) == 1 for size, group in zip(held[1], even, strict=True))


def test_even_batches_are_even() -> None:
    """The longest rows dealt first where that shares as much, otherwise rows in order, and never more tokens."""
    assert [[len(r) for r in g] for g in even_batches(_rows([50] * 8), 350)] == [[50] * 4] * 2
    assert [[len(r) for r in g] for g in even_batches(_rows([90, 80, 10, 20]), 180)] == [[90, 10], [80, 20]]
    families = [_family(start, 100, 4) for start in range(0, 6000, 1000)]  # of 140 tokens
    groups = even_batches([row for family in families for row in family], 700, shared=24)
    assert [sorted({r.ids[0] for r in g}) for g in groups] == [[0, 1000, 2000], [3000, 4000, 5000]]
    rows = [*_family(0, 500, 10), *_rows([150])]  # in halves of the same size the family's beginning stood twice
    assert [len(g) for g in even_batches(rows, 1000, shared=24)] == [10, 1]
    assert even_batches([], 5) == []


def _family(start: int, common: int, count: int) -> list[Tokens]:
    """Rows of a beginning in common and 10 tokens of their own (40 after one of 500)."""
    own = 40 if common == 500 else 10
    beginning = list(range(start, start + common))
    rows = [[*beginning, *([start + 600 + i] * own)] for i in range(count)]
    return [Tokens(ids, [False] * (len(ids) - 1) + [True], i) for i, ids in enumerate(rows)]


def test_lengths_are_dealt() -> None:
    assert deal([2, 5, 3, 4], 2) == [[0, 1], [2, 3]]
    assert deal([1, 2], 3) == [[1], [0], []]


def test_rows_that_contain_each_other() -> None:
    """A conversation that grows by a turn with each row: as deep as there are rows."""
    rows = [Tokens(list(range(3 * i + 2)), [False] * (3 * i + 1) + [True], i) for i in range(1500)]
    found = pack(rows, shared=1)
    assert len(found.ids) == 3 * 1499 + 2 + 1499
    assert max(found.parents) > 1400
