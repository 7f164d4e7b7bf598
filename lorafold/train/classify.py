"""Training and evaluating classifiers: rows of like length in a batch, filled up to the longest of them.

The loss of a step is the mean cross-entropy of its rows, however these are divided into batches.
"""

# B rows of a batch, C labels

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafold.adapters.adapted import parameters_once
from lorafold.adapters.whole import head
from lorafold.config import TrainingConfig
from lorafold.data.labels import Labelled
from lorafold.data.packs import pack
from lorafold.data.tokens import Tokens
from lorafold.errors import TrainingError
from lorafold.evals.classes import Scores, scores
from lorafold.evals.loss import WHOLE, hidden_states
from lorafold.models.load import LoadedModel
from lorafold.train.loop import MICRO_BATCH_TOKENS, Step, epoch_batches, total_steps
from lorafold.train.memory import keep_freed_memory
from lorafold.train.schedule import learning_rate_at

_WHOLE = 16  # batches are filled up to a multiple of this: a CPU's library compiles and keeps a kernel for each shape


def batches(rows: Sequence[Labelled], max_tokens: int) -> Iterator[list[Labelled]]:
    """Rows by length, the longest first, in batches of at most so many tokens with padding (or one longer row)."""
    left = sorted(rows, key=lambda row: -len(row.ids))
    while left:
        size = max(1, max_tokens // len(left[0].ids))
        yield left[:size]
        left = left[size:]


def logits_of_rows(loaded: LoadedModel, rows: Sequence[Labelled]) -> Tensor:
    """Logits float32 [B, C] of rows, filled up on the right; on a packed model they lie end to end."""
    if loaded.gguf or loaded.mlx or loaded.bnb:
        return _logits_end_to_end(loaded, rows)
    longest = -(-max(len(row.ids) for row in rows) // _WHOLE) * _WHOLE
    longest = min(longest, max(_positions(loaded), *(len(row.ids) for row in rows)))
    padding = loaded.tokenizer.pad_token_id
    ids = torch.tensor([row.ids + [padding] * (longest - len(row.ids)) for row in rows], device=loaded.device)
    lengths = torch.tensor([len(row.ids) for row in rows], device=loaded.device)
    mask = torch.arange(longest, device=loaded.device) < lengths[:, None]
    return loaded.model(input_ids=ids, attention_mask=mask.long()).logits.float()


def _logits_end_to_end(loaded: LoadedModel, rows: Sequence[Labelled]) -> Tensor:
    """The head on the hidden state of each row's last token, which stands before one that nothing sees."""
    ended = [Tokens([*row.ids, 0], [False] * len(row.ids) + [True], row.row) for row in rows]
    hidden = hidden_states(loaded, pack(ended, loaded.row_align, None, WHOLE).to(loaded.device))
    (name,) = head(loaded.model)
    return loaded.model.get_submodule(name)(hidden).float()


def _positions(loaded: LoadedModel) -> int:
    """Longest row that the model has positions for; 0 if its configuration does not say."""
    return getattr(loaded.model.config, "max_position_embeddings", None) or 0


@torch.no_grad()
def evaluate_classes(
    loaded: LoadedModel,
    rows: Sequence[Labelled],
    max_tokens: int = MICRO_BATCH_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Loss, accuracy, F1 and confusion on rows."""
    loaded.model.eval()
    losses, predicted, true = [], [], []
    with parameters_once(loaded.model):
        for batch in batches(rows, max_tokens):
            logits = logits_of_rows(loaded, batch)
            targets = torch.tensor([row.label for row in batch], device=logits.device)
            losses += F.cross_entropy(logits, targets, reduction="none").tolist()
            predicted += logits.argmax(-1).tolist()
            true += targets.tolist()
            if progress:
                progress(len(batch))
    labels = loaded.model.config.num_labels
    assert labels is not None
    return scores(losses, predicted, true, labels)


def train_classes(
    loaded: LoadedModel, rows: Sequence[Labelled], config: TrainingConfig, optimizer: torch.optim.Optimizer
) -> Iterator[Step]:
    """Train what an optimizer of `make_optimizer` has, yielding after each step.

    Args:
        config: with `learning_rate` resolved.

    Raises:
        TrainingError: a loss or gradient is not finite; the parameters are those before that step.
    """
    assert config.learning_rate is not None
    keep_freed_memory()
    torch.manual_seed(config.seed)
    total, order = total_steps(len(rows), config), epoch_batches(len(rows), config)
    if config.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    gc.collect()
    gc.freeze()  # the collector would walk through the model and all imported modules several times a step
    try:
        for step in range(total):
            loaded.model.train()
            batch = [rows[i] for i in next(order)]
            rate = learning_rate_at(step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type)
            yield _one_step(loaded, batch, optimizer, config, step + 1, rate)
    finally:
        gc.unfreeze()
        loaded.model.eval()


def _one_step(
    loaded: LoadedModel,
    rows: list[Labelled],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    step: int,
    rate: float,
) -> Step:
    began, total = time.perf_counter(), 0.0
    numbers = ", ".join(str(row.row) for row in rows)
    with parameters_once(loaded.model):
        for batch in batches(rows, config.micro_batch_tokens or MICRO_BATCH_TOKENS):
            labels = torch.tensor([row.label for row in batch], device=loaded.device)
            loss = F.cross_entropy(logits_of_rows(loaded, batch), labels, reduction="sum") / len(rows)
            loss.backward()
            total += float(loss.detach())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
    if not math.isfinite(total) or not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        raise TrainingError(f"the loss is {total} and the gradient norm {norm} at step {step}, rows {numbers}")
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(row.ids) for row in rows)
    return Step(step, total, rate, norm, len(rows), tokens, len(rows), time.perf_counter() - began)
