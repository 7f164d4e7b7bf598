"""What is minimized: cross-entropy of the labels of texts or words, and InfoNCE of pairs.

The loss of a step is a mean over its rows (or words), however these are divided into batches.
"""

# B rows of a batch, C labels, S words of a batch

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.adapters.adapted import parameters_once
from lorafold.adapters.whole import head
from lorafold.data.batches import WHOLE, by_length, fill_up, filled_up
from lorafold.data.labels import Labelled
from lorafold.data.pairs import Pair
from lorafold.data.tags import Tagged
from lorafold.data.tokens import Tokens
from lorafold.evals.classes import scores
from lorafold.evals.embed import embed, embed_at_once, in_batches
from lorafold.evals.entities import tag_scores
from lorafold.evals.figures import Figures
from lorafold.evals.loss import WHOLE as PACK
from lorafold.evals.loss import hidden_states, packed
from lorafold.evals.retrieval import Candidates, RetrievalScores, candidates_of, retrieval, scaled_cosines
from lorafold.models.load import LoadedModel
from lorafold.models.positions import positions
from lorafold.train.budget import LARGEST_MICRO_BATCH, TRIED, Trial
from lorafold.train.loop import usual_tokens

Progress = Callable[[int], None]
_COPIES = 4  # of the vectors and cosines of a step that are there at once, gradients among them


