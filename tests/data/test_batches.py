"""Batches of rows of like length."""

from __future__ import annotations

import random
from itertools import chain

import pytest

from lorafold.data.batches import by_length, fill_up


@pytest.mark.parametrize("seed", range(20))
def test_no_batch_is_larger_than_was_said_once_it_is_filled_up(seed: int) -> None:
    draw = random.Random(seed)
    longest, most = draw.choice([3, 20, 130]), draw.choice([1, 16, 100, 1024])
    rows = [[n] * draw.randint(1, longest) for n in range(draw.randint(1, 400))]
    batches = list(by_length(rows, most))
    assert sorted(chain(*batches)) == sorted(rows)
    assert [len(row) for row in chain(*batches)] == sorted(map(len, rows), reverse=True)
    for batch in batches:
        ids, mask = fill_up(batch, padding=-1, positions=512)
        assert ids.numel() <= most or len(batch) == 1
        assert [row[valid].tolist() for row, valid in zip(ids, mask, strict=True)] == batch
    sizes = [fill_up(batch, -1, 512)[0].numel() for batch in batches[:-1]]
    assert all(size + fill_up(b[:1], -1, 512)[0].numel() > most for size, b in zip(sizes, batches, strict=False))
