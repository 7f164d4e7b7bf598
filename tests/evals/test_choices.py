"""Losses row by row and the choice of the likeliest, against transformers' own logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.evals.choices import choice_accuracy, row_losses
from lorafold.evals.loss import evaluate
from lorafold.models.load import LoadedModel, load
from tests.practice import row_losses as their_losses
from tests.practice import token_rows


@pytest.fixture(scope="module")
def loaded(tiny_file: Callable[..., Path]) -> LoadedModel:
    return load(tiny_file("llama", "Q4_1"))


def test_losses_of_rows(loaded: LoadedModel) -> None:
    """Each row's own, whatever it is packed with; together the mean that `evaluate` gives."""
    rows = token_rows(9)
    ours = row_losses(loaded, rows, max_tokens=60)
    with torch.no_grad():
        for row, (total, count) in zip(rows, ours, strict=True):
            torch.testing.assert_close(total, float(their_losses(loaded.model, [row])), rtol=1e-5, atol=1e-4)
            assert count == sum(row.supervised)
    mean = sum(total for total, _ in ours) / sum(count for _, count in ours)
    assert evaluate(loaded, rows) == pytest.approx(mean, rel=1e-5)


def test_the_likeliest_choice_is_taken(loaded: LoadedModel) -> None:
    rows = token_rows(12)
    means = [total / count for total, count in row_losses(loaded, rows)]
    questions = [rows[i : i + 4] for i in (0, 4, 8)]
    best = [min(range(4), key=lambda j, i=i: means[i + j]) for i in (0, 4, 8)]
    done: list[int] = []
    assert choice_accuracy(loaded, questions, best, done.append) == 1.0
    assert choice_accuracy(loaded, questions, [(b + 1) % 4 for b in best]) == 0.0
    assert choice_accuracy(loaded, questions, [best[0], best[1], (best[2] + 1) % 4]) == pytest.approx(2 / 3)
    assert sum(done) == 3
