"""Rows of like length in a batch, filled up on the right to the longest of them."""

# B rows of a batch, T tokens of the longest

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from typing import TypeVar

import torch
from torch import Tensor

WHOLE = 16  # batches are filled up to a multiple of this: a CPU's library compiles and keeps a kernel for each shape
Row = TypeVar("Row", bound=Sized)


def by_length(rows: Sequence[Row], max_tokens: int, more: int = 0) -> Iterator[list[Row]]:
    """Rows by length, the longest first, in batches of at most so many tokens with padding (or one longer row).

    Args:
        more: tokens that each row has besides.
    """
    left = sorted(rows, key=lambda row: -len(row))
    while left:
        size = max(1, max_tokens // _filled(len(left[0]) + more))
        yield left[:size]
        left = left[size:]


def fill_up(rows: Sequence[Sequence[int]], padding: int, positions: int) -> tuple[Tensor, Tensor]:
    """Token ids int64 [B, T] and which of them are of a row, bool [B, T].

    Args:
        positions: longest row that the model has positions for; 0 if that is not known.
    """
    longest = max(map(len, rows))
    longest = min(_filled(longest), max(positions, longest))
    ids = torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def filled_up(batch: Sequence[Sized], more: int = 0) -> int:
    """Tokens of a batch with padding; `more` as in `by_length`."""
    return len(batch) * _filled(max(map(len, batch)) + more)


def _filled(length: int) -> int:
    return -(-length // WHOLE) * WHOLE
