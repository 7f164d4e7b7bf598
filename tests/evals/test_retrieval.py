"""Candidates, losses and ranks against sums written out in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from lorafold.data.pairs import Ids, Pair
from lorafold.evals.retrieval import Candidates, RetrievalScores, candidates_of, retrieval, scaled_cosines

A, B, C, D = ((n,) for n in range(4))
NONE: Ids = ()


def pairs(*rows: tuple[Ids, Ids, Ids]) -> list[Pair]:
    return [Pair(*row, number) for number, row in enumerate(rows)]


def test_candidates_are_distinct_and_positives_come_first() -> None:
    found = candidates_of(pairs((A, B, C), (C, D, NONE), (D, B, C)))
    assert found == Candidates([B, D, C], [0, 1, 0], [[], [], []])
    assert candidates_of(pairs((A, B, C), (C, D, NONE)), negatives=False).texts == [B, D]


def test_other_answers_to_the_same_anchor_are_not_wrong() -> None:
    """A goes with B and C; D's own positive B stays among A's rivals for its row with C only where it is no answer."""
    found = candidates_of(pairs((A, B, NONE), (A, C, NONE), (D, B, NONE)))
    assert found.others == [[1], [0], []]
    scores = scaled_cosines(torch.ones(3, 1), torch.ones(2, 1), found.others, 20.0)
    assert scores.tolist() == [[20, -math.inf], [-math.inf, 20], [20, 20]]


def test_loss_and_ranks_as_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, texts = (F.normalize(torch.randn(n, 8, generator=generator), dim=-1) for n in (6, 5))
    among = Candidates([A] * 5, [0, 1, 2, 3, 4, 0], [[], [3], [], [], [0, 1], []])
    found = retrieval(anchors, texts, among, 7.0)
    losses, ranks = [], []
    for i, right in enumerate(among.positive):
        scores = {j: 7 * float(anchors[i].double() @ texts[j].double()) for j in range(5) if j not in among.others[i]}
        losses.append(math.log(sum(map(math.exp, scores.values()))) - scores[right])
        ranks.append(sorted(scores, key=lambda j: -scores[j]).index(right) + 1)
    assert found.loss == pytest.approx(sum(losses) / 6, abs=1e-6)
    assert (found.ranks, found.candidates, found.rows) == (ranks, 5, 6)


def test_a_model_that_says_the_same_of_all_finds_nothing() -> None:
    """Equal scores count against the right one, and so do numbers that are not finite."""
    among = Candidates([A] * 4, [0, 1], [[], []])
    assert retrieval(torch.ones(2, 1), torch.ones(4, 1), among, 20.0).ranks == [4, 4]
    assert retrieval(torch.full((2, 1), torch.nan), torch.ones(4, 1), among, 20.0).ranks == [4, 4]


def test_figures_by_hand() -> None:
    found = RetrievalScores(1.5, [1, 2, 10, 11], 20)
    assert found.values() == {"recall_at_1": 0.25, "recall_at_10": 0.75, "mrr": (1 + 1 / 2 + 1 / 10 + 1 / 11) / 4}
    assert found.describe() == "recall@1 25.00%, recall@10 75.00%, MRR 0.4227, loss 1.5000"
    assert found.to_dict("after")["candidates_after"] == 20
