"""A training run from its configuration to a finished run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from lorafold.adapters.inject import Injection
from lorafold.adapters.ranks import MovingRanks
from lorafold.config import RunConfig
from lorafold.data.rows import Example
from lorafold.data.stream import RowStream, sampled
from lorafold.data.tokens import prompt_ids
from lorafold.errors import ConfigError, DataError, TrainingError
from lorafold.evals.generate import generate
from lorafold.evals.loss import loss_sum
from lorafold.models.adapter_files import save_adapter
from lorafold.models.load import LoadedModel, compute_dtype, load
from lorafold.models.positions import check_positions
from lorafold.runs.blocks import find_blocks
from lorafold.runs.display import Display, follow
from lorafold.runs.folder import (
    ADAPTER,
    SAMPLES,
    Run,
    RunFolder,
    check_folder,
    checkpoint_folder,
    lines_of,
    read_run,
)
from lorafold.runs.from_adapter import adapt_for, adopted
from lorafold.runs.prepare import PreparedData, prepare
from lorafold.runs.report import write_report
from lorafold.runs.resume import Left, check_same_learning, left_of, sweep
from lorafold.train.budget import Plan, check_checkpointing
from lorafold.train.checkpoint import State, restore_training, save_checkpoint
from lorafold.train.distributed import ALONE, Workers, joined
from lorafold.train.loop import (
    Step,
    make_optimizer,
    plan_step,
    rows_per_step,
    total_steps,
    train_steps,
    usual_tokens,
)
from lorafold.train.memory import peak_bytes, restart_peak
from lorafold.train.sharding import ShardedBase


def start(config: RunConfig, display: Display, resume: bool = False) -> Run:
    """Train as configured, in this process alone, and write the run folder.

    Args:
        resume: go on with the run in the output folder from its last checkpoint, or begin it where there is none.

    Raises:
        LoraFoldError: something in the input is wrong (nothing is written then), or training cannot go on (the run
            folder then holds the last good adapter).
    """
    run = _start(adopted(config, resume=resume), display, resume, ALONE)
    assert run is not None
    return run


def start_worker(config: RunConfig, display: Display, resume: bool = False) -> Run | None:
    """The same as one of the workers that torchrun has started, or alone; None for all but the first of them.

    Args:
        config: what the command line read, which has the method and rank of the adapter that it begins from.
    """
    with joined() as workers:
        return _start(config, display if workers.first else Display(quiet=True), resume, workers)


def _start(config: RunConfig, display: Display, resume: bool, workers: Workers) -> Run | None:
    began = time.perf_counter()
    restart_peak()
    config = config.resolved()
    with workers.together():
        left = left_of(config, workers.count) if resume else None
        if left is None and workers.first:
            check_folder(config.output_dir)
    workers.agree(left.step if left is not None else 0, f"the workers do not all see the run in {config.output_dir}")
    if left is None or not left.finished:
        with workers.together():
            session = _prepare(config, display, left or Left(), workers)
        workers.agree(int(session.data.fingerprint[:15], 16), "the workers have read different training data")
        with workers.together():
            session.folder = open_folder(config, left) if workers.first else None
        summary = session.run()
        if session.folder is not None:
            session.folder.summary({**summary, "wall_seconds": time.perf_counter() - began})
    elif workers.first:
        display.say(f"{config.output_dir} holds a finished run: nothing is left to do")
    if not workers.first:
        return None
    run = read_run(config.output_dir)
    display.say(f"report: {write_report(run)}")
    return run


def open_folder(config: RunConfig, left: Left | None) -> RunFolder:
    """The run folder, new or with what an earlier process has left of a run that goes on.

    Raises:
        OutputError: it cannot be made.
    """
    if left is not None and config.output_dir.is_dir():
        sweep(config.output_dir)
    folder = RunFolder(config.output_dir, None if left is None else left.metrics)
    folder.config(config)
    if config.training.save_total_limit:
        folder.keep_checkpoints(config.training.save_total_limit)
    return folder


def _prepare(config: RunConfig, display: Display, left: Left, workers: Workers) -> _Session:
    """Model, adapter and rows of a run; nothing is written."""
    device = workers.take_device(pick_device(config.training.device))
    loaded = _load(config, display, workers, device)
    if config.training.gradient_checkpointing:
        check_checkpointing(loaded)
    data = prepare(config.data, loaded.tokenizer, config.training.seed, display)
    rows = data.train.rows
    check_positions(loaded, sampled(rows) + sampled(data.held_out.rows))
    check_same_learning(left, train_rows=len(rows), data_sha256=data.fingerprint, dtype=_name(loaded.dtype))
    seeded(config.training.seed)
    injection = adapt_for(loaded, config, rows, left.checkpoint)
    begun = "" if config.from_adapter is None else f" from {config.from_adapter}"
    display.say(f"adapter: {config.adapter.label}{begun}, {injection.describe()}")
    if config.training.shard_base:
        base = ShardedBase([block for _, block in find_blocks(loaded.model)], workers, device)
        nn.Module.to(loaded.model, device)
        workers = replace(workers, sharded=True)
        display.say(f"base: {base.held / 1e6:.1f} MB of its blocks on each worker, gathered one block at a time")
    optimizer = make_optimizer(loaded, config.training)
    steps = total_steps(len(rows), config.training, workers.count)
    ranks = None if config.adapter.target_r is None else MovingRanks(loaded.model, config.adapter, steps)
    if left.checkpoint is not None:
        restore_training(left.checkpoint, loaded, optimizer, ranks)
        display.say(f"resumed from {left.checkpoint}")
    loading = peak_bytes()  # planning counts anew
    plan = left.plan or plan_step(loaded, rows, config.training)
    display.say(plan.describe())
    return _Session(config, display, workers, loaded, data, injection, optimizer, plan, loading, left, ranks)


def _load(config: RunConfig, display: Display, workers: Workers, device: str) -> LoadedModel:
    """The model where it is computed, or, if it is to be shared out, in the memory of the CPU: it may not fit a GPU."""
    training = config.training
    if training.shard_base and workers.count == 1:
        raise ConfigError("shard_base shares the base out among workers, and this process is alone: start torchrun")
    if training.shard_base and training.memory is not None:
        raise ConfigError("memory is measured with a whole base; with shard_base give micro_batch_tokens instead")
    loaded = load(config.model, compute_dtype(training.dtype, device), "cpu" if training.shard_base else device)
    display.say(f"model: {loaded.path.name} in {_name(loaded.dtype)} on {device}")
    if workers.count > 1:
        display.say(f"{workers.count} workers, {rows_per_step(training, workers.count)} rows a step")
    return loaded


@dataclass
class _Session:
    """A run with everything in memory that it needs.

    Attributes:
        loading: memory that took, in bytes.
        left: what an earlier process has done of it.
        ranks: those that fall while it trains.
        folder: the run folder, for the first worker.
    """

    config: RunConfig
    display: Display
    workers: Workers
    loaded: LoadedModel
    data: PreparedData
    injection: Injection
    optimizer: torch.optim.Optimizer
    plan: Plan
    loading: int
    left: Left
    ranks: MovingRanks | None = None
    folder: RunFolder | None = None
    steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.left.steps

    def run(self) -> dict[str, Any]:
        """Evaluate, train, evaluate; the figures for `summary.json`."""
        try:
            before = self._before()
            self._train(before)
            kept = self._cut()
            self._save_adapter()
            after = self._evaluate(len(self.steps))
            self.display.say(f"held-out loss after: {after:.4f} (before: {before:.4f})")
            self._sample("after")
        finally:
            if self.folder is not None:
                self.folder.close()
        return {"eval_loss_before": before, "eval_loss_after": after, **kept, **self._figures()}

    def _cut(self) -> dict[str, Any]:
        """Leave nothing of the adapter but the ranks it has kept; these, for `summary.json`."""
        if self.ranks is None:
            return {}
        ranks = self.ranks.cut()
        kept = [rank for rank in ranks.values() if rank]
        self.display.say(
            f"ranks: {sum(kept)} in {len(kept)} of {len(ranks)} layers, {min(kept)} to {max(kept)} in each"
        )
        return {"ranks": ranks}

    def _before(self) -> float:
        """The held-out loss of the model as it was before training; samples of it are in the run folder afterwards."""
        if self.left.metrics:
            return json.loads(self.left.metrics[0])["eval_loss"]
        before = self._evaluate(0)
        self.display.say(f"held-out loss before: {before:.4f}")
        self._sample("before")
        return before

    def _train(self, before: float) -> None:
        training, rows, done = self.config.training, self.data.train.rows, len(self.steps)
        total = total_steps(len(rows), training, self.workers.count)
        running = train_steps(self.loaded, rows, training, self.plan, self.optimizer, done, self.workers, self.ranks)
        adapter = self.config.output_dir / ADAPTER
        try:
            follow(running, self.steps, total, self.display, lambda step: self._after(step, total, before))
        except TrainingError as error:
            self._save_adapter()
            raise TrainingError(
                f"{error}. Training stopped; {adapter} holds the adapter as it was after step {len(self.steps)}. "
                "A lower learning_rate is the usual cure."
            ) from error
        except BaseException:  # Ctrl-C and the like: what was learned so far is kept
            if self.steps and self.folder is not None:
                save_adapter(adapter, self.loaded, self.config.adapter)
                again = "; --resume goes on from the last checkpoint" if training.save_steps else ""
                self.display.say(
                    f"stopped after step {len(self.steps)} of {total}; {adapter} holds the adapter as it is{again}"
                )
            raise
        finally:
            if isinstance(rows, RowStream):
                self.display.say(f"training data: {rows.describe_met()}")

    def _after(self, step: Step, total: int, before: float) -> None:
        training, number = self.config.training, step.step
        self._metric(**step.__dict__)
        if training.eval_steps and number % training.eval_steps == 0 and number < total:
            self.loaded.model.eval()
            self.display.say(f"step {number}: held-out loss {self._evaluate(number):.4f} (before: {before:.4f})")
        if training.save_steps and number % training.save_steps == 0:
            self._save(number)

    def _save_adapter(self) -> None:
        with self.workers.together():
            if self.folder is not None:
                save_adapter(self.folder.path / ADAPTER, self.loaded, self.config.adapter)

    def _save(self, step: int) -> None:
        with self.workers.together():
            if self.folder is None:
                return
            training = self.config.training
            state = State(
                step=step,
                metrics=self.folder.lines,
                rows_per_step=rows_per_step(training, self.workers.count),
                train_rows=len(self.data.train.rows),
                data_sha256=self.data.fingerprint,
                dtype=_name(self.loaded.dtype),
                plan=self.plan,
            )
            path = checkpoint_folder(self.folder.path, step)
            save_checkpoint(path, self.loaded, self.config.adapter, self.optimizer, state, self.ranks)
            if training.save_total_limit:
                self.folder.keep_checkpoints(training.save_total_limit)

    def _metric(self, **values: Any) -> None:
        with self.workers.together():
            if self.folder is not None:
                self.folder.metric(**values)

    def _evaluate(self, step: int) -> float:
        rows = self.workers.every(self.data.held_out.rows)
        most = min(self.plan.micro_batch_tokens, usual_tokens(self.loaded))
        shared = self.config.training.shared_prefix_tokens
        with self.display.bar("evaluating", len(rows)) as advance:
            total, count = loss_sum(self.loaded, rows, most, progress=advance, shared=shared or None)
        total, count = self.workers.total(total, count)
        self._metric(step=step, eval_loss=total / count)
        return total / count

    def _sample(self, when: str) -> None:
        """Let the first worker put what the model says to held-out prompts in the run folder."""
        with self.workers.together():
            asked = self.data.examples[: self.config.training.sample_rows]
            if self.folder is None and not self.workers.sharded:
                return
            words = sample(self.loaded, asked, self.config, self.display, f"samples {when}")
            if self.folder is None:
                return
            if when == "before":
                samples = [{"prompt": prompt_text(e), "reference": reference_text(e)} for e in asked]
            else:
                samples = [json.loads(line) for line in lines_of(self.folder.path / SAMPLES)]
            self.folder.samples([{**s, when: text} for s, text in zip(samples, words, strict=True)])

    def _figures(self) -> dict[str, Any]:
        steps, data = self.steps, self.data
        seconds = sum(step.seconds for step in steps)
        return {
            "trainable_parameters": self.injection.trainable,
            "samples_per_second": sum(step.rows for step in steps) / seconds,
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            "peak_memory_bytes": max(self.loading, peak_bytes()),
            "train_seconds": seconds,
            "steps": len(steps),
            "resumed_from": self.left.step,
            "workers": self.workers.count,
            "rows_per_step": rows_per_step(self.config.training, self.workers.count),
            "train_rows": len(data.train.rows),
            "eval_rows": len(data.held_out.rows),
            "eval_tokens": sum(sum(row.supervised) for row in data.held_out.rows),
            "cut_rows": data.train.cut,
            "dtype": _name(self.loaded.dtype),
            "promoted_tensors": len(self.injection.promoted.codecs),
            "added_bytes": self.injection.promoted.added_bytes,
            "base_weights_sha256": self.loaded.weights_hash(),
            "data_sha256": data.fingerprint,
            "eval_data_sha256": data.eval_fingerprint,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sample(
    loaded: LoadedModel, examples: Sequence[Example], config: RunConfig, display: Display, label: str
) -> list[str]:
    """What the model says to the prompts of some examples, greedily."""
    texts = []
    with display.bar(label, len(examples)) as advance:
        for example in examples:
            ids = prompt_ids(example, loaded.tokenizer, config.data.template)
            try:
                out = generate(loaded, ids, config.training.sample_tokens, keep=config.training.memory is None)
                texts.append(loaded.tokenizer.decode(out, skip_special_tokens=True).strip())
            except DataError as error:  # too long, as its row was
                texts.append(f"({error})")
            advance(1)
    return texts


def prompt_text(example: Example) -> str:
    """The prompt of an example as a person reads it."""
    if example.messages:
        turns = example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages
        return "\n".join(str(turn["content"]) for turn in turns)
    return example.prompt or (example.text or "")[:200]


def reference_text(example: Example) -> str:
    """The completion that the data give."""
    if example.messages and example.messages[-1]["role"] == "assistant":
        return str(example.messages[-1]["content"])
    return example.completion or ""


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and torch sees no CUDA device here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def seeded(seed: int) -> None:
    """Seed everything that initializes or shuffles."""
    torch.manual_seed(seed)
