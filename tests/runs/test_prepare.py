"""The held-out rows of a run are the same rows whenever they are asked for."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from lorafold.config import DataConfig, RowsConfig, RunConfig, TrainingConfig
from lorafold.data.read import read_rows
from lorafold.data.rows import to_examples
from lorafold.data.stream import RowStream, row_batches
from lorafold.data.tokens import Tokenized
from lorafold.errors import ConfigError, DataError
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runs.display import Display
from lorafold.runs.folder import Run, RunFolder
from lorafold.runs.prepare import evaluation_rows, held_out_examples, held_out_rows, prepare, training_rows
from lorafold.train.loop import epoch_batches
from tests.practice import command, write_data
from tests.tiny import tiny_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(GGUFFile(tiny_gguf(tmp_path, "llama", "Q4_1")))


def run_of(config: DataConfig, seed: int = 3, **summary: str | None) -> Run:
    return Run(Path("run"), RunConfig("m", Path("run"), config, training=TrainingConfig(seed=seed)), [], [], summary)


def numbers(rows: Any) -> list[int]:
    return [row.row for row in rows]


@pytest.mark.parametrize("limits", [{}, {"limit": 4}, {"eval_limit": 2}, {"limit": 3, "eval_limit": 1}])
def test_rows_held_out_of_the_data(tmp_path: Path, tokenizer: Any, limits: dict[str, int]) -> None:
    config = DataConfig(write_data(tmp_path / "rows.jsonl"), eval_fraction=0.25, **limits)
    data = prepare(config, tokenizer, 3, Display(quiet=True))
    train, held = numbers(data.train.rows), numbers(data.held_out.rows)
    rows = limits.get("limit", 20)
    assert len(train) + max(1, rows // 4) == rows
    assert len(held) == limits.get("eval_limit", max(1, rows // 4))
    assert max(train + held) < rows
    assert not set(train) & set(held)
    assert numbers(data.examples) == held
    run = run_of(config, data_sha256=data.fingerprint)
    assert numbers(held_out_rows(run, tokenizer).rows) == held
    assert numbers(held_out_examples(run)) == held
    assert data.eval_fingerprint is None
    if not limits:
        assert numbers(held_out_examples(run_of(config, 4))) != held


def test_rows_of_another_file(tmp_path: Path, tokenizer: Any) -> None:
    data, other = write_data(tmp_path / "a.jsonl"), write_data(tmp_path / "b.jsonl", 7)
    config = DataConfig(data, eval_data=other, eval_limit=5, limit=9)
    prepared = prepare(config, tokenizer, 3, Display(quiet=True))
    assert (len(prepared.train.rows), numbers(prepared.held_out.rows)) == (9, [0, 1, 2, 3, 4])
    assert prepared.fingerprint != prepared.eval_fingerprint is not None
    run = run_of(config, data_sha256=prepared.fingerprint, eval_data_sha256=prepared.eval_fingerprint)
    assert numbers(held_out_rows(run, tokenizer).rows) == [0, 1, 2, 3, 4]
    third = write_data(tmp_path / "c.jsonl", 3)
    assert len(held_out_rows(run, tokenizer, third).rows) == 3
    assert len(evaluation_rows(config, tokenizer).rows) == 9
    write_data(other, 6)
    with pytest.raises(DataError, match=r"b\.jsonl: changed since the run was trained"):
        held_out_rows(run, tokenizer)
    assert len(held_out_rows(run, tokenizer, third).rows) == 3


@pytest.mark.parametrize("other", ["validation", "dev", "test"])
def test_a_folder_with_splits_is_trained_on_train(
    tmp_path: Path, tokenizer: Any, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    (folder / other).mkdir(parents=True)
    write_data(folder / "train-0.jsonl", 4)
    write_data(folder / "train-1.jsonl", 5)
    write_data(folder / other / "0.jsonl", 3)
    config = DataConfig(folder)
    prepared = prepare(config, tokenizer, 3, Display(quiet=True))
    assert (len(prepared.train.rows), len(prepared.held_out.rows)) == (9, 3)
    run = run_of(config, data_sha256=prepared.fingerprint, eval_data_sha256=prepared.eval_fingerprint)
    assert len(held_out_rows(run, tokenizer).rows) == 3
    shown = Display()
    assert len(evaluation_rows(RowsConfig(folder), tokenizer, shown).rows) == 3
    assert capsys.readouterr().err == "rows of 0.jsonl\n"
    assert len(training_rows(RowsConfig(folder), tokenizer, shown).rows) == 9
    assert capsys.readouterr().err == "rows of train-0.jsonl, train-1.jsonl\n"


def test_a_folder_of_only_train_files_is_split(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "train.jsonl", 10)
    write_data(tmp_path / "data" / "extra.jsonl", 10)
    prepared = prepare(DataConfig(tmp_path / "data"), tokenizer, 3, Display(quiet=True))
    assert (len(prepared.train.rows), len(prepared.held_out.rows)) == (9, 1)
    for rows_of in (evaluation_rows, training_rows):
        assert len(rows_of(RowsConfig(tmp_path / "data"), tokenizer).rows) == 10


def test_a_run_as_data_gives_its_rows_as_it_read_them(tmp_path: Path, tokenizer: Any) -> None:
    data = DataConfig(write_data(tmp_path / "rows.jsonl"), eval_fraction=0.25, limit=16, template="alpaca")
    prepared = prepare(data, tokenizer, 3, Display(quiet=True))
    folder = tmp_path / "run"
    config = RunConfig("m", folder, data, training=TrainingConfig(seed=3))
    writer = RunFolder(folder)
    (folder / "adapter").mkdir()
    writer.config(config)
    writer.summary({"data_sha256": prepared.fingerprint, "eval_data_sha256": None})
    writer.close()
    assert training_rows(RowsConfig(folder), tokenizer).rows == prepared.train.rows
    assert evaluation_rows(RowsConfig(folder), tokenizer).rows == prepared.held_out.rows
    assert training_rows(RowsConfig(folder, limit=5), tokenizer).rows == prepared.train.rows[:5]
    assert evaluation_rows(RowsConfig(folder, limit=2), tokenizer).rows == prepared.held_out.rows[:2]
    with pytest.raises(ConfigError, match="leave out template, max_length, or give the data"):
        evaluation_rows(RowsConfig(folder, template="raw", max_length=9), tokenizer)
    write_data(data.data, 30)
    for rows_of in (evaluation_rows, training_rows):
        with pytest.raises(DataError, match="changed since the run was trained"):
            rows_of(RowsConfig(folder), tokenizer)


@pytest.fixture(params=[("KEPT_ROWS", 5), ("KEPT_BYTES", 100)], ids=["rows", "bytes"])
def _many(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows are many, or 100 bytes."""
    name, value = request.param
    monkeypatch.setattr(f"lorafold.runs.prepare.{name}", value)


