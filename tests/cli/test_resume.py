"""Runs that are stopped and go on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from lorafold.runs.folder import checkpoints
from tests.cli.conftest import quick, tree
from tests.cli.killed import MOMENTS
from tests.practice import command

ROOT = Path(__file__).parent.parent.parent
SAVING = quick("--save-steps", 2, "--save-total-limit", 1, "--eval-steps", 4, "--per-device-train-batch-size", 4)
DROPPING = ["--method", "lora", "--lora-dropout", 0.2, "--r", 4]


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has learned and said: bytes of the adapter's tensors, metrics and samples, times left out."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    timed = ("seconds", "_per_second", "memory_bytes", "resumed_from")
    return {
        "adapter": {
            k: v.numpy().tobytes() for k, v in load_file(run / "adapter" / "adapter_model.safetensors").items()
        },
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "samples": (run / "samples.jsonl").read_text(),
        "summary": {k: v for k, v in summary.items() if not k.endswith(timed)},
        "files": {p.name for p in run.iterdir()},
    }


@pytest.fixture(scope="module")
def arguments(tiny_file: Callable[..., Path], data: Path) -> list[object]:
    return [tiny_file("llama", "Q4_1"), "--data", data, *SAVING, *DROPPING]


@pytest.fixture(scope="module")
def whole(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert command("train", *arguments, "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def killed(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Moment -> the folder of a run that was killed then."""
    folder = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    line = [sys.executable, "-m", "tests.cli.killed", folder, *arguments]
    done = subprocess.run([str(a) for a in line], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {moment: folder / str(number) for number, moment in enumerate(MOMENTS)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    moment: str, killed: dict[str, Path], whole: Path, arguments: list[object], tmp_path: Path
) -> None:
    """Bit for bit, with dropout, in a folder that has moved, and with half a line at the end of its metrics."""
    run, expected = tmp_path / "run", outcome(whole)
    if killed[moment].exists():
        shutil.copytree(killed[moment], run)
    there = checkpoints(run) if run.is_dir() else []
    assert [path.name for path in there] == [f"checkpoint-{step}" for step in MOMENTS[moment][4]]
    if moment == "step 3":
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"step": 4, "lo')
    assert command("train", *arguments, "--output-dir", run, "--resume") == 0
    assert outcome(run) == expected
    assert {name for name in tree(run) if name.startswith("checkpoint-6/")} == {
        f"checkpoint-6/{name}"
        for name in ("adapter_config.json", "adapter_model.safetensors", "training.safetensors", "state.json")
    }


def test_a_finished_run_is_left_as_it_is(
    whole: Path, arguments: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    before = {name: (run / name).read_bytes() for name, size in tree(run).items() if size >= 0}
    assert command("train", *arguments, "--output-dir", run, "--resume") == 0
    assert "nothing is left to do" in capsys.readouterr().err
    assert before.keys() == {name for name, size in tree(run).items() if size >= 0}
    assert all((run / name).read_bytes() == content for name, content in before.items() if name != "report.html")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--seed", 7, "--r", 2], ["seed was 42 and is 7", "r was 4 and is 2"]),
        (["--per-device-train-batch-size", 3], ["a step had 4 rows and would have 3", "batch-size 4 --gradient"]),
        (
            ["--per-device-train-batch-size", 2, "--max-steps", 9],
            ["batch-size 2 --gradient-accumulation-steps 2", "max_steps was 6 and is 9"],
        ),
    ],
)
def test_another_run_is_refused_with_all_differences(
    options: list[object],
    said: list[str],
    killed: dict[str, Path],
    arguments: list[object],
    refused: Callable[..., str],
) -> None:
    line = list(arguments)
    for key, value in zip(options[::2], options[1::2], strict=True):
        if key in line:
            line[line.index(key) + 1] = value
        else:
            line += [key, value]
    message = refused("train", *line, "--output-dir", killed["step 3"], "--resume")
    assert all(text in message for text in said)


