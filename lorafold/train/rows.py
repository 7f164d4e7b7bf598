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
from lorafold.models.heap import keep_freed_memory
from lorafold.models.load import LoadedModel
from lorafold.train.budget import checkpointed
from lorafold.train.loop import Step, epoch_batches, seed_step, total_steps
from lorafold.train.objectives import Objective
from lorafold.train.schedule import learning_rate_at


def train_rows(
    objective: Objective,
    loaded: LoadedModel,
    rows: Sequence[Any],
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    done: int = 0,
) -> Iterator[Step]:
    """Train what an optimizer of `make_optimizer` has, yielding after each step.

    Args:
        rows: of the objective's kind, each with its length in tokens and its number in the file (`row`).
        config: with `learning_rate` resolved.
        done: steps of the run that the model and the optimizer have behind them.

    Raises:
        TrainingError: a loss or gradient is not finite, and the parameters are those before that step; or the model
            cannot checkpoint.
    """
    assert config.learning_rate is not None
    keep_freed_memory()
    total = total_steps(len(rows), config)
    batches = islice(epoch_batches(len(rows), config), done, total)
    gc.collect()
    gc.freeze()  # the collector would walk through the model and all imported modules several times a step
    try:
        with checkpointed(loaded, config.gradient_checkpointing):
            for step, numbers in enumerate(batches, done):
                loaded.model.train()
                seed_step(loaded.device, config.seed, step + 1)
                rate = learning_rate_at(
                    step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
                )
                yield _one_step(objective, loaded, [rows[i] for i in numbers], optimizer, config, step + 1, rate)
    finally:
        gc.unfreeze()
        loaded.model.eval()


def _one_step(
    objective: Objective,
    loaded: LoadedModel,
    rows: list[Any],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    step: int,
    rate: float,
) -> Step:
    began = time.perf_counter()
    with parameters_once(loaded.model):
        loss, supervised = objective.add_gradients(loaded, rows, config.micro_batch_tokens)
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
