"""Texts that belong together: an anchor, its positive and, if there is one, a hard negative."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafold.data.fill import columns_of, fill
from lorafold.data.labels import refuse_rows

Texts = tuple[int, str, str, str]  # number of the row, anchor, positive, and negative or nothing
Ids = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One row as tokens, special tokens included.

    Attributes:
        anchor: the text that is asked with.
        positive: the text that belongs to it.
        negative: a text that does not; empty if there is none.
        row: number of the row in the file.
    """

    anchor: Ids
    positive: Ids
    negative: Ids
    row: int

    def __len__(self) -> int:
        return len(self.anchor) + len(self.positive) + len(self.negative)


def pair_texts(
    rows: Iterable[tuple[int, Mapping[str, Any]]],
    columns: Sequence[str],
    anchor: str,
    positive: str,
    negative: str | None,
) -> list[Texts]:
    """(number, anchor, positive, negative) of each row, by three templates.

    Raises:
        DataError: a template names no column, or anchor or positive of a row is empty; up to ten rows are named.
    """
    for template in filter(None, (anchor, positive, negative)):
        columns_of(template, columns)
    found, faults = [], []
    for number, row in rows:
        texts = [fill(template, row) if template else "" for template in (anchor, positive, negative)]
        empty = [name for name, text in zip(("anchor", "positive"), texts, strict=False) if not text.strip()]
        if empty:
            faults.append(f"row {number}: {' and '.join(empty)} empty")
        found.append((number, texts[0], texts[1], texts[2] if texts[2].strip() else ""))
    refuse_rows("rows that are no pair (--anchor, --positive)", faults)
    return found


def tokenize_pairs(rows: Sequence[Texts], tokenizer: Any, max_length: int) -> list[Pair]:
    """Rows as tokens, each text cut on the right to `max_length` special tokens included."""

    def ids(texts: Sequence[str]) -> list[Ids]:
        return [tuple(t) for t in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]

    anchors, positives = ids([anchor for _, anchor, _, _ in rows]), ids([positive for _, _, positive, _ in rows])
    given = [negative for _, _, _, negative in rows if negative]
    negatives = iter(ids(given) if given else ())
    return [
        Pair(anchor, positive, next(negatives) if row[3] else (), row[0])
        for row, anchor, positive in zip(rows, anchors, positives, strict=True)
    ]