def test_what_changes_no_result_may_change(killed: dict[str, Path], arguments: list[object], tmp_path: Path) -> None:
    """The same rows in a step, computed otherwise, and another number of checkpoints."""
    run = shutil.copytree(killed["step 3"], tmp_path / "run")
    options = quick("--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 2, "--save-steps", 1)
    line = [
        *arguments[:3],
        *options,
        "--eval-steps",
        4,
        *DROPPING,
        "--micro-batch-tokens",
        64,
        "--no-gradient-checkpointing",
    ]
    assert command("train", *line, "--output-dir", run, "--resume") == 0
    assert [p.name for p in checkpoints(run)] == [f"checkpoint-{step}" for step in (2, 3, 4, 5, 6)]
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == 2


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "lora", "--r", 4, "--init-lora-weights", "pissa", "--use-dora"),
        ("--method", "lora", "--r", 4, "--init-lora-weights", "pissa_niter_4"),
        ("--method", "vera", "--r", 8),
        ("--method", "lora", "--r", 4, "--target-r", 2, "--tinit", 1, "--tfinal", 0),
        ("--r", "full", "--optim", "muon"),
    ],
    ids=["pissa and dora", "fast pissa", "vera", "ranks that move", "muon"],
)
def test_every_start_is_found_again(arguments: list[object], tmp_path: Path, options: tuple[object, ...]) -> None:
    """What an adapter began with, and subtracts from the base, is in no checkpoint: it is made again."""
    line = [*arguments[: -len(DROPPING)], *options]
    limit = line.index("--save-total-limit")
    del line[limit : limit + 2]
    assert command("train", *line, "--output-dir", tmp_path / "whole") == 0
    run = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-6")
    for name in ("summary.json", "report.html"):
        (run / name).unlink()
    assert command("train", *line, "--output-dir", run, "--resume") == 0
    assert json.loads((run / "summary.json").read_text())["resumed_from"] == 4
    assert outcome(run) == outcome(tmp_path / "whole")


def test_changed_rows_and_damaged_checkpoints_are_refused(
    killed: dict[str, Path], arguments: list[object], data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    run, rows = tmp_path / "run", tmp_path / "rows.jsonl"
    shutil.copytree(killed["step 3"], run)
    rows.write_text("".join(data.read_text().splitlines(keepends=True)[:18]))
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(f"data: {data}", f"data: {rows}"))
    line = ["train", arguments[0], "--data", rows, *arguments[3:], "--output-dir", run, "--resume"]
    message = refused(*line)
    assert "train_rows was 14 and is 13" in message
    assert "data_sha256" in message
    state = run / "checkpoint-2" / "state.json"
    state.write_text(state.read_text()[:-9])
    assert "checkpoint-2 is damaged" in refused(*line)
    state.unlink()
    assert "checkpoint-2 is damaged" in refused(*line)


def test_an_optimizer_of_something_else_is_refused(
    killed: dict[str, Path], arguments: list[object], tmp_path: Path, refused: Callable[..., str]
) -> None:
    run = shutil.copytree(killed["step 3"], tmp_path / "run")
    path = run / "checkpoint-2" / "training.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith("exp_avg"))
    save_file({**tensors, first: tensors[first][1:], "other.exp_avg": tensors[first].clone()}, path)
    line = ["train", *arguments, "--output-dir", run, "--resume"]
    message = refused(*line)
    assert "in another shape" in message
    assert "state of other, which is not trained" in message
    path.write_bytes(b"")
    assert "checkpoint-2 is damaged" in refused(*line)


def test_resume_begins_a_run_but_not_among_other_files(
    arguments: list[object], tmp_path: Path, refused: Callable[..., str]
) -> None:
    """So that one command serves a machine that may stop at any time; a folder of something else stays untouched."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    assert "exists already" in refused("train", *arguments, "--output-dir", tmp_path / "other", "--resume")
    assert command("train", *arguments, "--output-dir", tmp_path / "new", "--resume") == 0
    assert json.loads((tmp_path / "new" / "summary.json").read_text())["resumed_from"] == 0


def test_a_limit_of_checkpoints_needs_checkpoints(train: Callable[..., str]) -> None:
    message = train("--save-total-limit", 0)
    assert "save_total_limit is 0" in message
    assert "give save_steps as well" in train("--save-total-limit", 2)
