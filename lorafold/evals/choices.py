"""Multiple choice: the answer whose tokens are the likeliest after the question."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn import functional as F

from lorafold.data.packs import micro_batches, pack
from lorafold.data.tokens import Tokens
from lorafold.evals.loss import ALIGN, CHUNK, hidden_states, logits_of
from lorafold.models.load import LoadedModel


@torch.no_grad()
def row_losses(loaded: LoadedModel, rows: Sequence[Tokens], max_tokens: int = 1024) -> list[tuple[float, int]]:
    """For each row the sum of its supervised tokens' cross-entropies (nats), and their number."""
    head = loaded.model.get_output_embeddings()
    assert head is not None
    results: list[tuple[float, int]] = []
    for group in micro_batches(rows, max_tokens):
        batch = pack(group, ALIGN).to(loaded.device)
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


def choice_accuracy(
    loaded: LoadedModel,
    questions: Sequence[Sequence[Tokens]],
    answers: Sequence[int],
    progress: Callable[[int], None] | None = None,
) -> float:
    """Share of questions whose right answer has the lowest mean cross-entropy per token.

    Args:
        questions: for each question its choices, each a row whose supervised tokens are the choice.
        answers: index of the right choice.
    """
    assert all(any(row.supervised) for choices in questions for row in choices)
    right = 0
    for choices, answer in zip(questions, answers, strict=True):
        means = [total / count for total, count in row_losses(loaded, choices)]
        right += min(range(len(means)), key=means.__getitem__) == answer
        if progress:
            progress(1)
    return right / len(questions)
