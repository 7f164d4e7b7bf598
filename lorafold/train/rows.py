"""The training loop of every task but language modelling: rows in, optimizer steps out, whatever is minimized."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn

from lorafold.adapters.adapted import parameters_once
from lorafold.config import TrainingConfig
from lorafold.errors import TrainingError
from lorafold.models.heap import free_at_once, keep_freed_memory
from lorafold.models.load import LoadedModel
from lorafold.train.budget import Plan, checkpointed
from lorafold.train.loop import Step, epoch_batches, plan_as_configured, rows_per_step, seed_step, total_steps
from lorafold.train.objectives import Objective
from lorafold.train.schedule import learning_rate_at


def plan_rows(objective: Objective, loaded: LoadedModel, rows: Sequence[Any], config: TrainingConfig) -> Plan:
    """How many tokens are computed at once, and whether blocks are computed again.

    Raises:
        TrainingError: the longest row does not fit the memory that is allowed, or the model cannot checkpoint.
    """
    together = min(len(rows), rows_per_step(config))
    return plan_as_configured(loaded, config, lambda: objective.trial(loaded, rows, together))


def train_rows(
    objective: Objective,
    loaded: LoadedModel,
    rows: Sequence[Any],
    config: TrainingConfig,
    plan: Plan,
    optimizer: torch.optim.Optimizer,
    done: int = 0,
) -> Iterator[Step]:
    """Train what an optimizer of `make_optimizer` has, yielding after each step.

    Args:
        rows: of the objective's kind, each with its length in tokens and its number in the file (`row`).
        config: with `learning_rate` resolved.
        plan: how steps are computed, from `plan_rows`.
        done: steps of the run that the model and the optimizer have behind them.

    Raises:
        TrainingError: a loss or gradient is not finite, and the parameters are those before that step.
    """
    assert config.learning_rate is not None
    (keep_freed_memory if plan.budget is None else free_at_once)()
    limit = plan.micro_batch_tokens if config.micro_batch_tokens or plan.budget else None
    total = total_steps(len(rows), config)
    batches = islice(epoch_batches(len(rows), config), done, total)
    gc.collect()
    gc.freeze()  # the collector would walk through the model and all imported modules several times a step
    try:
        with checkpointed(loaded, plan.checkpointing):
            for step, numbers in enumerate(batches, done):
                loaded.model.train()
                seed_step(loaded.device, config.seed, step + 1)
                rate = learning_rate_at(
                    step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
                )
                yield _one_step(objective, loaded, [rows[i] for i in numbers], optimizer, config, limit, step + 1, rate)
    finally:
        gc.unfreeze()
        loaded.model.eval()


def _one_step(
    objective: Objective,
    loaded: LoadedModel,
    rows: list[Any],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    limit: int | None,
    step: int,
    rate: float,
) -> Step:
    began = time.perf_counter()
    with parameters_once(loaded.model):
        loss, supervised = objective.add_gradients(loaded, rows, limit)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf))
    if not math.isfinite(loss) or not math.isfinite(norm):
        optimizer.zero_grad(set_to_none=True)
        numbers = ", ".join(str(row.row) for row in rows)
        raise TrainingError(f"the loss is {loss} and the gradient norm {norm} at step {step}, rows {numbers}")
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(row) for row in rows)
    return Step(step, loss, rate, norm, len(rows), tokens, supervised, time.perf_counter() - began)
