"""A run folder: everything needed to repeat, explain and undo a run.

config.yaml     every option, resolved
metrics.jsonl   one line per step or evaluation
samples.jsonl   prompts with the reference and the model's words before and after
summary.json    the figures, and the hashes of base and data
adapter/        adapter_config.json, adapter_model.safetensors
checkpoint-N/   with save_steps: what the run needs to go on after step N, see train/checkpoint.py
report.html     loss curve and samples
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import yaml

from lorafold.config import DataConfig, RunConfig
from lorafold.errors import ConfigError, bullet_list
from lorafold.files import OutputError, check_output, reason, write_text
from lorafold.models import adapter_files

CONFIG, METRICS, SAMPLES, SUMMARY, ADAPTER, REPORT = (
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "summary.json",
    "adapter",
    "report.html",
)


class RunFolder:
    """A run folder being written.

    Args:
        path: must not exist, or be an empty folder, unless a run goes on in it.
        kept: lines of `metrics.jsonl` to keep, where a run goes on.

    Attributes:
        lines: lines of `metrics.jsonl` by now.

    Raises:
        OutputError: the folder holds something already or cannot be made.
    """

    def __init__(self, path: Path, kept: Sequence[str] | None = None):
        self.path = path
        self.lines = len(kept or ())
        if kept is None:
            check_folder(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            if kept is not None:
                write_text(path / METRICS, "".join(f"{line}\n" for line in kept))
            self._metrics = (path / METRICS).open("a", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{path} cannot be written: {error.strerror}") from None

    def config(self, config: RunConfig) -> None:
        """Write `config.yaml`."""
        write_text(self.path / CONFIG, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))

    def metric(self, **values: Any) -> None:
        """Append a line to `metrics.jsonl`; it reaches the disk at once."""
        try:
            self._metrics.write(json.dumps(values) + "\n")
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        except OSError as error:
            raise OutputError(f"{self.path / METRICS} cannot be written: {reason(error)}") from error
        self.lines += 1

    def samples(self, samples: list[dict[str, str]]) -> None:
        """Write `samples.jsonl`."""
        text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        write_text(self.path / SAMPLES, text)

    def summary(self, values: dict[str, Any]) -> None:
        """Write `summary.json`."""
        write_text(self.path / SUMMARY, json.dumps(values, indent=2) + "\n")

    def keep_checkpoints(self, count: int) -> None:
        """Delete all checkpoints but the last ones."""
        for old in checkpoints(self.path)[:-count]:
            gone = Path(tempfile.mkdtemp(prefix=f".{old.name}.", suffix=".tmp", dir=self.path))
            os.replace(old, gone)  # so that what is half deleted does not look like a checkpoint
            rmtree(gone)

    def close(self) -> None:
        """Close `metrics.jsonl`."""
        self._metrics.close()


def checkpoint_folder(path: Path, step: int) -> Path:
    """Where the checkpoint after a step lies in a run folder."""
    return path / f"checkpoint-{step}"


def checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder, the last one last."""
    found = {int(name[1]): p for p in path.iterdir() if (name := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    return [found[step] for step in sorted(found)]


def check_folder(path: Path) -> None:
    """Refuse a path that a run folder cannot have.

    Raises:
        OutputError: something lies there already, or it cannot be written.
    """
    empty = path.is_dir() and not any(path.iterdir())
    check_output(path, empty, "choose another --output-dir: a run is never overwritten")


@dataclass(frozen=True)
class Run:
    """A finished run, read back.

    Attributes:
        path: the folder.
        config: its options.
        metrics: the lines of `metrics.jsonl`.
        samples: the lines of `samples.jsonl`.
        summary: the figures; empty when the run did not finish.
    """

    path: Path
    config: RunConfig
    metrics: list[dict[str, Any]]
    samples: list[dict[str, str]]
    summary: dict[str, Any]

    @property
    def bare(self) -> bool:
        """Whether the folder is an adapter alone, without rows, metrics and samples."""
        return (self.path / adapter_files.CONFIG).is_file()

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.path if self.bare else self.path / ADAPTER


def read_run(path: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: it is not one, or its files are damaged; all faults are named.
    """
    if not path.is_dir():
        raise ConfigError(f"no run folder at {path}; `lorafold train` writes one (--output-dir)")
    faults = [f"{name} is missing" for name in (CONFIG, ADAPTER) if not (path / name).exists()]
    if faults:
        raise ConfigError(f"{path} is not a finished run folder:\n" + bullet_list(faults))
    try:
        values = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8"))
        summary = json.loads((path / SUMMARY).read_text(encoding="utf-8")) if (path / SUMMARY).exists() else {}
        config = RunConfig.from_dict(values)
        metrics, samples = ([json.loads(line) for line in lines_of(path / name)] for name in (METRICS, SAMPLES))
        return Run(path, config, metrics, samples, summary)
    except (yaml.YAMLError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def read_trained(path: Path) -> Run:
    """A run folder, or an adapter folder (combined, reduced, PEFT's or MLX's) as the run of a model that it names.

    Raises:
        ConfigError, AdapterError: it is neither, or its files are damaged; all faults are named.
    """
    if not (path / adapter_files.CONFIG).is_file():
        return read_run(path)
    spec, config = adapter_files.read_spec(path)
    return Run(path, RunConfig(str(config.get("base_model_name_or_path")), path, DataConfig(path), spec), [], [], {})


def lines_of(path: Path) -> list[str]:
    """The lines of a text file that are not empty; none where it is missing."""
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
