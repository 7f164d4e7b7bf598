"""The demo from end to end, on a tiny model in the place of the embedded one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import lorafold.models.load
from lorafold.cli.main import run
from lorafold.data.demo import demo_file
from lorafold.evals import llama_cpp
from lorafold.runs import demo


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    """Two steps on eight rows, in float32."""
    full = demo.demo_config

    def small_config(folder: Path) -> demo.RunConfig:
        config = full(folder)
        training = replace(config.training, max_steps=2, sample_tokens=4, dtype="float32", learning_rate=0.01)
        return replace(config, data=replace(config.data, limit=8, eval_limit=4), training=training)

    monkeypatch.setattr(lorafold.models.load, "_embedded", lambda: tiny_file("llama", "Q4_1"))
    monkeypatch.setattr(demo, "demo_config", small_config)
    monkeypatch.setattr(demo, "_ANSWER_TOKENS", 4)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.usefixtures("small")
def test_the_whole_story(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(llama_cpp, "available", lambda: False)  # its bounds are for models that predict something
    assert run(["demo", "-o", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr().err
    for step in ("1/5", "2/5", "3/5", "4/5", "5/5", "exact fold", "of the gain is left"):
        assert step in said
    assert "FAILED" not in said
    report = (tmp_path / "demo" / "report.html").read_text(encoding="utf-8")
    assert "decoded file = training weights" in report
    assert "base file" in report
    assert (tmp_path / "demo" / "tuned.gguf").exists()


@pytest.mark.usefixtures("small")
@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_it_asks_llama_cpp(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "-o", str(tmp_path / "demo")]) in (0, 1)
    assert "llama.cpp, folded file" in capsys.readouterr().err


def test_a_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    assert run(["demo", "-o", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_its_data_are_there() -> None:
    assert demo_file("train").exists()
    assert demo_file("held_out").exists()
