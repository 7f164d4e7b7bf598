"""From a data configuration to rows as a task reads them: training rows and held-out rows, before they are tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lorafold.config import RowsConfig, RunConfig
from lorafold.data.read import evaluation_split, read_rows, split_rows, training_split
from lorafold.errors import DataError
from lorafold.runs.display import Display
from lorafold.runs.folder import Run
from lorafold.runs.prepare import other_rows, read_split
from lorafold.runs.tasks import Task, task_of


@dataclass(frozen=True)
class RawRows:
    """Rows of a run as its task reads them.

    Attributes:
        train, held_out: the rows.
        fingerprint: sha256 of the training file(s).
        eval_fingerprint: sha256 of the held-out file(s); None when a part of the data was held out.
    """

    train: list[Any]
    held_out: list[Any]
    fingerprint: str
    eval_fingerprint: str | None


def read_raw(config: RunConfig, task: Task) -> RawRows:
    """Read training and held-out rows.

    Raises:
        DataError: whatever is wrong with the files, rows or templates.
    """
    data = config.data
    rows, other = read_rows(data.data, training_split(data.data)), other_rows(data)
    if other is None:
        train, held = split_rows(rows, data.eval_fraction, config.training.seed, data.limit)
        held = held[: data.eval_limit]
        both = sorted([*train, *held])  # one count of faults over both
        read = dict(zip(both, task.read(rows, both), strict=True))
        parts = [read[at] for at in train], [read[at] for at in held]
    else:
        train, held = range(len(rows))[: data.limit], range(len(other))[: data.eval_limit]
        parts = task.read(rows, train), task.read(other, held)
    return RawRows(
        *parts,
        rows.fingerprint(),
        other.fingerprint() if other else None,
    )


def held_out_rows(run: Run) -> tuple[Task, list[Any]]:
    """The task of a run and its held-out rows.

    Raises:
        DataError: the run's data have changed since.
    """
    task = task_of(run.config.task)
    read = read_raw(run.config, task)
    now = (read.fingerprint, read.eval_fingerprint)
    if now != (run.summary.get("data_sha256", now[0]), run.summary.get("eval_data_sha256", now[1])):
        raise DataError(
            f"{run.config.data.data}: changed since the run was trained, so its held-out rows are no longer known; put "
            "the old file back, or give other rows with --data"
        )
    return task, read.held_out


def evaluation_rows(config: RowsConfig, task: Task, display: Display) -> list[Any]:
    """Rows of the data, up to `limit`; of a folder with splits those that training holds out. Their files are said."""
    rows = read_split(config.data, evaluation_split(config.data), display)
    return task.read(rows, range(len(rows))[: config.limit])
