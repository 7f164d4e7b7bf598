"""`lorafold train`: tune; writes a run folder."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorafold.config import AdapterSpec, DataConfig, RunConfig, TaskConfig, TrainingConfig

_FLAT = Parameter(name="*")


def train(
    model: str,
    *,
    data: Annotated[DataConfig, _FLAT],
    task: Annotated[TaskConfig, _FLAT] = TaskConfig(),  # noqa: B008
    adapter: Annotated[AdapterSpec, _FLAT] = AdapterSpec(),  # noqa: B008
    training: Annotated[TrainingConfig, _FLAT] = TrainingConfig(),  # noqa: B008
    output_dir: Annotated[Path, Parameter(name=["--output-dir", "-o"])] = Path("lorafold-run"),
    from_adapter: Path | None = None,
    config: Path | None = None,
    resume: bool = False,
    given: Annotated[Collection[str], Parameter(parse=False)] = (),
) -> None:
    """Tune a model on your rows; writes a run folder with adapter, metrics and report.

    Started by torchrun, several processes share the rows of each step.

    Args:
        model: a .gguf file, a transformers folder or hub id, or smollm2 (the embedded default).
        output_dir: run folder to write; it must not exist, or be empty.
        from_adapter: adapter folder (also PEFT's or MLX's) or run to go on training; it says method, rank and layers.
        config: YAML file with any of these options; the command line wins.
        resume: go on with the run in output_dir from its last checkpoint (see save_steps), or begin it.
        given: names of the options on the command line.
    """
    import os

    from lorafold.config.workers import workers_of
    from lorafold.errors import ConfigError
    from lorafold.evals.figures import SHOWN, written
    from lorafold.runs.display import Display, output
    from lorafold.runs.fine_tune import fine_tune
    from lorafold.runs.from_adapter import adopted
    from lorafold.runs.next_step import next_commands
    from lorafold.runs.start import start_worker

    del config  # expanded before parsing
    wanted = RunConfig(model, output_dir, data, adapter, training, task, from_adapter)
    if not task.continues:
        if workers_of(os.environ):
            raise ConfigError(f"a run of --task {task.task} is one process: start it without torchrun")
        run = fine_tune(wanted, Display(), resume)
    else:
        run = start_worker(adopted(wanted, given, resume), Display(), resume)
    if run is None:  # the first worker speaks for all
        return
    s, commands = run.summary, next_commands(run)
    if not task.continues:
        key = next(key for key in ("entity_f1", "recall_at_1", "accuracy") if f"{key}_after" in s)
        output(f"held-out {SHOWN[key][0]} {written(key, s[f'{key}_before'])} -> {written(key, s[f'{key}_after'])}")
    output(
        f"held-out loss {s['eval_loss_before']:.4f} -> {s['eval_loss_after']:.4f}, "
        f"{s['samples_per_second']:.2f} samples/s, peak memory {s['peak_memory_bytes'] / 1e9:.2f} GB"
    )
    output("next: " + "   (or: ".join(commands) + ")" * (len(commands) - 1))
