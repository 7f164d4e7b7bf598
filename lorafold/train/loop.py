"""The training loop: rows in, optimizer steps out, one event per step.

The loss of a step is the sum of the cross-entropies of its supervised tokens divided by their number, over all
micro-batches together; so batch size, accumulation and packing can be traded for memory without changing the result.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from lorafold.adapters.adapted import parameters_once
from lorafold.adapters.ranks import MovingRanks
from lorafold.adapters.whole import trained_matrices
from lorafold.config import TrainingConfig
from lorafold.data.packs import even_batches
from lorafold.data.stream import RowStream, row_batches, sampled
from lorafold.data.tokens import Tokens
from lorafold.errors import ConfigError, TrainingError
from lorafold.evals.loss import head_once, pack_loss, packed
from lorafold.models.heap import free_at_once, keep_freed_memory
from lorafold.models.load import LoadedModel
from lorafold.models.positions import tokens_at_once
from lorafold.train.budget import (
    Plan,
    Trial,
    check_checkpointing,
    check_fits,
    checkpointed,
    plan_within,
    trial_of_packs,
)
from lorafold.train.distributed import ALONE, Workers
from lorafold.train.muon import Muon
from lorafold.train.schedule import learning_rate_at


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


def rows_per_step(config: TrainingConfig, workers: int = 1) -> int:
    """Rows of one optimizer step, over all workers."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * workers


def total_steps(n_rows: int, config: TrainingConfig, workers: int = 1) -> int:
    """Optimizer steps of a run; the last step of an epoch may have fewer rows."""
    per_epoch = math.ceil(n_rows / rows_per_step(config, workers))
    return config.max_steps or max(1, math.ceil(per_epoch * config.num_train_epochs))


