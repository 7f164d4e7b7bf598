"""What differs between tasks: how rows are read and become tokens, what is loaded, minimized and shown.

The loop, the run folder and the evaluation are the same for all (`fine_tune.py`, `score.py`). A task is made from its
options; once the labels of a run are known, `with_labels` makes the one that has them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from lorafold.config import AdapterSpec, RunConfig, TaskConfig
from lorafold.data.labels import label_names, numbered, texts_and_labels, tokenize_labelled
from lorafold.data.pairs import pair_texts, tokenize_pairs
from lorafold.data.read import Rows
from lorafold.data.tags import tokenize_tagged, words_and_tags
from lorafold.errors import DataError
from lorafold.models.classifier import adapter_labels, known_labels, load_classifier, new_modules
from lorafold.models.encoder import load_encoder
from lorafold.models.load import LoadedModel
from lorafold.models.positions import longest_row
from lorafold.train.loop import rows_per_step
from lorafold.train.objectives import InfoNCE, Objective, classify_texts, classify_words


@dataclass(frozen=True)
class Tokenized:
    """Rows as tokens.

    Attributes:
        rows: those that something can be learned from.
        described: what they are, and what was cut, in one line.
    """

    rows: list[Any]
    described: str


@dataclass(frozen=True)
class Task(ABC):
    """One task.

    Attributes:
        config: its options.
        labels: of the model, in the order of its outputs; none where a task has none, or as long as they are unknown.
    """

    config: TaskConfig
    labels: tuple[str, ...] = ()
    counted: ClassVar[str] = "rows"  # what figures are over

    @abstractmethod
    def read(self, rows: Rows, index: Iterable[int]) -> list[Any]:
        """Some rows, checked.

        Raises:
            DataError: columns or rows are not what the task needs.
        """

    @abstractmethod
    def with_labels(self, model: str, rows: Sequence[Any]) -> Task:
        """The task with the labels of a model to be trained: those of its head, or else those of the training rows."""

    @abstractmethod
    def trained(self, model: str, adapter: Path | None) -> Task | None:
        """The task with the labels of what is trained already; None where nothing is."""

    @abstractmethod
    def load(self, model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
        """The model with what the task needs of it."""

    @abstractmethod
    def tokenized(self, rows: Sequence[Any], loaded: LoadedModel, max_length: int, whose: str = "rows") -> Tokenized:
        """Rows as tokens, at most as many as the model has positions for.

        Raises:
            DataError: they cannot be used with the labels of the task.
        """

    @property
    @abstractmethod
    def objective(self) -> Objective:
        """What is minimized and measured."""

    @abstractmethod
    def faults(self, config: RunConfig) -> list[str]:
        """Options of a run that do not go with the task."""

    def whole_too(self, spec: AdapterSpec, loaded: LoadedModel) -> AdapterSpec:  # noqa: ARG002
        """The spec that also trains whole what is new in the model."""
        return spec


@dataclass(frozen=True)
class _WithLabels(Task):
    """A head for labels that are found in the rows."""

    @abstractmethod
    def label_column(self, rows: Sequence[Any]) -> Iterable[str]:
        """All labels of some rows."""

    def with_labels(self, model: str, rows: Sequence[Any]) -> Task:
        """See `Task`.

        Raises:
            DataError: there are too few labels, or the names that were given are not those of the head.
        """
        known = self.trained(model, None)
        names = self.config.label_names
        return known or replace(self, labels=tuple(names or label_names(self.label_column(rows))))

    def trained(self, model: str, adapter: Path | None) -> Task | None:
        """See `Task`.

        Raises:
            DataError: the names that were given are not those of the head.
        """
        labels = adapter_labels(adapter, self.config.task) if adapter else known_labels(model, self.config.task)
        names = self.config.label_names
        if labels and names and list(names) != labels:
            raise DataError(
                f"label_names are {len(names)}: {', '.join(names)}; the head of {adapter or model} has {len(labels)}: "
                f"{', '.join(labels)}. Leave --label-names out, or train a base without a head for this task"
            )
        return replace(self, labels=tuple(labels)) if labels else None

    def load(self, model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
        """See `Task`."""
        return load_classifier(model, self.labels, dtype, device, self.config.task)

    def faults(self, config: RunConfig) -> list[str]:  # noqa: ARG002
        """See `Task`."""
        return []

    def whole_too(self, spec: AdapterSpec, loaded: LoadedModel) -> AdapterSpec:
        """See `Task`: the head, and whatever else the folder lacks."""
        return replace(spec, modules_to_save=tuple(dict.fromkeys((*spec.modules_to_save, *new_modules(loaded)))))

    def listed(self, labels: Iterable[int]) -> str:
        """How often each of the first labels is there."""
        counts = Counter(labels)
        more = f", and {len(self.labels) - 12} more labels" if len(self.labels) > 12 else ""
        return ", ".join(f"{label} {counts[i]:,}" for i, label in enumerate(self.labels[:12])) + more


@dataclass(frozen=True)
class Classification(_WithLabels):
    """One label for each text; rows are (number, text, label)."""

    def read(self, rows: Rows, index: Iterable[int]) -> list[Any]:
        """See `Task`."""
        given = ((int(i), rows[int(i)]) for i in index)
        return texts_and_labels(given, rows.columns, self.config.text, self.config.label_column)

    def label_column(self, rows: Sequence[Any]) -> Iterable[str]:
        """See `_WithLabels`."""
        return (label for _, _, label in rows)

    def tokenized(self, rows: Sequence[Any], loaded: LoadedModel, max_length: int, whose: str = "rows") -> Tokenized:
        """See `Task`."""
        longest = longest_row(loaded, max_length)
        numbers = numbered(self.label_column(rows), self.labels, whose, by_number=bool(self.config.label_names))
        tokens = tokenize_labelled(rows, numbers, loaded.tokenizer, longest)
        cut = sum(len(row) == longest for row in tokens)
        longer = f"; {cut:,} rows reach {longest} tokens, where they are cut (--max-length)" if cut else ""
        return Tokenized(tokens, f"{len(tokens):,} rows ({self.listed(row.label for row in tokens)}){longer}")

    @property
    def objective(self) -> Objective:
        """See `Task`."""
        return classify_texts(self.labels)


@dataclass(frozen=True)
class TokenClassification(_WithLabels):
    """One tag for each word; rows are (number, words, tags)."""

    counted: ClassVar[str] = "words"

    def read(self, rows: Rows, index: Iterable[int]) -> list[Any]:
        """See `Task`."""
        given = ((int(i), rows[int(i)]) for i in index)
        return words_and_tags(given, rows.columns, self.config.words_column, self.config.tags_column)

    def label_column(self, rows: Sequence[Any]) -> Iterable[str]:
        """See `_WithLabels`."""
        return (tag for _, _, tags in rows for tag in tags)

    def tokenized(self, rows: Sequence[Any], loaded: LoadedModel, max_length: int, whose: str = "rows") -> Tokenized:
        """See `Task`."""
        longest, named = longest_row(loaded, max_length), bool(self.config.label_names)
        numbers = numbered(self.label_column(rows), self.labels, whose, by_number=named, of="words")
        every = tokenize_tagged(rows, numbers, loaded.tokenizer, longest)
        kept = [row for row in every if row.labels]
        if not kept:
            raise DataError(f"no word of {whose} has a token within {longest} tokens; raise --max-length")
        words = sum(len(row.labels) for row in kept)
        listed = self.listed(tag for row in kept for tag in row.labels)
        return Tokenized(kept, f"{len(kept):,} rows, {words:,} words ({listed}){_lost(every, longest)}")

    @property
    def objective(self) -> Objective:
        """See `Task`."""
        return classify_words(self.labels)


def _lost(rows: Sequence[Any], longest: int) -> str:
    """What of the tags is neither learned nor measured."""
    cut, without = sum(row.cut for row in rows), sum(row.without for row in rows)
    count = sum(row.cut > 0 for row in rows)
    lost = f"; warning: {cut:,} tags are lost: {count:,} rows are cut at {longest} tokens (--max-length)" if cut else ""
    return lost + (f"; warning: {without:,} tags are lost: their words make no token" if without else "")


@dataclass(frozen=True)
class Embedding(Task):
    """Vectors of texts; rows are (number, anchor, positive, negative)."""

    counted: ClassVar[str] = "pairs"

    def read(self, rows: Rows, index: Iterable[int]) -> list[Any]:
        """See `Task`."""
        given = ((int(i), rows[int(i)]) for i in index)
        return pair_texts(given, rows.columns, self.config.anchor, self.config.positive, self.config.negative)

    def with_labels(self, model: str, rows: Sequence[Any]) -> Task:  # noqa: ARG002
        """See `Task`: there are none."""
        return self

    def trained(self, model: str, adapter: Path | None) -> Task | None:  # noqa: ARG002
        """See `Task`: every encoder gives vectors."""
        return self

    def load(self, model: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
        """See `Task`."""
        return load_encoder(model, dtype, device)

    def tokenized(self, rows: Sequence[Any], loaded: LoadedModel, max_length: int, whose: str = "rows") -> Tokenized:
        """See `Task`."""
        longest = longest_row(loaded, max_length)
        pairs = tokenize_pairs(rows, loaded.tokenizer, longest)
        positives = len({pair.positive for pair in pairs})
        if positives < 2:
            raise DataError(f"the positives of {whose} are one text, so there is nothing to tell apart (--positive)")
        cut = sum(len(text) == longest for p in pairs for text in (p.anchor, p.positive, p.negative))
        longer = f"; {cut:,} texts reach {longest} tokens, where they are cut (--max-length)" if cut else ""
        hard = sum(bool(pair.negative) for pair in pairs)
        beside = f", {hard:,} hard negatives" if hard else ""
        return Tokenized(pairs, f"{len(pairs):,} pairs, {positives:,} different positives{beside}{longer}")

    @property
    def objective(self) -> Objective:
        """See `Task`."""
        return InfoNCE(self.config.scale)

    def faults(self, config: RunConfig) -> list[str]:
        """See `Task`."""
        faults = []
        if config.adapter.method == "head":
            faults.append("an embedding model has no head to train; use --method lora, last-layers or full")
        if rows_per_step(config.training) < 2:
            faults.append("a step of one row has nothing to tell its positive from; raise per_device_train_batch_size")
        return faults


TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "token-classification": TokenClassification,
    "embedding": Embedding,
}


def task_of(config: TaskConfig) -> Task:
    """The task that some options mean."""
    return TASKS[config.task](config)
