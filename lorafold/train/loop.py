"""The training loop: rows in, optimizer steps out, one event per step.

The loss of a step is the sum of the cross-entropies of its supervised tokens divided by their number, over all
micro-batches together; so batch size, accumulation and packing can be traded for memory without changing the result.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from lorafold.adapters.inject import group_parameters_once
from lorafold.config import TrainingConfig
from lorafold.data.packs import micro_batches, pack
from lorafold.data.stream import RowStream, row_batches
from lorafold.data.tokens import Tokens
from lorafold.errors import TrainingError
from lorafold.evals.loss import WHOLE, head_once, pack_loss
from lorafold.models.load import LoadedModel
from lorafold.train.budget import Plan, check_fits, checkpointed, plan_within
from lorafold.train.memory import keep_freed_memory
from lorafold.train.schedule import learning_rate_at

MICRO_BATCH_TOKENS = 1024  # where nobody says more
LARGEST_MICRO_BATCH = 4096  # tokens, within a given memory; larger ones are no faster


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    Attributes:
        step: number of the step, from 1.
        loss: mean cross-entropy (nats) per supervised token, before the update.
        learning_rate, grad_norm: of the update; the norm is that before clipping.
        rows, tokens, supervised: how much was computed.
        seconds: wall time of the step.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    rows: int
    tokens: int
    supervised: int
    seconds: float


def rows_per_step(config: TrainingConfig) -> int:
    """Rows of one optimizer step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def total_steps(n_rows: int, config: TrainingConfig) -> int:
    """Optimizer steps of a run; the last step of an epoch may have fewer rows."""
    per_epoch = math.ceil(n_rows / rows_per_step(config))
    return config.max_steps or max(1, math.ceil(per_epoch * config.num_train_epochs))


def epoch_batches(n_rows: int, config: TrainingConfig) -> Iterator[list[int]]:
    """Row numbers of each step, without end; every epoch is a new permutation drawn from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    size = rows_per_step(config)
    while True:
        order = torch.randperm(n_rows, generator=generator)
        yield from (order[i : i + size].tolist() for i in range(0, n_rows, size))


def plan_step(loaded: LoadedModel, rows: Sequence[Tokens] | RowStream, config: TrainingConfig) -> Plan:
    """How many tokens are computed at once, and whether blocks are computed again.

    Raises:
        TrainingError: the longest row does not fit the memory that is allowed.
    """
    if config.memory_bytes is None:
        return Plan(config.micro_batch_tokens or MICRO_BATCH_TOKENS, config.gradient_checkpointing)
    most = config.micro_batch_tokens or LARGEST_MICRO_BATCH
    known = rows.sample if isinstance(rows, RowStream) else rows
    return plan_within(config.memory_bytes, loaded, known, most, config.gradient_checkpointing)


def train_steps(
    loaded: LoadedModel,
    rows: Sequence[Tokens] | RowStream,
    config: TrainingConfig,
    plan: Plan | None = None,
) -> Iterator[Step]:
    """Train the model's adapters, yielding after each optimizer step.

    Args:
        loaded: a model with adapters; every parameter that requires a gradient is trained.
        rows: tokenized rows.
        config: with `learning_rate` resolved.
        plan: how steps are computed, if that is known already.

    Raises:
        TrainingError: a loss or gradient is not finite; the parameters are those before that step. Or the longest row
            does not fit the memory that is allowed.
        DataError: a row of a stream turns out to be unusable, or too long for the memory that is allowed.
    """
    assert config.learning_rate is not None
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    plan = plan or plan_step(loaded, rows, config)
    if plan.budget is None:  # otherwise planning has seen to it
        keep_freed_memory()
    torch.manual_seed(config.seed)
    total = total_steps(len(rows), config)
    shared = None if drops_out(loaded.model) else config.shared_prefix_tokens or None
    batches = row_batches(rows, islice(epoch_batches(len(rows), config), total))
    loaded.model.train()
    gc.collect()
    gc.freeze()  # the collector would walk through the model and all imported modules several times a step
    try:
        with checkpointed(loaded, plan.checkpointing):
            for step, batch in enumerate(batches):
                check_fits(plan, batch)
                rate = learning_rate_at(
                    step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
                )
                yield _one_step(loaded, batch, optimizer, parameters, config, plan, shared, step + 1, rate)
                loaded.model.train()  # whoever evaluated in between switched to evaluation mode
    finally:
        gc.unfreeze()
        loaded.model.eval()


def _one_step(
    loaded: LoadedModel,
    batch: list[Tokens],
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
    config: TrainingConfig,
    plan: Plan,
    shared: int | None,
    step: int,
    rate: float,
) -> Step:
    began = time.perf_counter()
    supervised = sum(sum(row.supervised) for row in batch)
    total_loss = 0.0
    if shared is not None:
        batch = sorted(batch, key=lambda row: row.ids)  # neighbours have most in common
    with group_parameters_once(loaded.model), head_once(loaded):
        for group in micro_batches(batch, plan.micro_batch_tokens, loaded.row_align, shared):
            loss = pack_loss(loaded, pack(group, loaded.row_align, shared, WHOLE).to(loaded.device))
            value = float(loss.detach())
            if not math.isfinite(value):
                optimizer.zero_grad(set_to_none=True)
                raise TrainingError(f"the loss is {value} at step {step}, {_culprits(loaded, group)}")
            (loss / supervised).backward()
            total_loss += value
    limit = config.max_grad_norm or math.inf
    norm = float(nn.utils.clip_grad_norm_(parameters, limit))
    if not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        numbers = ", ".join(str(row.row) for row in batch)
        raise TrainingError(f"the gradient norm is {norm} at step {step}, rows {numbers}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(row.ids) for row in batch)
    return Step(step, total_loss / supervised, rate, norm, len(batch), tokens, supervised, time.perf_counter() - began)


def drops_out(model: nn.Module) -> bool:
    """Whether equal tokens of two rows may come out differently in training."""
    for module in model.modules():
        chances = {name: value for name, value in vars(module).items() if "drop" in name and "att" not in name}
        if isinstance(module, _DropoutNd):
            chances["p"] = module.p
        if any(isinstance(chance, float) and chance > 0 for chance in chances.values()):
            return True
    return False  # dropout of attention weights is not computed here


@torch.no_grad()
def _culprits(loaded: LoadedModel, group: Sequence[Tokens]) -> str:
    """Which rows of a micro-batch have a loss that is not finite."""
    bad = [row.row for row in group if not math.isfinite(float(pack_loss(loaded, pack([row]).to(loaded.device))))]
    numbers = ", ".join(str(n) for n in bad or [row.row for row in group])
    return f"row{'s' if len(bad) != 1 else ''} {numbers} of the data"
