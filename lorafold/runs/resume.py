"""Going on with an interrupted run: what it has left, whether it is the same run, and from which step."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lorafold.config import RunConfig, TrainingConfig
from lorafold.errors import ConfigError, bullet_list
from lorafold.runs.folder import CONFIG, METRICS, SAMPLES, SUMMARY, check_folder, checkpoints, lines_of
from lorafold.train.budget import Plan
from lorafold.train.checkpoint import State, read_state
from lorafold.train.loop import Step, rows_per_step

_PLANNING = ("micro_batch_tokens", "memory", "gradient_checkpointing")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")  # their product is compared
_FREE = (
    "output_dir",
    "save_steps",
    "save_total_limit",
    "device",
    "shard_base",
    *_PLANNING,
    *_BATCH,
)  # no result depends on these
_LEFTOVER = re.compile(r"\.+(checkpoint-\d+|adapter|[a-z]+\.(yaml|jsonl|json|html))\.\S*\.tmp\S*")  # files.py


@dataclass(frozen=True)
class Left:
    """What an earlier process has left of a run.

    Attributes:
        finished: nothing is left to do.
        checkpoint: the last complete checkpoint; None where the run begins from its first step.
        state: what stands in it.
        metrics: the lines of `metrics.jsonl` until then.
        plan: how steps were computed, where the options that decide it are the same.
    """

    finished: bool = False
    checkpoint: Path | None = None
    state: State | None = None
    metrics: list[str] = field(default_factory=list)
    plan: Plan | None = None

    @property
    def steps(self) -> list[Step]:
        """What `metrics` says of these steps."""
        return [Step(**values) for values in map(json.loads, self.metrics) if "loss" in values]

    @property
    def step(self) -> int:
        """How many need not be done again."""
        return self.state.step if self.state is not None else 0


def left_of(config: RunConfig, workers: int = 1) -> Left:
    """What there is to go on from in the output folder of a resolved configuration.

    Args:
        workers: how many will go on.

    Raises:
        ConfigError: the run there was another one, with all differences, or its checkpoint is damaged.
        OutputError: something else lies there.
    """
    path = config.output_dir
    if not (path / CONFIG).is_file():
        if not (path.is_dir() and all(_of_no_use(p) for p in path.iterdir())):  # stopped before it had begun
            check_folder(path)
        return Left()
    old = configured(path)
    there = checkpoints(path)
    state = read_state(there[-1]) if there else None
    _refuse_another(path, old, config, state, workers)
    if (path / SUMMARY).is_file():
        return Left(True, state=state)
    if state is None:
        return Left()
    lines = lines_of(path / METRICS)[: state.metrics]
    if len(lines) < state.metrics or (config.task.continues and not (path / SAMPLES).is_file()):
        raise ConfigError(f"{path} is damaged: {METRICS} or {SAMPLES} lacks what was there at {there[-1].name}")
    same = all(getattr(old.training, key) == getattr(config.training, key) for key in _PLANNING)
    return Left(False, there[-1], state, lines, state.plan if same else None)


def configured(path: Path) -> RunConfig:
    """The configuration in a run folder, finished or not.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        return RunConfig.from_dict(yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")))
    except (yaml.YAMLError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path / CONFIG} is damaged: {error}") from None


def _refuse_another(path: Path, old: RunConfig, new: RunConfig, state: State | None, workers: int) -> None:
    then, now = old.to_dict(), new.to_dict()
    faults = [
        f"{key} was {then[key]!r} and is {now[key]!r}" for key in then if key not in _FREE and then[key] != now[key]
    ]
    if state is not None:
        faults += _rows_fault(new.training, state.rows_per_step, workers)
    if faults:
        raise ConfigError(
            f"the run in {path} was another one, so it cannot be resumed:\n{bullet_list(faults)}\n"
            f"give the options it had (--config {path / CONFIG}), or another --output-dir without --resume"
        )


def _rows_fault(config: TrainingConfig, wanted: int, workers: int) -> list[str]:
    """What is wrong with the rows of a step, and which values would be right."""
    rows = rows_per_step(config, workers)
    if rows == wanted:
        return []
    fault = f"a step had {wanted} rows and would have {rows}"
    fault += f" with {workers} workers" if workers > 1 else ""
    if wanted % workers:
        return [f"{fault}: take a number of workers that divides {wanted}"]
    each, size = wanted // workers, config.per_device_train_batch_size
    size = size if each % size == 0 else each
    return [f"{fault}: give --per-device-train-batch-size {size} --gradient-accumulation-steps {each // size}"]


def check_same_learning(left: Left, **now: str | int) -> None:
    """Refuse to go on with other rows or in another type than before.

    Args:
        now: fields of `State` as they are in this process.

    Raises:
        ConfigError: naming all that differ.
    """
    faults = [
        f"{key} was {getattr(left.state, key)} and is {value}"
        for key, value in now.items()
        if left.state is not None and getattr(left.state, key) != value
    ]
    if faults:
        raise ConfigError(f"{left.checkpoint} was made from something else:\n{bullet_list(faults)}")


def _of_no_use(path: Path) -> bool:
    return bool(_LEFTOVER.fullmatch(path.name)) or (path.name == METRICS and not path.stat().st_size)


def sweep(path: Path) -> None:
    """Remove what a process that was killed left half-written in a run folder."""
    for leftover in path.iterdir():
        if _LEFTOVER.fullmatch(leftover.name):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
