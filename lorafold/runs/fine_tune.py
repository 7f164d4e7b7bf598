"""A run of any task but language modelling, from its configuration to a finished run folder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from lorafold.adapters.inject import Injection, inject
from lorafold.config import METHODS, AdapterSpec, RunConfig
from lorafold.errors import ConfigError, TrainingError, bullet_list
from lorafold.evals.figures import Figures
from lorafold.models.adapter_files import save_adapter
from lorafold.models.classifier import LABELS, is_quantized
from lorafold.models.load import LoadedModel, compute_dtype
from lorafold.runs.display import Display, follow
from lorafold.runs.folder import ADAPTER, Run, RunFolder, check_folder, checkpoint_folder, read_run
from lorafold.runs.raw_rows import RawRows, read_raw
from lorafold.runs.report import write_report
from lorafold.runs.resume import Left, check_same_learning, left_of
from lorafold.runs.start import open_folder, pick_device, seeded
from lorafold.runs.task_report import task_report
from lorafold.runs.tasks import Task, Tokenized, task_of
from lorafold.train.budget import Plan
from lorafold.train.checkpoint import State, restore_training, save_checkpoint
from lorafold.train.loop import Step, make_optimizer, rows_per_step, total_steps, usual_tokens
from lorafold.train.memory import peak_bytes, restart_peak
from lorafold.train.objectives import evaluate_rows
from lorafold.train.rows import plan_rows, train_rows

_MEANINGLESS = (
    "prompt",
    "completion",
    "template",
    "supervise",
    "shared_prefix_tokens",
    "shard_base",
)


def fine_tune(config: RunConfig, display: Display, resume: bool = False) -> Run:
    """Train a model for a task as configured and write the run folder.

    Args:
        resume: go on with the run in the output folder from its last checkpoint, or begin it where there is none.

    Raises:
        LoraFoldError: something in the input is wrong (nothing is written then), or training cannot go on (the run
            folder then holds the last good adapter).
    """
    began = time.perf_counter()
    restart_peak()
    task = task_of(config.task)
    _refuse_meaningless(config, task)
    config = config.resolved()
    left = left_of(config) if resume else None
    if left is None:
        check_folder(config.output_dir)
    if left is None or not left.finished:
        session = _prepare(config, task, display, left)
        summary = session.run()
        session.folder.summary({**summary, "wall_seconds": time.perf_counter() - began})
    else:
        display.say(f"{config.output_dir} holds a finished run: nothing is left to do")
    run = read_run(config.output_dir)
    display.say(f"report: {write_report(run, task_report(run))}")
    return run


def _refuse_meaningless(config: RunConfig, task: Task) -> None:
    faults = [
        f"{name} means nothing to --task {config.task.task}; leave it out"
        for name in _MEANINGLESS
        for group in (config.data, config.training)
        if hasattr(group, name) and getattr(group, name) != getattr(type(group), name)
    ]
    if config.adapter.init_lora_weights == "eva":
        faults.append("init_lora_weights eva is for language models so far")
    if config.from_adapter is not None:
        faults.append("from_adapter is for language models so far")
    if config.adapter.target_r is not None:
        faults.append("target_r is for language models so far")
    if config.adapter.method == "qa-lora" and not is_quantized(config.model):
        faults.append("qa-lora learns offsets of a quantized base; use --method lora, which takes this model as it is")
    faults += task.faults(config)
    if faults:
        raise ConfigError(faults[0] if len(faults) == 1 else "several options are wrong:\n" + bullet_list(faults))


def _prepare(config: RunConfig, task: Task, display: Display, left: Left | None) -> _Session:
    """Rows, model and adapter; the run folder is made last."""
    training = config.training
    device = pick_device(training.device)
    raw = read_raw(config, task)
    task = task.with_labels(config.model, raw.train)
    seeded(training.seed)
    loaded = task.load(config.model, compute_dtype(training.dtype, device), device)
    display.say(f"model: {loaded.path.name} in {_name(loaded.dtype)} on {device}")
    train = task.tokenized(raw.train, loaded, config.data.max_length, "the training rows")
    held_out = task.tokenized(raw.held_out, loaded, config.data.max_length, "the held-out rows")
    now = {"train_rows": len(train.rows), "data_sha256": raw.fingerprint, "dtype": _name(loaded.dtype)}
    check_same_learning(left or Left(), **now)
    display.say(f"training data: {train.described}")
    display.say(f"held-out data: {held_out.described}")
    spec = config.adapter
    if "modules_to_save" in METHODS[spec.method].options:  # full trains everything
        spec = task.whole_too(spec, loaded)
    injection = inject(loaded.model, spec)
    display.say(f"training: {spec.label}, {injection.describe()}")
    optimizer = make_optimizer(loaded, training)
    loading = peak_bytes()  # planning counts anew
    plan = (left and left.plan) or plan_rows(task.objective, loaded, train.rows, training)
    if plan.budget:
        display.say(plan.describe())
    folder, left = open_folder(config, left), left or Left()
    return _Session(
        config, spec, task, display, loaded, raw, train, held_out, injection, optimizer, plan, loading, folder, left
    )


@dataclass
class _Session:
    """A run with everything in memory that it needs.

    Attributes:
        spec: what is trained; that of the configuration, and what is new in the model.
        plan: how its steps are computed.
        loading: memory that everything before planning took, in bytes.
        left: what an earlier process has done of it.
    """

    config: RunConfig
    spec: AdapterSpec
    task: Task
    display: Display
    loaded: LoadedModel
    raw: RawRows
    train: Tokenized
    held_out: Tokenized
    injection: Injection
    optimizer: torch.optim.Optimizer
    plan: Plan
    loading: int
    folder: RunFolder
    left: Left
    steps: list[Step] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = self.left.steps

    def run(self) -> dict[str, Any]:
        """Evaluate, train, evaluate; the figures for `summary.json`."""
        try:
            before = self._before()
            self._train()
            self._save()
            after = self._evaluate(len(self.steps))
            self.display.say(f"held-out rows after: {after.describe()}")
        finally:
            self.folder.close()
        return {**before.to_dict("before"), **after.to_dict("after"), **self._figures()}

    def _before(self) -> Figures:
        """The figures before the first step; a run that goes on takes up its checkpoint afterwards."""
        before = self._evaluate(0, known=bool(self.left.metrics))
        self.display.say(f"held-out rows before: {before.describe()}")
        if self.left.checkpoint is not None:
            restore_training(self.left.checkpoint, self.loaded, self.optimizer)
            self.display.say(f"resumed from {self.left.checkpoint}")
        return before

    def _evaluate(self, step: int, known: bool = False) -> Figures:
        """Figures of the held-out rows, which are noted where they are not known yet."""
        training, rows = self.config.training, self.held_out.rows
        most = min(self.plan.micro_batch_tokens, training.micro_batch_tokens or usual_tokens(self.loaded))
        with self.display.bar("evaluating", len(rows)) as advance:
            found = evaluate_rows(self.task.objective, self.loaded, rows, most, advance)
        if not known:
            self.folder.metric(step=step, eval_loss=found.loss, **found.values())
        return found

    def _train(self) -> None:
        training, rows, done = self.config.training, self.train.rows, len(self.steps)
        total = total_steps(len(rows), training)
        running = train_rows(self.task.objective, self.loaded, rows, training, self.plan, self.optimizer, done)
        try:
            follow(running, self.steps, total, self.display, lambda step: self._after(step, total))
        except BaseException as error:  # Ctrl-C and the like too: what was learned so far is kept
            if not self.steps:
                raise
            self._save()
            where = self.config.output_dir / ADAPTER
            kept = f"{where} holds what was learned until step {len(self.steps)} of {total}"
            if isinstance(error, TrainingError):
                raise TrainingError(f"{error}. {kept}. A lower learning_rate is the usual cure.") from error
            again = "; --resume goes on from the last checkpoint" if training.save_steps else ""
            self.display.say(f"stopped: {kept}{again}")
            raise

    def _after(self, step: Step, total: int) -> None:
        training, number = self.config.training, step.step
        self.folder.metric(**step.__dict__)
        if training.eval_steps and number % training.eval_steps == 0 and number < total:
            self.display.say(f"step {number}: {self._evaluate(number).describe()}")
        if training.save_steps and number % training.save_steps == 0:
            self._save_checkpoint(number)

    def _save(self) -> None:
        save_adapter(self.config.output_dir / ADAPTER, self.loaded, self.spec, notes=self._notes)

    @property
    def _notes(self) -> dict[str, str]:
        return {LABELS: json.dumps(self.task.labels)} if self.task.labels else {}

    def _save_checkpoint(self, step: int) -> None:
        training = self.config.training
        state = State(
            step=step,
            metrics=self.folder.lines,
            rows_per_step=rows_per_step(training),
            train_rows=len(self.train.rows),
            data_sha256=self.raw.fingerprint,
            dtype=_name(self.loaded.dtype),
            plan=self.plan,
        )
        path = checkpoint_folder(self.folder.path, step)
        save_checkpoint(path, self.loaded, self.spec, self.optimizer, state, notes=self._notes)
        if training.save_total_limit:
            self.folder.keep_checkpoints(training.save_total_limit)

    def _figures(self) -> dict[str, Any]:
        steps = self.steps
        seconds = sum(step.seconds for step in steps)
        return {
            **({"labels": list(self.task.labels)} if self.task.labels else {}),
            "trainable_parameters": self.injection.trainable,
            "samples_per_second": sum(step.rows for step in steps) / seconds,
            "tokens_per_second": sum(step.tokens for step in steps) / seconds,
            "peak_memory_bytes": max(self.loading, peak_bytes()),
            "train_seconds": seconds,
            "steps": len(steps),
            "resumed_from": self.left.step,
            "rows_per_step": rows_per_step(self.config.training),
            "train_rows": len(self.train.rows),
            "eval_rows": len(self.held_out.rows),
            "dtype": _name(self.loaded.dtype),
            "base_weights_sha256": self.loaded.weights_hash(),
            "data_sha256": self.raw.fingerprint,
            "eval_data_sha256": self.raw.eval_fingerprint,
        }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
