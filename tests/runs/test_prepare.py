"""The held-out rows of a run are the same rows whenever they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafold.config import DataConfig, RunConfig, TrainingConfig
from lorafold.errors import DataError
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runs.display import Display
from lorafold.runs.folder import Run
from lorafold.runs.prepare import all_rows, held_out_examples, held_out_rows, prepare
from tests.practice import write_data
from tests.tiny import tiny_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


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
    assert len(all_rows(config, tokenizer).rows) == 9
    write_data(other, 6)
    with pytest.raises(DataError, match=r"b\.jsonl: changed since the run was trained"):
        held_out_rows(run, tokenizer)
    assert len(held_out_rows(run, tokenizer, third).rows) == 3


@pytest.mark.parametrize("other", ["validation", "dev", "test"])
def test_a_folder_with_splits_is_trained_on_train(tmp_path: Path, tokenizer: Any, other: str) -> None:
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


def test_a_folder_of_only_train_files_is_split(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "data").mkdir()
    write_data(tmp_path / "data" / "train.jsonl", 10)
    write_data(tmp_path / "data" / "extra.jsonl", 10)
    prepared = prepare(DataConfig(tmp_path / "data"), tokenizer, 3, Display(quiet=True))
    assert (len(prepared.train.rows), len(prepared.held_out.rows)) == (9, 1)


def test_what_was_cut_is_said_aloud(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(DataConfig(write_data(tmp_path / "a.jsonl"), max_length=24), tokenizer, 3, Display())
    said = capsys.readouterr().err
    assert "training data: " in said
    assert "held-out data: " in said
    assert "longer than 24 tokens were cut" in said
