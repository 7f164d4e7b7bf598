"""How well texts are found by the vectors of others: the place of the right one among all, and its loss.

InfoNCE (arXiv 1807.03748; as multiple negatives ranking arXiv 1705.00652), for anchor a with positive p:

    loss = -log( exp(s cos(a, p)) / sum over c of exp(s cos(a, c)) )

The candidates are the distinct texts among the positives and hard negatives of the rows at hand. A text that several
rows have stands there once, and what another row gives as the answer to the same anchor is left out of that anchor's
sum: neither is wrong.
"""

# N rows, C candidates, H width

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.data.pairs import Ids, Pair
from lorafold.evals.figures import Figures

_AT_ONCE = 512  # anchors whose cosines with all candidates exist at once


@dataclass(frozen=True)
class RetrievalScores(Figures):
    """Figures of an embedding model on pairs.

    Attributes:
        loss: mean InfoNCE of the pairs, nats, with the positives of all pairs as candidates.
        ranks: place of each pair's positive among the candidates, from 1.
        candidates: how many there are.
    """

    ranks: list[int]
    candidates: int

    @property
    def rows(self) -> int:
        """How many pairs."""
        return len(self.ranks)

    def recall(self, k: int) -> float:
        """Share of the anchors whose positive is among the first k."""
        return sum(rank <= k for rank in self.ranks) / len(self.ranks)

    def values(self) -> dict[str, float]:
        """Recall at 1 and 10, and the mean reciprocal rank."""
        mean = sum(1 / rank for rank in self.ranks) / len(self.ranks)
        return {"recall_at_1": self.recall(1), "recall_at_10": self.recall(10), "mrr": mean}

    def details(self) -> dict[str, object]:
        """Among how many they were found."""
        return {"candidates": self.candidates}


@dataclass(frozen=True)
class Candidates:
    """The texts among which the positives of some rows are looked for.

    Attributes:
        texts: distinct ones, as tokens.
        positive: of each row, the number of its positive among them.
        others: of each row, the numbers of other right answers.
    """

    texts: list[Ids]
    positive: list[int]
    others: list[list[int]]


def candidates_of(rows: Sequence[Pair], negatives: bool = True) -> Candidates:
    """The candidates of some rows, in order of appearance, positives first."""
    every = chain((r.positive for r in rows), (r.negative for r in rows if r.negative and negatives))
    number = {text: i for i, text in enumerate(dict.fromkeys(every))}
    right: dict[Ids, set[int]] = defaultdict(set)
    for row in rows:
        right[row.anchor].add(number[row.positive])
    positive = [number[row.positive] for row in rows]
    others = [sorted(right[row.anchor] - {own}) for row, own in zip(rows, positive, strict=True)]
    return Candidates(list(number), positive, others)


def scaled_cosines(anchors: Tensor, texts: Tensor, others: Sequence[Sequence[int]], scale: float) -> Tensor:
    """Scaled cosines [N, C] of vectors of length 1, [N, H] and [C, H]; -inf for other right answers."""
    scores = scale * anchors @ texts.T
    places = [(i, j) for i, columns in enumerate(others) for j in columns]
    if not places:
        return scores
    rows, columns = torch.tensor(places, device=scores.device).T
    return scores.index_put((rows, columns), scores.new_tensor(-torch.inf))


@torch.no_grad()
def retrieval(anchors: Tensor, texts: Tensor, among: Candidates, scale: float) -> RetrievalScores:
    """Figures from the vectors of anchors [N, H] and candidates [C, H]; among equal ones the right one is last."""
    losses, ranks = [], []
    for start in range(0, len(anchors), _AT_ONCE):
        here = slice(start, start + _AT_ONCE)
        scores = scaled_cosines(anchors[here], texts, among.others[here], scale)
        right = torch.tensor(among.positive[here], device=scores.device)
        losses += F.cross_entropy(scores, right, reduction="none").tolist()
        ranks += (~(scores < scores.gather(1, right[:, None]))).sum(1).tolist()
    return RetrievalScores(sum(losses) / len(losses), ranks, len(texts))