class Objective(Protocol):
    """What rows are trained for."""

    def add_gradients(self, loaded: LoadedModel, rows: Sequence[Any], max_tokens: int | None) -> tuple[float, int]:
        """Add the gradients of the mean loss of some rows; the loss in nats, and over how much it is a mean.

        Args:
            max_tokens: most tokens at once, with padding; None where nobody said.
        """
        ...

    def trial(self, loaded: LoadedModel, rows: Sequence[Any], together: int) -> Trial:
        """What shows how much memory a step takes.

        Args:
            rows: all that are trained on.
            together: rows of a step.
        """
        ...

    def evaluate(
        self, loaded: LoadedModel, rows: Sequence[Any], max_tokens: int, progress: Progress | None = None
    ) -> Figures:
        """Figures of the model on rows."""
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Labels of rows, or of the words of rows.

    Attributes:
        logits: of a batch of rows, float32 [S, C], in the order of their labels.
        figures: from the losses, and for each row the predicted and true labels.
    """

    logits: Callable[[LoadedModel, Sequence[Any]], Tensor]
    figures: Callable[[list[float], list[list[int]], list[list[int]]], Figures]

    def add_gradients(self, loaded: LoadedModel, rows: Sequence[Any], max_tokens: int | None) -> tuple[float, int]:
        """See `Objective`."""
        count, total = sum(len(row.labels) for row in rows), 0.0
        for batch in by_length(rows, max_tokens or usual_tokens(loaded), _ends(loaded)):
            targets = torch.tensor([*chain(*(row.labels for row in batch))], device=loaded.device)
            loss = F.cross_entropy(self.logits(loaded, batch), targets, reduction="sum") / count
            loss.backward()
            total += float(loss.detach())
        return total, count

    def trial(self, loaded: LoadedModel, rows: Sequence[Any], together: int) -> Trial:  # noqa: ARG002
        """See `Objective`: the longest row again and again, as rows keep the more by token the longer they are."""
        longest, ends = max(rows, key=len), _ends(loaded)
        some = [longest] * -(-TRIED // len(longest))

        def loss(times: int) -> tuple[Tensor, int]:
            return self.logits(loaded, some * times).square().sum(), times * filled_up(some, ends)

        return Trial(loss, len(longest) + ends, PACK if ends else WHOLE)

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, rows: Sequence[Any], max_tokens: int, progress: Progress | None = None
    ) -> Figures:
        """See `Objective`."""
        losses: list[float] = []
        predicted: list[list[int]] = []
        true: list[list[int]] = []
        for batch in by_length(rows, max_tokens, _ends(loaded)):
            logits = self.logits(loaded, batch)
            targets = torch.tensor([*chain(*(row.labels for row in batch))], device=logits.device)
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
            true += [row.labels for row in batch]
            predicted += [part.tolist() for part in logits.argmax(-1).split([len(row.labels) for row in batch])]
            if progress:
                progress(len(batch))
        return self.figures(losses, predicted, true)


def classify_texts(labels: Sequence[str]) -> CrossEntropy:
    """One label for each text."""

    def figures(losses: list[float], predicted: list[list[int]], true: list[list[int]]) -> Figures:
        return scores(losses, [*chain(*predicted)], [*chain(*true)], len(labels))

    return CrossEntropy(logits_of_rows, figures)


def classify_words(labels: Sequence[str]) -> CrossEntropy:
    """One tag for each word."""
    return CrossEntropy(logits_of_words, lambda losses, predicted, true: tag_scores(losses, predicted, true, labels))


@dataclass(frozen=True)
class InfoNCE:
    """Pairs of texts, each found among the texts of all rows of the step; see `evals/retrieval.py`.

    Gradients of all texts meet in the loss, so a step keeps what the backward pass needs of all of them. Where it has
    more tokens than somebody allowed it keeps one batch: vectors first, without it, and when the loss has given the
    gradient of each vector, every batch a second time (GradCache, arXiv 2101.06983). The result is the same.

    Attributes:
        scale: of the cosines.
    """

    scale: float

    def add_gradients(self, loaded: LoadedModel, rows: Sequence[Pair], max_tokens: int | None) -> tuple[float, int]:
        """See `Objective`."""
        among = candidates_of(rows)
        texts = [*(row.anchor for row in rows), *among.texts]
        most = usual_tokens(loaded) if max_tokens is None else min(max_tokens, LARGEST_MICRO_BATCH)
        batches = in_batches(texts, most)
        if max_tokens is None or sum(filled_up([texts[i] for i in batch]) for batch in batches) <= max_tokens:
            loss = self._loss(embed(loaded, texts, most), among)
            loss.backward()
            return float(loss.detach()), len(rows)
        gpus = [loaded.device] if loaded.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus):  # what is dropped out here is dropped out again below
            vectors = embed(loaded, texts, most)
        loss = self._loss(vectors.requires_grad_(), among)
        (gradient,) = torch.autograd.grad(loss, vectors)
        for numbers in batches:
            embed_at_once(loaded, [texts[i] for i in numbers]).backward(gradient[numbers])
        return float(loss.detach()), len(rows)

    def trial(self, loaded: LoadedModel, rows: Sequence[Pair], together: int) -> Trial:
        """See `Objective`: the longest text again and again; vectors and cosines are those of the whole step."""
        longest = max((text for row in rows for text in (row.anchor, row.positive, row.negative)), key=len)
        some = [longest] * -(-TRIED // len(longest))

        def loss(times: int) -> tuple[Tensor, int]:
            return embed_at_once(loaded, some * times).sum(), times * filled_up(some)

        among = together * (2 if any(row.negative for row in rows) else 1)
        width = loaded.model.config.get_text_config().hidden_size
        held = _COPIES * 4 * (together * among + (together + among) * width)
        most = (together + among) * filled_up([longest])
        return Trial(
            loss,
            len(longest),
            WHOLE,
            most,
            held,
            cut="take fewer rows a step (per_device_train_batch_size)",
            what="text",
        )

    def _loss(self, vectors: Tensor, among: Candidates) -> Tensor:
        """Mean over the rows, of the vectors of their anchors and then of the candidates [N + C, H]."""
        count = len(among.positive)
        cosines = scaled_cosines(vectors[:count], vectors[count:], among.others, self.scale)
        return F.cross_entropy(cosines, torch.tensor(among.positive, device=cosines.device))

    @torch.no_grad()
    def evaluate(
        self, loaded: LoadedModel, rows: Sequence[Pair], max_tokens: int, progress: Progress | None = None
    ) -> RetrievalScores:
        """Figures with the positives of all rows as candidates."""
        among = candidates_of(rows, negatives=False)
        anchors = embed(loaded, [row.anchor for row in rows], max_tokens, progress)
        return retrieval(anchors, embed(loaded, among.texts, max_tokens), among, self.scale)


def evaluate_rows(
    objective: Objective,
    loaded: LoadedModel,
    rows: Sequence[Any],
    max_tokens: int,
    progress: Progress | None = None,
) -> Figures:
    """Figures on rows, in evaluation mode."""
    loaded.model.eval()
    with parameters_once(loaded.model):
        return objective.evaluate(loaded, rows, max_tokens, progress)


def logits_of_rows(loaded: LoadedModel, rows: Sequence[Labelled]) -> Tensor:
    """Logits float32 [B, C] of rows, filled up on the right; on a packed model they lie end to end."""
    if _is_packed(loaded):
        return _logits_end_to_end(loaded, rows, [[len(row) - 1] for row in rows])
    return _logits_filled_up(loaded, rows)


def logits_of_words(loaded: LoadedModel, rows: Sequence[Tagged]) -> Tensor:
    """Logits float32 [S, C] of the first tokens of words, row after row."""
    if _is_packed(loaded):
        return _logits_end_to_end(loaded, rows, [row.places for row in rows])
    of_rows = torch.tensor([i for i, row in enumerate(rows) for _ in row.places], device=loaded.device)
    places = torch.tensor([*chain(*(row.places for row in rows))], device=loaded.device)
    return _logits_filled_up(loaded, rows)[of_rows, places]


def _logits_filled_up(loaded: LoadedModel, rows: Sequence[Labelled | Tagged]) -> Tensor:
    ids, mask = fill_up([row.ids for row in rows], loaded.tokenizer.pad_token_id, positions(loaded))
    ids, mask = ids.to(loaded.device), mask.to(loaded.device)
    return loaded.model(input_ids=ids, attention_mask=mask.long()).logits.float()


def _ends(loaded: LoadedModel) -> int:
    """Tokens that stand after each row."""
    return int(_is_packed(loaded))


def _is_packed(loaded: LoadedModel) -> bool:
    return bool(loaded.gguf or loaded.mlx or loaded.bnb)


def _logits_end_to_end(
    loaded: LoadedModel, rows: Sequence[Labelled | Tagged], places: Sequence[Sequence[int]]
) -> Tensor:
    """The head on the hidden states at some places of rows; a row's last stands before a token that nothing sees."""
    ended = []
    for row, wanted in zip(rows, places, strict=True):
        after = {place + 1 for place in wanted}  # a hidden state is asked for by the token that follows
        ended.append(Tokens([*row.ids, 0], [i in after for i in range(len(row) + 1)], row.row))
    hidden = hidden_states(loaded, packed(loaded, ended))
    (name,) = head(loaded.model)
    return loaded.model.get_submodule(name)(hidden).float()