def epoch_batches(n_rows: int, config: TrainingConfig, workers: int = 1) -> Iterator[list[int]]:
    """Row numbers of each step, without end; every epoch is a new permutation drawn from the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    size = rows_per_step(config, workers)
    while True:
        order = torch.randperm(n_rows, generator=generator)
        yield from (order[i : i + size].tolist() for i in range(0, n_rows, size))


def usual_tokens(loaded: LoadedModel) -> int:
    """Tokens computed at once where nobody says more: fewer in float32, where activations take twice the memory."""
    return 768 if loaded.dtype == torch.float32 else 1024


def plan_step(loaded: LoadedModel, rows: Sequence[Tokens] | RowStream, config: TrainingConfig) -> Plan:
    """How many tokens are computed at once, and whether blocks are computed again.

    Raises:
        TrainingError: the longest row does not fit the memory that is allowed, or the model cannot checkpoint.
    """
    return plan_as_configured(loaded, config, lambda: trial_of_packs(loaded, sampled(rows)))


def plan_as_configured(loaded: LoadedModel, config: TrainingConfig, trial: Callable[[], Trial]) -> Plan:
    """The same for whatever is tried; that is asked for only where memory is limited.

    Raises:
        TrainingError: as `plan_step`.
    """
    if config.gradient_checkpointing:
        check_checkpointing(loaded)
    if config.memory_bytes is None:
        most = tokens_at_once(loaded, config.micro_batch_tokens or usual_tokens(loaded))
        return Plan(most, config.gradient_checkpointing)
    tried = trial()
    most = tokens_at_once(loaded, config.micro_batch_tokens or tried.most)
    return plan_within(config.memory_bytes, loaded, tried, most, config.gradient_checkpointing)


def make_optimizer(loaded: LoadedModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """What moves every parameter that requires a gradient; with LoRA+ (arXiv 2402.12354) B learns faster than A.

    `lr_scale` of a group is its share of the learning rate; `matrices` says whether Muon moves it.

    Raises:
        ConfigError: LoRA+ is asked for and nothing that is trained is a B; or Muon, and nothing is a matrix for it.
    """
    assert config.learning_rate is not None
    trained = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    ratio = config.loraplus_lr_ratio
    if ratio and not any(_is_b(name) for name in trained):
        raise ConfigError("loraplus_lr_ratio is for adapters with a B, and this one has none; leave it out")
    matrices = trained_matrices(loaded.model) if config.optim == "muon" else set()
    if config.optim == "muon" and not matrices:
        raise ConfigError("optim muon moves matrices of layers and adapters, and none is trained here; leave it out")
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, p in trained.items():
        groups.setdefault((ratio if ratio and _is_b(name) else 1.0, name in matrices), []).append(p)
    listed = [{"params": p, "lr_scale": scale, "matrices": whole} for (scale, whole), p in groups.items()]
    if config.optim == "muon":
        return Muon(listed, config.learning_rate, config.weight_decay)
    return torch.optim.AdamW(listed, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _is_b(name: str) -> bool:
    return name.rpartition(".")[2].endswith("_B")


def train_steps(
    loaded: LoadedModel,
    rows: Sequence[Tokens] | RowStream,
    config: TrainingConfig,
    plan: Plan | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    done: int = 0,
    workers: Workers = ALONE,
    ranks: MovingRanks | None = None,
) -> Iterator[Step]:
    """Train the model's adapters, yielding after each optimizer step.

    Args:
        loaded: a model with adapters; every parameter that requires a gradient is trained.
        rows: tokenized rows.
        config: with `learning_rate` resolved.
        plan: how steps are computed, if that is known already.
        optimizer: from `make_optimizer`, with its state after the steps that are done.
        done: steps of the run that the model and the optimizer have behind them.
        workers: who shares the rows of each step; each of them yields the same steps.
        ranks: those that fall on the way.

    Raises:
        TrainingError: a loss or gradient is not finite; the parameters are those before that step. Or the longest row
            does not fit the memory that is allowed, or the model cannot checkpoint.
        DataError: a row of a stream turns out to be unusable, or too long for the memory that is allowed.
    """
    assert config.learning_rate is not None
    optimizer = optimizer or make_optimizer(loaded, config)
    plan = plan or plan_step(loaded, rows, config)
    (keep_freed_memory if plan.budget is None else free_at_once)()
    total = total_steps(len(rows), config, workers.count)
    shared = None if drops_out(loaded.model) else config.shared_prefix_tokens or None
    batches = row_batches(rows, islice(epoch_batches(len(rows), config, workers.count), done, total))
    loaded.model.train()
    gc.collect()
    gc.freeze()  # the collector would walk through the model and all imported modules several times a step
    try:
        with checkpointed(loaded, plan.checkpointing):
            for step, batch in enumerate(batches, done):
                check_fits(plan, batch)
                rate = learning_rate_at(
                    step, total, config.learning_rate, config.warmup_ratio, config.lr_scheduler_type
                )
                yield _one_step(loaded, batch, optimizer, config, plan, shared, step + 1, rate, workers, ranks)
                loaded.model.train()  # whoever evaluated in between switched to evaluation mode
    finally:
        gc.unfreeze()
        loaded.model.eval()


def _one_step(
    loaded: LoadedModel,
    batch: list[Tokens],
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    plan: Plan,
    shared: int | None,
    step: int,
    rate: float,
    workers: Workers,
    ranks: MovingRanks | None,
) -> Step:
    began = time.perf_counter()
    seed_step(loaded.device, config.seed, step, workers.rank)
    supervised = sum(sum(row.supervised) for row in batch)
    limit = config.max_grad_norm or math.inf
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        with workers.together(TrainingError):
            total_loss = _add_gradients(loaded, batch, plan, shared, step, supervised, workers)
        (total_loss,) = workers.total(total_loss)
        workers.add_gradients(parameters)
        norm = float(nn.utils.clip_grad_norm_(parameters, limit))
        if not math.isfinite(norm):
            numbers = ", ".join(str(row.row) for row in batch)
            raise TrainingError(f"the gradient norm is {norm} at step {step}, rows {numbers}")
    except TrainingError:
        optimizer.zero_grad(set_to_none=True)
        raise
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    if ranks is not None:
        ranks.observe(step)
    optimizer.step()
    if ranks is not None:
        ranks.prune(step)
    optimizer.zero_grad(set_to_none=True)
    tokens = sum(len(row.ids) for row in batch)
    return Step(step, total_loss / supervised, rate, norm, len(batch), tokens, supervised, time.perf_counter() - began)


def _add_gradients(
    loaded: LoadedModel,
    batch: list[Tokens],
    plan: Plan,
    shared: int | None,
    step: int,
    supervised: int,
    workers: Workers,
) -> float:
    """Passes over this worker's rows of a step that has so many supervised tokens in all; the sum of their losses."""
    own = workers.share(batch)
    if shared is not None:
        own = sorted(own, key=lambda row: row.ids)  # neighbours have most in common
    groups = even_batches(own, plan.micro_batch_tokens, loaded.row_align, shared)
    idle = workers.passes(len(groups)) - len(groups)
    once = contextlib.nullcontext() if workers.sharded else parameters_once(loaded.model)
    losses: list[Tensor] = []
    with once, head_once(loaded):
        for group in groups:
            loss = pack_loss(loaded, packed(loaded, group, shared))
            losses.append(loss.detach())
            (loss / supervised).backward()
        for _ in range(idle):
            (0 * pack_loss(loaded, packed(loaded, batch[:1]))).backward()
        values = torch.stack(losses).tolist() if losses else []  # not one by one: a GPU would be waited for each time
        for value, group in zip(values, groups, strict=True):
            if not math.isfinite(value):
                culprits = _rows(group) if workers.sharded else _culprits(loaded, group)
                raise TrainingError(f"the loss is {value} at step {step}, {culprits}")
    return sum(values)


def seed_step(device: torch.device, seed: int, step: int, worker: int = 0) -> None:
    """Seed what is dropped out in a step, so that a run that goes on needs no random states of the one before."""
    number = int.from_bytes(hashlib.sha256(f"{seed}:{step}:{worker}".encode()).digest()[:8], "little")
    if device.type == "cuda":
        torch.cuda.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


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
    bad = [row for row in group if not math.isfinite(float(pack_loss(loaded, packed(loaded, [row]))))]
    return _rows(bad or group)


def _rows(rows: Sequence[Tokens]) -> str:
    return f"row{'s' if len(rows) != 1 else ''} {', '.join(str(row.row) for row in rows)} of the data"
