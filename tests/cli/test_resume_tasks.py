"""Runs of every task but language modelling that are stopped and go on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorafold.models.classifier import adapter_labels
from lorafold.runs import fine_tune
from lorafold.runs.folder import RunFolder, checkpoints
from lorafold.train.checkpoint import read_state
from tests.practice import command
from tests.tiny_classifier import labelled_rows, pair_rows, tagged_rows, tiny_bert, write_rows

ROWS: dict[str, Callable[[int], Any]] = {
    "classification": labelled_rows,
    "token-classification": tagged_rows,
    "embedding": pair_rows,
}
SAVING = ["--method", "lora", "--lora-dropout", 0.2, "--max-steps", 6, "--save-steps", 2, "--eval-steps", 4]


class Stop(BaseException):
    """What a killed process does: nothing more."""


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has learned and said, times left out."""
    timed = ("seconds", "_per_second", "memory_bytes", "resumed_from")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    return {
        "adapter": {key: value.numpy().tobytes() for key, value in tensors.items()},
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "summary": {k: v for k, v in json.loads((run / "summary.json").read_text()).items() if not k.endswith(timed)},
        "files": {p.name for p in run.iterdir()},
    }


@pytest.mark.parametrize("task", ROWS)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped after step 3 and begun again from step 2: bit for bit what an uninterrupted run gives, with dropout."""
    model, data = tiny_bert(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", ROWS[task](40))
    line = ["train", model, "--task", task, "--data", data, *SAVING]
    assert command(*line, "--output-dir", tmp_path / "whole") == 0
    metric, run = RunFolder.metric, tmp_path / "run"

    def stop(self: RunFolder, **values: Any) -> None:
        metric(self, **values)
        if values.get("step") == 3:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "metric", stop)
        patched.setattr(fine_tune._Session, "_save", lambda _: None)
        with pytest.raises(Stop):
            command(*line, "--output-dir", run)
    assert [path.name for path in checkpoints(run)] == ["checkpoint-2"]
    shutil.copytree(run, tmp_path / "same")
    assert command(*line, "--output-dir", run, "--resume") == 0
    assert outcome(run) == outcome(tmp_path / "whole")
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == 2
    assert command("train", "--config", run / "config.yaml", "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert adapter_labels(checkpoints(run)[0]) == adapter_labels(run / "adapter")
    assert command(*line, "--seed", 3, "--output-dir", tmp_path / "same", "--resume") == 2
    assert "seed was 42 and is 3" in capsys.readouterr().err


def test_a_run_that_has_not_begun_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", pair_rows(30))
    line = ["train", tiny_bert(tmp_path / "m"), "--task", "embedding", "--data", data, *SAVING, "--resume"]
    assert command(*line, "--save-total-limit", 1, "--output-dir", tmp_path / "run") == 0
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["checkpoint-6"]
    write_rows(tmp_path / "rows.jsonl", pair_rows(30, seed=1))
    (tmp_path / "run" / "summary.json").unlink()
    capsys.readouterr()
    assert command(*line, "--save-total-limit", 1, "--output-dir", tmp_path / "run") == 2
    assert "data_sha256 was" in capsys.readouterr().err


@pytest.mark.parametrize("task", ROWS)
def test_memory_changes_no_result(task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The plan is said, kept with the checkpoint, and holds for evaluation as well."""
    model, data = tiny_bert(tmp_path / "m"), write_rows(tmp_path / "rows.jsonl", ROWS[task](40))
    line = ["train", model, "--task", task, "--data", data, "--method", "lora", "--max-steps", 4, "--save-steps", 2]
    assert command(*line, "--output-dir", tmp_path / "free") == 0
    assert "to stay below" not in capsys.readouterr().err
    assert command(*line, "--memory", "4GB", "--micro-batch-tokens", 64, "--output-dir", tmp_path / "run") == 0
    assert "micro-batches of up to 64 tokens to stay below 4.00 GB" in " ".join(capsys.readouterr().err.split())
    free, run = (outcome(tmp_path / name)["metrics"] for name in ("free", "run"))
    for expected, found in zip(free, run, strict=True):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)
    plan = read_state(checkpoints(tmp_path / "run")[-1]).plan
    assert (plan.micro_batch_tokens, plan.budget) == (64, 4 * 10**9)
