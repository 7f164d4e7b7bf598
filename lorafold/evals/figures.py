"""What the figures of every task have in common: a loss, a few numbers with names, and how these are written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

SHOWN = {  # key in summaries -> what it is called, and its format
    "accuracy": ("accuracy", ".2%"),
    "entity_f1": ("entity F1", ".4f"),
    "entity_precision": ("entity precision", ".4f"),
    "entity_recall": ("entity recall", ".4f"),
    "eval_loss": ("loss", ".4f"),
    "macro_f1": ("macro F1", ".4f"),
    "mrr": ("MRR", ".4f"),
    "recall_at_1": ("recall@1", ".2%"),
    "recall_at_10": ("recall@10", ".2%"),
}


@dataclass(frozen=True)
class Figures(ABC):
    """Figures of a model on some rows.

    Attributes:
        loss: mean cross-entropy in nats.
    """

    loss: float

    @property
    @abstractmethod
    def rows(self) -> int:
        """Over how many rows or words they are."""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """The figures by their keys in `SHOWN` without the loss, the most telling first."""

    def details(self) -> dict[str, object]:
        """What a summary holds besides."""
        return {}

    def to_dict(self, when: str) -> dict[str, object]:
        """Everything for a summary, such as `accuracy_before`."""
        every = {**self.values(), "eval_loss": self.loss, **self.details()}
        return {f"{key}_{when}": value for key, value in every.items()}

    def cells(self) -> dict[str, str]:
        """The figures as a table shows them, by name."""
        return {SHOWN[key][0]: written(key, value) for key, value in {**self.values(), "eval_loss": self.loss}.items()}

    def describe(self) -> str:
        """One line."""
        return ", ".join(f"{name} {value}" for name, value in self.cells().items())


def written(key: str, value: float) -> str:
    """A figure as text."""
    return format(value, SHOWN[key][1])