@pytest.mark.usefixtures("_many")
def test_many_rows_are_those_that_few_would_be(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(write_data(tmp_path / "rows.jsonl", 60), max_length=24)
    streamed = prepare(config, tokenizer, 3, Display())
    assert "training data: 54 rows, tokenized when they are needed. Of 54 tried" in capsys.readouterr().err
    run = run_of(config, data_sha256=streamed.fingerprint)
    held = held_out_rows(run, tokenizer)
    assert isinstance(streamed.train, RowStream)
    assert isinstance(held, RowStream)
    for name in ("KEPT_ROWS", "KEPT_BYTES"):
        monkeypatch.setattr(f"lorafold.runs.prepare.{name}", 10_000)
    kept = prepare(config, tokenizer, 3, Display(quiet=True))
    assert isinstance(kept.train, Tokenized)
    assert list(streamed.train) == kept.train.rows
    assert list(streamed.held_out.rows) == list(held) == kept.held_out.rows
    assert streamed.train.cut == kept.train.cut > 0
    assert streamed.examples == kept.examples[: len(streamed.examples)] != []


@pytest.mark.usefixtures("_many")
@pytest.mark.parametrize("options", [{}, {"prompt": "{prompt}", "completion": "{completion} {note}"}])
def test_every_row_of_many_is_checked_before_training(tmp_path: Path, tokenizer: Any, options: dict[str, str]) -> None:
    """The message is that of few rows."""
    lines = [{"prompt": "a", "completion": "b", "note": None} for _ in range(2500)]
    lines[3]["prompt"] = lines[2200]["prompt"] = " \t"
    lines[1234]["completion"] = None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    templates = {f"{name}_template": text for name, text in options.items()}
    with pytest.raises(DataError) as few:
        to_examples(read_rows(path), **templates)
    with pytest.raises(DataError) as many:
        prepare(DataConfig(path, eval_data=path, eval_limit=1, **options), tokenizer, 3, Display(quiet=True))
    assert str(many.value) == str(few.value)
    assert "3 of 2,500 rows cannot be used" in str(many.value)
    assert "2 rows (3, 2200)" in str(many.value)


@pytest.mark.parametrize("kept", [5, 10_000])
def test_faults_of_both_parts_are_counted_together(
    tmp_path: Path, tokenizer: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafold.runs.prepare.KEPT_ROWS", kept)
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "p", "completion": "c" if i % 5 == 0 else " "} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"48 of 60 rows cannot be used(.|\n)*48 rows \(1, 2, 3, 4, 6, "):
        prepare(DataConfig(path, eval_fraction=0.5), tokenizer, 3, Display(quiet=True))


