"""Rows of tasks that are no texts to continue: of files, of folders with splits and of runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from lorafold.config import DataConfig, RowsConfig, RunConfig, TaskConfig, TrainingConfig
from lorafold.errors import ConfigError, DataError
from lorafold.runs.display import Display
from lorafold.runs.folder import RunFolder
from lorafold.runs.prepare import evaluation_rows, training_rows
from lorafold.runs.raw_rows import read_raw
from lorafold.runs.score import rows_of
from lorafold.runs.tasks import task_of

TASK = TaskConfig("classification")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def write(path: Path, count: int, empty: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"text": "" if i and i <= empty else f"text {i}", "label": "ab"[i % 2]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_at(folder: Path, data: DataConfig, task: TaskConfig) -> Path:
    """The folder of a finished run, without what it learned."""
    writer = RunFolder(folder)
    writer.config(RunConfig("m", folder, data, training=TrainingConfig(seed=3), task=task))
    writer.summary({})
    writer.close()
    (folder / "adapter").mkdir()
    return folder


def test_of_a_folder_with_splits_the_held_out_one_is_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "data" / "train.jsonl", 9)
    write(tmp_path / "data" / "test.jsonl", 4)
    assert len(rows_of(RowsConfig(tmp_path / "data"), TASK, Display())[1]) == 4
    assert capsys.readouterr().err == "rows of test.jsonl\n"
    assert len(rows_of(RowsConfig(tmp_path / "data", limit=3), TASK)[1]) == 3


def test_a_run_gives_its_rows_as_it_read_them(tmp_path: Path) -> None:
    data = DataConfig(write(tmp_path / "rows.jsonl", 20), eval_fraction=0.25, max_length=77)
    task = replace(TASK, text="say {text}")
    run = run_at(tmp_path / "run", data, task)
    held = read_raw(RunConfig("m", run, data, training=TrainingConfig(seed=3), task=task), task_of(task)).held_out
    assert rows_of(RowsConfig(run), TASK)[1:] == (held, 77)
    assert rows_of(RowsConfig(run), task)[1:] == (held, 77)
    assert rows_of(RowsConfig(run, limit=2), TASK)[1] == held[:2]
    with pytest.raises(ConfigError, match="a run with another text; leave out"):
        rows_of(RowsConfig(run), replace(TASK, text="{text}!"))
    with pytest.raises(ConfigError, match="leave out max_length, or give the data"):
        rows_of(RowsConfig(run, max_length=50), TASK)
    with pytest.raises(ConfigError, match="a run of --task classification, not of --task embedding"):
        rows_of(RowsConfig(run), TaskConfig("embedding"))
    for of_texts in (evaluation_rows, training_rows):
        with pytest.raises(ConfigError, match="whose rows are no texts to continue"):
            of_texts(RowsConfig(run), None)


def test_faults_of_both_parts_are_counted_together(tmp_path: Path) -> None:
    data = DataConfig(write(tmp_path / "rows.jsonl", 20, empty=11), eval_fraction=0.5)
    with pytest.raises(DataError, match=r"row 10: the text is empty\n  - and 1 more"):
        read_raw(RunConfig("m", tmp_path, data, training=TrainingConfig(seed=3), task=TASK), task_of(TASK))
