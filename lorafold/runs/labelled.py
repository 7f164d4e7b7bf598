"""From a data configuration to rows with labels: read, hold out, find the labels, and say aloud what was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafold.config import DataConfig, RunConfig, TaskConfig
from lorafold.data.labels import Labelled, label_names, numbered, texts_and_labels, tokenize_labelled
from lorafold.data.read import Rows, has_split, read_rows, split_rows
from lorafold.errors import DataError
from lorafold.runs.display import Display
from lorafold.runs.folder import Run

Texts = list[tuple[int, str, str]]


@dataclass(frozen=True)
class LabelledData:
    """Rows of a classification run: number, text and label each.

    Attributes:
        train, held_out: the rows.
        labels: of the model, in the order of its outputs.
        fingerprint: sha256 of the training file(s).
        eval_fingerprint: sha256 of the held-out file(s); None when a part of the data was held out.
    """

    train: Texts
    held_out: Texts
    labels: list[str]
    fingerprint: str
    eval_fingerprint: str | None

    def tokenized(self, tokenizer: Any, max_length: int, display: Display) -> tuple[list[Labelled], list[Labelled]]:
        """Training and held-out rows as tokens.

        Raises:
            DataError: rows have labels that the model does not.
        """
        parts = []
        for whose, rows in (("training", self.train), ("held-out", self.held_out)):
            tokens = tokenize_texts(rows, self.labels, tokenizer, max_length, f"the {whose} rows")
            cut = sum(len(row.ids) == max_length for row in tokens)
            counts = Counter(self.labels[row.label] for row in tokens)
            listed = ", ".join(f"{label} {counts[label]:,}" for label in self.labels[:12])
            longer = f"; {cut:,} rows reach {max_length} tokens, where they are cut (--max-length)" if cut else ""
            display.say(f"{whose} data: {len(tokens):,} rows ({listed}){longer}")
            parts.append(tokens)
        return parts[0], parts[1]


def tokenize_texts(
    rows: Texts, labels: Sequence[str], tokenizer: Any, max_length: int, whose: str = "the rows"
) -> list[Labelled]:
    """Rows as tokens with the numbers of their labels.

    Raises:
        DataError: rows have labels that the model does not.
    """
    numbers = numbered((label for _, _, label in rows), labels, whose)
    return tokenize_labelled(rows, numbers, tokenizer, max_length)


def read_labelled(config: RunConfig, known: Sequence[str] | None) -> LabelledData:
    """Read training and held-out rows and find their labels.

    Args:
        known: labels of a head that is trained already; otherwise the labels of the training rows are the model's.

    Raises:
        DataError: whatever is wrong with the files, rows, labels or the template.
    """
    data, task = config.data, config.task
    split = "train" if data.data.is_dir() and has_split(data.data, "train") else None
    rows, other = read_rows(data.data, split), _other_rows(data)
    if other is None:
        train, held = split_rows(rows, data.eval_fraction, config.training.seed, data.limit)
        held = held[: data.eval_limit]
    else:
        train, held = range(len(rows))[: data.limit], range(len(other))[: data.eval_limit]
    texts, held_texts = _texts(rows, train, task), _texts(rows if other is None else other, held, task)
    found = label_names(label for _, _, label in texts)
    return LabelledData(
        texts,
        held_texts,
        list(known or found),
        rows.fingerprint(),
        other.fingerprint() if other else None,
    )


def held_out_texts(run: Run, data: Path | None = None) -> Texts:
    """The held-out rows of a run, or all rows of another file read in the same way.

    Raises:
        DataError: the run's data have changed since.
    """
    if data is not None:
        return all_texts(replace(run.config.data, data=data, limit=None), run.config.task)
    read = read_labelled(run.config, None)
    now = (read.fingerprint, read.eval_fingerprint)
    if now != (run.summary.get("data_sha256", now[0]), run.summary.get("eval_data_sha256", now[1])):
        raise DataError(
            f"{run.config.data.data}: changed since the run was trained, so its held-out rows are no longer known; put "
            "the old file back, or give other rows with --data"
        )
    return read.held_out


def all_texts(config: Any, task: TaskConfig) -> Texts:
    """All rows of the data, up to `limit`."""
    rows = read_rows(config.data)
    return _texts(rows, range(len(rows))[: config.limit], task)


def _other_rows(config: DataConfig) -> Rows | None:
    """Held-out rows that do not come from the training rows: eval_data, or the split of a folder."""
    if config.eval_data is not None:
        return read_rows(config.eval_data)
    if config.data.is_dir() and has_split(config.data, "train"):
        found = next((split for split in ("valid", "dev", "test") if has_split(config.data, split)), None)
        return read_rows(config.data, found) if found else None
    return None


def _texts(rows: Rows, index: Iterable[int], task: TaskConfig) -> Texts:
    return texts_and_labels(((int(i), rows[int(i)]) for i in index), rows.columns, task.text, task.label_column)
