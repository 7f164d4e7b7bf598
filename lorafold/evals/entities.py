"""How well entities are found: precision, recall and F1 of the spans that BIO tags mean.

An entity is found where type, first and last word are right, as in the shared task CoNLL-2003 and its conlleval. Tags
that break the scheme count as there: an I- after O, or after another type, begins an entity.

words      Ada     Lovelace   of   London
tags       B-PER   I-PER      O    I-LOC         PER 0-1, LOC 3
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from lorafold.evals.classes import Scores, confusion_of

Entity = tuple[str, int, int]  # type, first and last word
_BIO = re.compile(r"O|[BI]-.+", re.DOTALL)


@dataclass(frozen=True)
class Found:
    """Entities of one type, or of all.

    Attributes:
        right: predicted with the right type and the right ends.
        predicted, true: how many are predicted, and how many there are.
    """

    right: int
    predicted: int
    true: int

    @property
    def precision(self) -> float:
        """Share of the predicted ones that are right; 0 where none are predicted."""
        return self.right / max(self.predicted, 1)

    @property
    def recall(self) -> float:
        """Share of the true ones that are found; 0 where there are none."""
        return self.right / max(self.true, 1)

    @property
    def f1(self) -> float:
        """F1 = 2 TP / (predicted + true)."""
        return 2 * self.right / max(self.predicted + self.true, 1)


@dataclass(frozen=True)
class TagScores(Scores):
    """Figures of a tagger on the words of some rows.

    Attributes:
        entities: of each type, in the order of the alphabet; None where the tags are not BIO.
    """

    entities: dict[str, Found] | None

    @property
    def all_entities(self) -> Found:
        """Of all types together."""
        each = (self.entities or {}).values()
        return Found(sum(f.right for f in each), sum(f.predicted for f in each), sum(f.true for f in each))

    def values(self) -> dict[str, float]:
        """Entity F1, precision and recall over all types where the tags are BIO; accuracy and macro F1 of words."""
        every = self.all_entities
        found = {"entity_f1": every.f1, "entity_precision": every.precision, "entity_recall": every.recall}
        return {**(found if self.entities is not None else {}), **super().values()}

    def details(self) -> dict[str, object]:
        """Who is taken for whom, and the figures of each type."""
        if self.entities is None:
            return super().details()
        each = {
            kind: {"precision": f.precision, "recall": f.recall, "f1": f.f1, "predicted": f.predicted, "true": f.true}
            for kind, f in self.entities.items()
        }
        return {**super().details(), "entities": each}


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities that the BIO tags of a row mean, in order."""
    found: list[Entity] = []
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        goes_on = prefix == "I" and i > 0 and tags[i - 1] in (f"B-{kind}", tag)
        if goes_on:
            found[-1] = (kind, found[-1][1], i)
        elif prefix != "O":
            found.append((kind, i, i))
    return found


def tag_scores(
    losses: Sequence[float], predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Sequence[str]
) -> TagScores:
    """Figures from the loss of each word and the predicted and true tags of each row.

    Args:
        labels: names of the tags, by number.
    """
    confusion = confusion_of([*chain(*predicted)], [*chain(*true)], len(labels))
    found = _found(predicted, true, labels) if all(_BIO.fullmatch(label) for label in labels) else None
    return TagScores(float(np.mean(losses)), confusion, found)


def _found(
    predicted: Sequence[Sequence[int]], true: Sequence[Sequence[int]], labels: Sequence[str]
) -> dict[str, Found]:
    right, guessed, there = Counter[str](), Counter[str](), Counter[str]()
    for row in zip(predicted, true, strict=True):
        ours, theirs = ({*entities([labels[tag] for tag in tags])} for tags in row)
        for counter, some in ((right, ours & theirs), (guessed, ours), (there, theirs)):
            counter.update(kind for kind, _, _ in some)
    return {kind: Found(right[kind], guessed[kind], there[kind]) for kind in sorted(guessed | there)}
