"""`lorafold eval`: loss of models, files and adapters on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from lorafold.config import RowsConfig, TaskConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from lorafold.data.stream import RowStream
    from lorafold.data.tokens import Tokens
    from lorafold.runs.display import Display


def evaluate(
    models: tuple[str, ...],
    /,
    *,
    data: Annotated[RowsConfig, Parameter(name="*")],
    task: Annotated[TaskConfig, Parameter(name="*")] = TaskConfig(),  # noqa: B008
    adapter: tuple[Path, ...] = (),
    runtime: Literal["torch", "llama.cpp"] = "torch",
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
) -> None:
    """Mean loss per supervised token of models, folded files or adapters on the same rows; other tasks' own figures.

    With a run folder as --data these are the rows that were held out of that run.

    Args:
        models: one or more models; adapters go on the first.
        adapter: adapter or run folders, each tried on the first model.
        runtime: torch, or llama.cpp (GGUF files): what the deployed file computes.
        dtype: of activations in torch.
    """
    from rich.console import Console

    from lorafold.errors import ConfigError

    if not task.continues and runtime != "torch":
        raise ConfigError(f"llama.cpp is asked for losses of language models; --task {task.task} runs in torch")
    if not task.continues:
        table = _figures(models, adapter, data, task, dtype)
    else:
        table = _losses(models, adapter, data, runtime, dtype)
    Console(markup=False).print(table)


def _losses(models: tuple[str, ...], adapters: tuple[Path, ...], data: RowsConfig, runtime: str, dtype: str) -> Table:
    import math

    from rich.table import Table

    from lorafold.cli.variants import in_llama_cpp, in_torch, tokenizer_of, variants
    from lorafold.data.stream import sampled
    from lorafold.evals.compare import runtime_loss
    from lorafold.evals.loss import evaluate as evaluate_in_torch
    from lorafold.models.positions import check_positions
    from lorafold.runs.display import Display

    display = Display()
    table = Table("model", "runtime", "loss", "perplexity", "tokens")
    for variant in variants(models, adapters):
        if runtime == "torch":
            loaded = in_torch(variant, dtype)
            rows = _rows(data, loaded.tokenizer, display)
            check_positions(loaded, sampled(rows))
            with display.bar(variant.label, len(rows)) as done:
                loss = evaluate_in_torch(loaded, rows, progress=done)
        else:
            rows = _rows(data, tokenizer_of(variant, runtime), display)
            with (
                display.bar(variant.label, len(rows)) as done,
                in_llama_cpp(variant, max(len(r.ids) for r in rows)) as engine,
            ):
                loss = runtime_loss(engine, rows, done)
        count = sum(sum(row.supervised) for row in rows)
        table.add_row(variant.label, runtime, f"{loss:.4f}", f"{math.exp(loss):.3f}", f"{count:,}")
    return table


def _figures(
    models: tuple[str, ...], adapters: tuple[Path, ...], data: RowsConfig, config: TaskConfig, dtype: str
) -> Table:
    from rich.table import Table

    from lorafold.cli.variants import variants
    from lorafold.runs.display import Display
    from lorafold.runs.score import rows_of, score

    display = Display()
    lines: list[tuple[str, dict[str, str]]] = []
    task, rows, max_length = rows_of(data, config, display)
    for variant in variants(models, adapters):
        if adapters and variant.adapter is None and task.trained(variant.model, None) is None:
            continue  # a base without a head of its own
        with display.bar(variant.label, len(rows)) as done:
            found = score(task, variant.model, variant.adapter, rows, max_length, dtype, done)
        lines.append((variant.label, {**found.cells(), task.counted: f"{found.rows:,}"}))
    table = Table("model", *dict.fromkeys(name for _, cells in lines for name in cells))
    for label, cells in lines:
        table.add_row(label, *(cells.get(str(column.header), "") for column in table.columns[1:]))
    return table


def _rows(data: RowsConfig, tokenizer: Any, display: Display) -> Sequence[Tokens] | RowStream:
    from lorafold.runs.prepare import evaluation_rows

    tokenized = evaluation_rows(data, tokenizer, display)
    display.say(f"data: {tokenized.describe()}")
    return tokenized.rows
