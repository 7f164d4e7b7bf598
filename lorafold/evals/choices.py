"""Multiple choice: the answer whose tokens are the likeliest after the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from lorafold.data.packs import micro_batches
from lorafold.data.tokens import Tokens
from lorafold.evals.loss import CHUNK, SHARED, hidden_states, logits_of, packed
from lorafold.models.load import LoadedModel

_TOGETHER = 16  # questions, whose rows share packs


@torch.no_grad()
def row_losses(loaded: LoadedModel, rows: Sequence[Tokens], max_tokens: int = 1024) -> list[tuple[float, int]]:
    """For each row the sum of its supervised tokens' cross-entropies (nats), and their number."""
    head = loaded.model.get_output_embeddings()
    assert head is not None
    results: list[tuple[float, int]] = []
    for group in micro_batches(rows, max_tokens, loaded.row_align, SHARED):
        batch = packed(loaded, group, SHARED)
        hidden = hidden_states(loaded, batch)
        losses = torch.cat(
            [
                F.cross_entropy(logits_of(loaded.model, head, part), target, reduction="none")
                for part, target in zip(hidden.split(CHUNK), batch.targets.split(CHUNK), strict=True)
            ]
        )
        counts = [sum(row.supervised) for row in group]
        results += [(float(part.sum()), n) for part, n in zip(losses.split(counts), counts, strict=True)]
    return results


def choice_losses(
    loaded: LoadedModel, questions: Sequence[Sequence[Tokens]], progress: Callable[[int], None] | None = None
) -> list[list[float]]:
    """For each question the mean cross-entropy per token (nats) of each of its choices.

    Args:
        questions: for each question its choices, each a row whose supervised tokens are the choice.
        progress: called with the number of questions done, some at a time.
    """
    assert all(any(row.supervised) for choices in questions for row in choices)
    means: list[list[float]] = []
    for start in range(0, len(questions), _TOGETHER):
        part = questions[start : start + _TOGETHER]
        losses = iter(row_losses(loaded, [row for choices in part for row in choices]))
        means += [[total / count for total, count in (next(losses) for _ in choices)] for choices in part]
        if progress:
            progress(len(part))
    return means


def choice_accuracy(
    loaded: LoadedModel,
    questions: Sequence[Sequence[Tokens]],
    answers: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> float:
    """Share of questions whose right answer, given by its index, has the lowest mean cross-entropy per token."""
    means = choice_losses(loaded, questions, progress)
    right = sum(min(range(len(m)), key=m.__getitem__) == answer for m, answer in zip(means, answers, strict=True))
    return right / len(questions)
