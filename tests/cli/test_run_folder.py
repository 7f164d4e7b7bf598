"""What a run leaves, and what `eval`, `generate` and `preview` show of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorafold.models.load import load
from tests.cli.conftest import Folded, needs_llama_cpp
from tests.practice import command

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]


def test_run_folder_holds_what_is_needed(trained: Trained, data: Path) -> None:
    base, run = trained("llama", "Q4_1", "--eval-steps", 2)
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "adapter", "report.html"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
    for key in ("samples_per_second", "tokens_per_second", "peak_memory_bytes", "wall_seconds", "train_seconds"):
        assert summary[key] > 0
    assert summary["peak_memory_bytes"] > 50e6  # the interpreter alone; a figure in kilobytes would fail
    assert summary["wall_seconds"] >= summary["train_seconds"]
    # q and o: 2 groups to 64 rows, k and v: to 32, gate and up: to 96, down: 3 groups to 64; rank 8, 3 layers
    assert summary["trainable_parameters"] == 3 * 8 * (2 * (2 + 64) + 2 * (2 + 32) + 2 * (2 + 96) + 3 + 64)
    assert summary["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert summary["base_weights_sha256"] == load(base).weights_hash()
    assert (summary["train_rows"], summary["eval_rows"], summary["steps"]) == (14, 6, 6)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics if "eval_loss" in m] == [0, 2, 4, 6]
    assert metrics[-1]["eval_loss"] == summary["eval_loss_after"]
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"prompt", "reference", "before", "after"}
    assert sample["reference"].startswith("is ")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["learning_rate"], config["lora_alpha"], config["max_steps"]) == (0.01, 16.0, 6)


def test_report_stands_alone(trained: Trained) -> None:
    _, run = trained("llama", "Q4_1")
    html = (run / "report.html").read_text()
    assert "<svg" in html
    assert "held-out loss after" in html
    outside = re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)[^"']*|url\((?!\s*["']?#)[^)]*|@import[^;]*""", html)
    assert outside == []  # what is left are names of XML vocabularies, which nothing fetches


def test_same_command_gives_the_same_adapter(trained: Trained, data: Path, tmp_path: Path) -> None:
    """From the run's own config.yaml; a command-line option wins over the file."""
    _, run = trained("llama", "Q4_1")
    again = ("--config", run / "config.yaml", "--output-dir")
    assert command("train", *again, tmp_path / "same") == 0
    assert command("train", *again, tmp_path / "other", "--seed", 7) == 0
    ours, same, other = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (run, *tmp_path.iterdir()))
    if (tmp_path / "same") != next(iter(tmp_path.iterdir())):
        same, other = other, same
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    assert not all(torch.equal(ours[key], other[key]) for key in ours)


def test_eval_of_base_file_and_adapter(folded: Folded, data: Path, capsys: Output) -> None:
    """The folded file and the adapter on the base are the same model, so they have the same loss."""
    base, run, out = folded("llama Q4_1")
    assert command("eval", base, out, "--adapter", run, "--data", data) == 0
    table = losses(capsys.readouterr().out)
    assert len(table) == 3
    assert table[1] == table[2] < table[0] - 0.1


@needs_llama_cpp
def test_eval_in_llama_cpp_agrees(folded: Folded, data: Path, capsys: Output) -> None:
    """Within what rounding activations to 8 bits does to the loss; training moved it by far more."""
    base, run, out = folded("llama Q4_1")
    arguments = ("eval", base, out, "--adapter", run, "--data", data)
    assert command(*arguments) == 0
    ours = losses(capsys.readouterr().out)
    assert command(*arguments, "--runtime", "llama.cpp") == 0
    assert losses(capsys.readouterr().out) == pytest.approx(ours, abs=0.03)


def losses(table: str) -> list[float]:
    """The column `loss` of eval's table."""
    return [float(line.split("│")[3]) for line in table.splitlines() if re.search(r"│\s*\d+\.\d{4}", line)]


def test_generate_sets_variants_side_by_side(folded: Folded, capsys: Output) -> None:
    base, run, out = folded("llama Q4_1")
    arguments = ("generate", base, out, "--adapter", run, "--max-new-tokens", 5)
    assert command(*arguments, "--prompt", "the cat", "--prompt", "hello world") == 0
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[0] for row in rows if row[0]] == ["the cat", "hello world"]
    text = "".join("".join(row[1:2]) for row in rows)
    assert ["".join(row[2]) for row in rows] == ["".join(row[3]) for row in rows]  # folded file = adapter
    assert text != "".join("".join(row[2]) for row in rows)  # the base says something else


def test_eval_on_the_rows_that_a_run_held_out(folded: Folded, capsys: Output) -> None:
    base, run, out = folded("llama Q4_1")
    capsys.readouterr()
    assert command("eval", base, out, "--data", run) == 0
    losses = [float(x) for x in re.findall(r"torch +│ (\S+) +│", capsys.readouterr().out)]
    summary = json.loads((run / "summary.json").read_text())
    assert losses == pytest.approx([summary["eval_loss_before"], summary["eval_loss_after"]], abs=1e-4)


def test_preview_marks_what_is_learned(trained: Trained, data: Path, capsys: Output) -> None:
    model, _ = trained("llama", "Q4_1")
    assert command("preview", model, "--data", data, "--rows", 1) == 0
    captured = capsys.readouterr()
    assert "row 0" in captured.out
    assert "20 rows of" in captured.err
