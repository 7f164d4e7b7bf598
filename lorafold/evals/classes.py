"""How well labels are predicted: accuracy, F1 of each label and their mean, and who is taken for whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorafold.evals.figures import Figures


@dataclass(frozen=True)
class Scores(Figures):
    """Figures of a classifier on some rows, or on the words of some rows.

    Attributes:
        loss: mean cross-entropy, nats per row (or word).
        confusion: [true label][predicted label] -> rows.
    """

    confusion: list[list[int]]

    @property
    def rows(self) -> int:
        """How many rows (or words)."""
        return int(np.sum(self.confusion))

    @property
    def accuracy(self) -> float:
        """Share of the rows whose label is predicted."""
        return float(np.trace(np.array(self.confusion)) / self.rows)

    @property
    def f1(self) -> list[float]:
        """F1 = 2 TP / (2 TP + FP + FN) of each label; 0 where a label is neither there nor predicted."""
        table = np.array(self.confusion)
        of_label = table.sum(0) + table.sum(1)
        return (2 * table.diagonal() / np.maximum(of_label, 1)).tolist()

    @property
    def macro_f1(self) -> float:
        """Mean of the F1 of the labels that are there or predicted, each weighted alike."""
        table = np.array(self.confusion)
        return float(np.mean(np.array(self.f1)[table.sum(0) + table.sum(1) > 0]))

    def values(self) -> dict[str, float]:
        """Accuracy and macro F1."""
        return {"accuracy": self.accuracy, "macro_f1": self.macro_f1}

    def details(self) -> dict[str, object]:
        """Who is taken for whom."""
        return {"confusion": self.confusion}


def scores(losses: Sequence[float], predicted: Sequence[int], true: Sequence[int], labels: int) -> Scores:
    """Figures from the loss, the predicted and the true label of each row."""
    return Scores(float(np.mean(losses)), confusion_of(predicted, true, labels))


def confusion_of(predicted: Sequence[int], true: Sequence[int], labels: int) -> list[list[int]]:
    """[true label][predicted label] -> how often."""
    table = np.zeros((labels, labels), dtype=int)
    np.add.at(table, (np.array(true), np.array(predicted)), 1)
    return table.tolist()
