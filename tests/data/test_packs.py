"""Packs hold every row's tokens and predictions, and no prediction from one row into the next."""

from __future__ import annotations

import random

import pytest
import torch

from lorafold.data.packs import micro_batches, pack
from lorafold.data.tokens import Tokens


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
    assert (found.target_at.shape, found.targets.shape) == ((0,), (0,))


def test_to_moves_every_tensor() -> None:
    moved = pack(_rows([3, 4])).to("meta")
    assert {t.device.type for t in (moved.ids, moved.positions, moved.target_at, moved.targets)} == {"meta"}


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
    groups = micro_batches(rows, limit)
    assert [[len(row) for row in group] for group in groups] == expected
    assert [row for group in groups for row in group] == rows
