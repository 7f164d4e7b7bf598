"""The held-out rows of a run are the same rows whenever they are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorafold.config import DataConfig
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runs.display import Display
from lorafold.runs.prepare import held_out_examples, held_out_rows, prepare, tokenized_of
from tests.practice import write_data
from tests.tiny import tiny_gguf


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    return load_tokenizer(GGUFFile(tiny_gguf(tmp_path, "llama", "Q4_1")))


def numbers(rows: Any) -> list[int]:
    return [row.row for row in rows]


@pytest.mark.parametrize("limits", [{}, {"limit": 4}, {"eval_limit": 2}, {"limit": 3, "eval_limit": 1}])
def test_rows_held_out_of_the_data(tmp_path: Path, tokenizer: Any, limits: dict[str, int]) -> None:
    config = DataConfig(write_data(tmp_path / "rows.jsonl"), eval_fraction=0.25, **limits)
    data = prepare(config, tokenizer, 3, Display(quiet=True))
    train, held = numbers(data.train.rows), numbers(data.held_out.rows)
    assert len(train) == limits.get("limit", 15)
    assert len(held) == limits.get("eval_limit", 5)
    assert not set(train) & set(held)
    assert numbers(data.examples) == held
    assert numbers(held_out_rows(config, tokenizer, 3).rows) == held
    assert numbers(held_out_examples(config, 3)) == held
    assert data.eval_fingerprint is None
    if not limits:
        assert numbers(held_out_examples(config, 4)) != held


def test_rows_of_another_file(tmp_path: Path, tokenizer: Any) -> None:
    data, other = write_data(tmp_path / "a.jsonl"), write_data(tmp_path / "b.jsonl", 7)
    config = DataConfig(data, other, eval_limit=5, limit=9)
    prepared = prepare(config, tokenizer, 3, Display(quiet=True))
    assert (len(prepared.train.rows), numbers(prepared.held_out.rows)) == (9, [0, 1, 2, 3, 4])
    assert prepared.fingerprint != prepared.eval_fingerprint is not None
    assert numbers(held_out_rows(config, tokenizer, 3).rows) == [0, 1, 2, 3, 4]
    third = write_data(tmp_path / "c.jsonl", 3)
    assert len(held_out_rows(config, tokenizer, 3, third).rows) == 3
    assert len(tokenized_of(config, tokenizer).rows) == 9


def test_what_was_cut_is_said_aloud(tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(DataConfig(write_data(tmp_path / "a.jsonl"), max_length=24), tokenizer, 3, Display())
    said = capsys.readouterr().err
    assert "training data: " in said
    assert "held-out data: " in said
    assert "longer than 24 tokens were cut" in said
