"""Rows too many to be kept as tokens: a sample is tokenized at the start, each other row when a step wants it.

What can be said of all rows without tokenizing them is checked before: files, columns and cells. What a template
refuses, and an answer that begins after `max_length` tokens, is found in the sample or when the row is met.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from lorafold.data.rows import Converter, Example
from lorafold.data.tokens import Tokens, describe_lost, tokenize, tokenize_each

KEPT_ROWS, KEPT_BYTES = 10_000, 20_000_000  # up to so many, of so much text, are tokenized at once and kept
_SPREAD, _LONGEST = 1000, 64  # rows of the sample: evenly over all, and those with the most text
_BATCH = 1000  # rows tokenized at once when all are asked for
_T = TypeVar("_T")


class Source(Protocol):
    """What a stream wants of `read.Rows`, whose library takes 90 MB that training by itself does not need."""

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        """One row."""
        ...

    def sizes(self) -> np.ndarray:
        """Bytes of text of each row."""
        ...


def sampled(rows: Sequence[Tokens] | RowStream) -> list[Tokens]:
    """All rows that are in memory; of a stream those that it has tried, the longest texts among them."""
    return rows.sample if isinstance(rows, RowStream) else list(rows)


class RowStream:
    """Rows that become tokens when they are wanted; `len()` counts those that have nothing to learn as well.

    Args:
        rows: where they come from.
        index: numbers of the rows to take, int64 [N]; each can become an example.
        convert: makes examples of them.
        tokenizer, template, max_length, supervise: as for `tokenize`.

    Attributes:
        sample: tokens of some rows, those with the most text among them.
        cut, cut_tokens, dropped: as of `Tokenized`, of the rows that were met so far.

    Raises:
        ConfigError, DataError: as `tokenize`, for the sample.
    """

    def __init__(
        self,
        rows: Source,
        index: np.ndarray,
        convert: Converter,
        tokenizer: Any,
        template: str,
        max_length: int,
        supervise: Literal["completion", "all"],
    ):
        self._rows, self._index, self._convert, self._tokenizer = rows, index, convert, tokenizer
        self._options: tuple[Any, ...] = (template, max_length, supervise)
        self._met = np.zeros(len(index), bool)
        self.cut = self.cut_tokens = 0
        self.dropped: list[int] = []
        spread = np.linspace(0, len(index) - 1, min(_SPREAD, len(index))).astype(np.int64)
        self._spread = tokenize(
            self._examples(spread), tokenizer, template=template, max_length=max_length, supervise=supervise
        )
        most_text = np.argsort(rows.sizes()[index])[-_LONGEST:]
        self.sample = self._spread.rows + self._take(most_text)

    @property
    def rows(self) -> RowStream:
        """Itself, where `Tokenized` has its rows."""
        return self

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Tokens]:
        for start in range(0, len(self), _BATCH):
            yield from self._take(range(start, min(start + _BATCH, len(self))))

    def batch(self, positions: Sequence[int]) -> list[Tokens]:
        """The rows at some positions that have something to learn; if none has, the next one of all that has.

        Raises:
            DataError: a conversation does not fit the template; names the row.
        """
        found, following = self._take(positions), positions[-1]
        while not found:  # ends, for the sample has rows with something to learn
            following = (following + 1) % len(self)
            found = self._take([following])
        return found

    def describe(self) -> str:
        """What the sample says about all rows."""
        spread = self._spread
        tokens, learned = sum(map(len, spread.rows)), sum(sum(row.supervised) for row in spread.rows)
        return (
            f"{len(self):,} rows, tokenized when they are needed. Of {len(spread.rows) + len(spread.dropped):,} tried: "
            f"{tokens / len(spread.rows):,.0f} tokens a row, {learned / tokens:.0%} of them supervised; template: "
            f"{', '.join(spread.templates)}."
            f"{describe_lost(spread.cut, spread.cut_tokens, spread.dropped, spread.max_length)}"
        )

    def describe_met(self) -> str:
        """What was lost of the rows that were tokenized so far."""
        met = f"{self._met.sum():,} of {len(self):,} rows were tokenized."
        return met + describe_lost(self.cut, self.cut_tokens, self.dropped, self._spread.max_length)

    def _take(self, positions: Iterable[int]) -> list[Tokens]:
        """The rows that have something to learn; what was lost is counted when a row is met for the first time."""
        found = []
        for position, row in zip(
            positions, tokenize_each(self._examples(positions), self._tokenizer, *self._options), strict=True
        ):
            learned = any(row.tokens.supervised)
            if not self._met[position]:
                self._met[position] = True
                self.cut += learned and row.lost > 0
                self.cut_tokens += row.lost * learned
                self.dropped += [] if learned else [row.tokens.row]
            found += [row.tokens] if learned else []
        return found

    def _examples(self, positions: Iterable[int]) -> list[Example]:
        return [
            self._convert.convert(number, self._rows[number]) for number in (int(self._index[i]) for i in positions)
        ]


def row_batches(rows: Sequence[Tokens] | RowStream, positions: Iterable[Sequence[int]]) -> Iterator[list[Tokens]]:
    """The rows of each step; those of a stream are tokenized while the step before is computed."""
    if isinstance(rows, RowStream):
        yield from _ahead(map(rows.batch, positions))
    else:
        yield from ([rows[i] for i in step] for step in positions)


def _ahead(items: Iterator[_T]) -> Iterator[_T]:
    """The same items, each made in a thread while its predecessor is in use."""
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
