"""Agreement of torch with a runtime, on a runtime whose answers are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafold.data.tokens import Tokens
from lorafold.evals.compare import Agreement, agreement, runtime_loss
from lorafold.evals.loss import evaluate
from lorafold.models.load import LoadedModel, load
from tests.practice import token_rows


class Runtime:
    """Gives the torch model's logits, changed, in blocks of 7 positions."""

    def __init__(self, loaded: LoadedModel, change: Callable[[torch.Tensor], torch.Tensor] = lambda x: x):
        self.loaded, self.change = loaded, change

    def logits(self, ids: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        with torch.no_grad():
            logits = self.change(self.loaded.model(torch.tensor([ids])).logits[0])
        for start in range(0, len(ids), 7):
            yield start, logits[start : start + 7].numpy()


@pytest.fixture(scope="module")
def loaded(tiny_file: Callable[..., Path]) -> LoadedModel:
    return load(tiny_file("llama", "Q4_1"))


ROWS = [*token_rows(5), *token_rows(1, 7, 7, seed=1), *token_rows(1, 8, 8, seed=2)]  # also at a block's border


def compared(loaded: LoadedModel, runtime: Any, rows: list[Tokens] = ROWS, tokens: int = 10_000) -> Agreement:
    return agreement(loaded, runtime, rows, tokens)


def test_the_same_model_agrees(loaded: LoadedModel) -> None:
    found = compared(loaded, Runtime(loaded))
    assert found.tokens == sum(len(row) - 1 for row in ROWS)
    assert found.mean_kl == pytest.approx(0, abs=1e-6)
    assert (found.top1, found.loss_gap) == (1.0, pytest.approx(0, abs=1e-6))


def test_figures_of_another_model(loaded: LoadedModel) -> None:
    """Logits halved: the same order of tokens, and KL and losses as written out here."""
    found = compared(loaded, Runtime(loaded, lambda logits: logits / 2))
    kl, ours, theirs, count = 0.0, 0.0, 0.0, 0
    for row in ROWS:
        ids = torch.tensor(row.ids)
        with torch.no_grad():
            logits = loaded.model(ids[None]).logits[0, :-1].double()
        p, q = logits.softmax(-1), (logits / 2).softmax(-1)
        kl += float((p * (p / q).log()).sum())
        chosen = torch.arange(len(ids) - 1), ids[1:]
        ours -= float(p[chosen].log().sum())
        theirs -= float(q[chosen].log().sum())
        count += len(ids) - 1
    assert found.mean_kl == pytest.approx(kl / count, rel=1e-4)
    assert found.mean_kl > 0.1
    assert found.loss_torch == pytest.approx(ours / count, rel=1e-5)
    assert found.loss_runtime == pytest.approx(theirs / count, rel=1e-5)
    assert found.top1 == 1.0


def test_top1_counts_positions(loaded: LoadedModel) -> None:
    """A runtime that is certain of token 0 agrees where torch says 0 as well."""

    def certain(logits: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(logits).index_fill(1, torch.tensor([0]), 9.0)

    hits = 0
    for row in ROWS:
        with torch.no_grad():
            hits += int((loaded.model(torch.tensor([row.ids])).logits[0, :-1].argmax(-1) == 0).sum())
    found = compared(loaded, Runtime(loaded, certain))
    assert found.top1 == pytest.approx(hits / found.tokens)


def test_stops_after_enough_tokens(loaded: LoadedModel) -> None:
    first = len(ROWS[0]) - 1
    assert compared(loaded, Runtime(loaded), tokens=1).tokens == first
    assert compared(loaded, Runtime(loaded), tokens=first).tokens == first
    assert compared(loaded, Runtime(loaded), tokens=first + 1).tokens == first + len(ROWS[1]) - 1


def test_runtime_loss_is_over_supervised_tokens(loaded: LoadedModel) -> None:
    runtime: Any = Runtime(loaded)
    assert runtime_loss(runtime, ROWS) == pytest.approx(evaluate(loaded, ROWS), rel=1e-5)


NULL = Agreement(1000, mean_kl=1e-3, top1=0.97, loss_torch=2.0, loss_runtime=2.003)


@pytest.mark.parametrize(
    ("found", "broken"),
    [
        (Agreement(1000, 1.49e-3, 0.946, 1.5, 1.5049), []),
        (Agreement(1000, 1.49e-3, 0.946, 1.5049, 1.5), []),
        (Agreement(1000, 1.51e-3, 0.97, 1.5, 1.5), ["mean KL 1.51e-03 is over 1.50e-03"]),
        (Agreement(1000, 0.0, 0.944, 1.5, 1.5), ["top-1 agreement 94.40% is over 2.5 points"]),
        (Agreement(10**6, 0.0, 0.9595, 1.5, 1.5), ["top-1 agreement 95.95% is over 1.0 points"]),
        (Agreement(1000, 0.0, 1.0, 1.5, 1.4949), ["the losses are 0.0051 apart"]),
        (Agreement(1000, 1.0, 0.5, 2.0, 1.0), ["mean KL", "top-1", "the losses"]),
    ],
)
def test_bounds_relative_to_the_null_run(found: Agreement, broken: list[str]) -> None:
    """KL to 1.5 times; top-1 to a point lower and two standard errors of sqrt(2 x 0.97 x 0.03 / T); losses to 0.002
    further apart."""
    said = found.as_close_as(NULL)
    assert len(said) == len(broken)
    for text, expected in zip(said, broken, strict=True):
        assert expected in text


def test_few_tokens_are_judged_by_the_kl_alone() -> None:
    """Of 85 predictions three more or fewer agree by chance."""
    null = Agreement(999, mean_kl=1e-3, top1=0.97, loss_torch=2.0, loss_runtime=2.003)
    assert Agreement(999, 1.49e-3, 0.90, 1.5, 1.6).as_close_as(null) == []
    assert len(Agreement(999, 1.51e-3, 0.90, 1.5, 1.6).as_close_as(null)) == 1


def test_what_rounding_leaves_is_no_difference() -> None:
    null = Agreement(164, -6e-9, 1.0, 1.5, 1.5)
    assert Agreement(164, -8e-9, 1.0, 1.5, 1.5).as_close_as(null) == []
    assert Agreement(164, 2e-6, 1.0, 1.5, 1.5).as_close_as(null)


@pytest.mark.parametrize(("null", "most"), [(1e-4, 3e-4), (2e-4, 5e-4), (3.2e-4, 5e-4), (4e-4, 6e-4)])
def test_means_that_a_few_tokens_make_may_differ_more(null: float, most: float) -> None:
    """As those of MLX in float16, where nothing else has been rounded."""
    untouched = Agreement(500, null, 0.99, 1.5, 1.5)
    assert Agreement(500, 0.99 * most, 0.99, 1.5, 1.5).as_close_as(untouched) == []
    assert len(Agreement(500, 1.01 * most, 0.99, 1.5, 1.5).as_close_as(untouched)) == 1


def test_what_is_not_a_number_is_not_close() -> None:
    nan = float("nan")
    assert Agreement(1000, nan, 0.99, 1.5, nan).as_close_as(NULL)