def test_no_more_rows_are_held_out_than_can_be_evaluated(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lorafold.runs.prepare.HELD_OUT_ROWS", 4)
    config = DataConfig(write_data(tmp_path / "rows.jsonl"), eval_fraction=0.5)
    data = prepare(config, tokenizer, 3, Display())
    assert "held out are 4 rows" in capsys.readouterr().err
    assert (len(data.train.rows), len(data.held_out.rows)) == (16, 4)
    assert numbers(held_out_rows(run_of(config), tokenizer).rows) == numbers(data.held_out.rows)
    asked = prepare(replace(config, eval_limit=8), tokenizer, 3, Display(quiet=True))
    assert (len(asked.train.rows), len(asked.held_out.rows)) == (10, 8)


def test_many_rows_take_little_memory(tmp_path: Path, tokenizer: Any) -> None:
    """Tokens of one row of these take about 1 kB, those of all of them 40 MB."""
    path, few = write_data(tmp_path / "rows.jsonl", 40_000), write_data(tmp_path / "few.jsonl", 10)
    config = DataConfig(path, eval_data=few)
    read_rows(path)
    tracemalloc.start()
    data = prepare(config, tokenizer, 3, Display(quiet=True))
    list(islice(row_batches(data.train.rows, epoch_batches(40_000, TrainingConfig())), 20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_what_was_cut_is_said_aloud(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(DataConfig(write_data(tmp_path / "a.jsonl"), max_length=24), tokenizer, 3, Display())
    said = capsys.readouterr().err
    assert "training data: " in said
    assert "held-out data: " in said
    assert "longer than 24 tokens were cut" in said


@pytest.mark.usefixtures("_many")
def test_preview_tokenizes_all_of_many_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = tiny_gguf(tmp_path, "llama", "Q4_1"), write_data(tmp_path / "rows.jsonl", 30)
    assert command("preview", model, "--data", data, "--rows", 1, "--max-length", 24) == 0
    said = capsys.readouterr()
    assert said.out.count("supervised") == 1
    assert "30 of 30 rows were tokenized." in said.err
    assert "longer than 24 tokens were cut" in said.err.partition("30 of 30")[2]
