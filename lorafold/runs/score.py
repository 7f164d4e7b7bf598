"""How well models do a task on the same rows: folders as they are, and a base with what runs have learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorafold.config import RowsConfig, TaskConfig
from lorafold.errors import AdapterError, ConfigError
from lorafold.evals.figures import Figures
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import compute_dtype
from lorafold.runs.display import Display
from lorafold.runs.prepare import run_as_data
from lorafold.runs.raw_rows import evaluation_rows, held_out_rows
from lorafold.runs.tasks import Task, task_of
from lorafold.train.loop import usual_tokens
from lorafold.train.objectives import evaluate_rows


def rows_of(data: RowsConfig, config: TaskConfig, display: Display | None = None) -> tuple[Task, list[Any], int]:
    """The task, the rows of the data (up to `limit`) and the tokens kept of each; of a run folder as the run had them.

    Raises:
        ConfigError: the run had another task, or other options of it.
        DataError: the rows are not what the task needs, or those of the run have changed.
    """
    run = run_as_data(data)
    if run is None:
        task = task_of(config)
        return task, evaluation_rows(data, task, display or Display(quiet=True)), data.max_length
    if run.config.task.task != config.task:
        raise ConfigError(f"{run.path} is a run of --task {run.config.task.task}, not of --task {config.task}")
    settled = [
        f.name
        for f in fields(TaskConfig)
        if getattr(config, f.name) not in (f.default, getattr(run.config.task, f.name))
    ]
    if settled:
        raise ConfigError(f"{run.path} is a run with another {', '.join(settled)}; leave out what it has settled")
    task, rows = held_out_rows(run)
    return task, rows[: data.limit], run.config.data.max_length


def score(
    task: Task,
    model: str,
    adapter: Path | None,
    rows: list[Any],
    max_length: int,
    dtype: str,
    progress: Callable[..., Any] | None = None,
) -> Figures:
    """Figures of a model, alone or with an adapter.

    Raises:
        AdapterError: neither the folder nor the adapter has a trained head for the task.
        DataError: rows have labels that the model does not.
    """
    trained = task.trained(model, adapter)
    if trained is None:
        raise AdapterError(f"{adapter or model} has no trained head for {task.config.task}; train one first")
    loaded = trained.load(model, compute_dtype(dtype))
    if adapter:
        load_adapter(loaded, adapter)
    tokens = trained.tokenized(rows, loaded, max_length).rows
    return evaluate_rows(trained.objective, loaded, tokens, usual_tokens(loaded), progress)
