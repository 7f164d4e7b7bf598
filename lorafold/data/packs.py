"""Rows laid end to end without padding.

rows        a0 a1 a2   b0 b1          (a1, a2 and b1 supervised)
ids         a0 a1 a2 b0 b1
positions    0  1  2  0  1
segments     [3, 2]                    rows do not see each other
target_at    0  1     3                the hidden state that predicts ...
targets     a1 a2    b1                ... this token
"""

# T tokens of the pack, S supervised tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.data.tokens import Tokens


@dataclass(frozen=True, eq=False)
class Pack:
    """Rows laid end to end.

    Attributes:
        ids: token ids, int64 [T].
        positions: place within the row, from 0, int64 [T].
        segments: lengths of the rows, in order; their sum is T.
        target_at: positions in the pack whose next token is supervised, ascending, int64 [S].
        targets: these next tokens, int64 [S].
    """

    ids: Tensor
    positions: Tensor
    segments: list[int]
    target_at: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Pack:
        """The same pack with its tensors on another device."""
        return Pack(
            self.ids.to(device),
            self.positions.to(device),
            self.segments,
            self.target_at.to(device),
            self.targets.to(device),
        )


def pack(rows: Sequence[Tokens], align: int = 1) -> Pack:
    """Lay rows end to end; at least one row.

    Args:
        align: lengthen each row to a multiple of this with its last token, and the last row so that T is a multiple
            of `4 * align`. What follows a row's end is seen by nothing before it and is never a target, so this
            changes no result; it keeps the number of different matrix shapes small, for each of which a CPU's
            matrix library compiles and keeps a kernel.
    """
    assert rows
    lengths = [_up(len(row), align) for row in rows]
    lengths[-1] += _up(sum(lengths), 4 * align) - sum(lengths) if align > 1 else 0
    padded = [(row, length - len(row)) for row, length in zip(rows, lengths, strict=True)]
    ids = torch.tensor([i for row, pad in padded for i in (*row.ids, *row.ids[-1:] * pad)], dtype=torch.int64)
    # the first token of a row is never supervised, so the token before a supervised one is of the same row
    supervised = torch.tensor([s for row, pad in padded for s in (*row.supervised, *(False,) * pad)], dtype=torch.bool)
    target_at = supervised.nonzero().flatten() - 1
    return Pack(
        ids=ids,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        segments=lengths,
        target_at=target_at,
        targets=ids[target_at + 1],
    )


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def micro_batches(rows: Sequence[Tokens], max_tokens: int) -> list[list[Tokens]]:
    """Split rows, in order, into groups of at most `max_tokens` tokens; a longer row stands alone."""
    groups: list[list[Tokens]] = []
    filled = 0
    for row in rows:
        if not groups or filled + len(row) > max_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(row)
        filled += len(row)
    return groups
