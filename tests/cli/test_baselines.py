"""Language models trained without adapters: on one command with the rest, stored, evaluated, folded, and refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorafold.evals.loss import evaluate
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.runs.prepare import held_out_rows
from tests.cli.conftest import quick
from tests.practice import command, same_logits, tiny_folder

METHODS: dict[str, list[object]] = {
    "full": [],
    "last-layers": ["--layers", 1],
    "full bfloat16": ["--dtype", "bfloat16"],
    "vera": ["--r", 8],
}
Trained = Callable[..., tuple[Path, Path]]


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_stored_and_folded(trained: Trained, name: str, tmp_path: Path, data: Path) -> None:
    base, run = trained("folder", "F32", "--method", name.split()[0], *METHODS[name])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    counted = {key: t for key, t in tensors.items() if key not in ("base_model.vera_A", "base_model.vera_B")}
    assert sum(t.numel() for t in counted.values()) == summary["trainable_parameters"]
    if name == "last-layers":
        assert all(".layers.2." in key or ".norm." in key for key in tensors)
    assert command("fold", run, "-o", tmp_path / "tuned") == 0
    loaded, folded = load_trained(read_run(run)), load(tmp_path / "tuned")
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), loaded.model, atol=1e-4)
    rows = held_out_rows(read_run(run), loaded.tokenizer)
    tolerance = 0.05 if "bfloat16" in name else 1e-4  # activations of the run were bfloat16
    assert evaluate(folded, rows.rows) == pytest.approx(summary["eval_loss_after"], abs=tolerance)
    assert command("eval", base, "--data", data, "--adapter", run) == 0


def test_a_head_of_its_own_is_trained_alone(tmp_path: Path, data: Path) -> None:
    model = tiny_folder(tmp_path / "model", tied=False)
    line = ["train", model, "--data", data, "--method", "head", "--max-steps", 2, "--sample-rows", 0]
    assert command(*line, "--output-dir", tmp_path / "run") == 0
    assert list(load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")) == [
        "base_model.model.lm_head.weight"
    ]


def test_biases_and_whole_modules_are_folded(trained: Trained, tmp_path: Path) -> None:
    """What LoRA trains beside its matrices reaches the folder too."""
    _, run = trained("folder", "F32", "--method", "lora", "--modules-to-save", "norm")
    assert command("fold", run, "-o", tmp_path / "tuned") == 0
    same_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "tuned"), load_trained(read_run(run)).model, atol=1e-4)


@pytest.mark.parametrize("method", ["full", "last-layers", "head"])
def test_a_quantized_base_is_refused_with_the_reason(train: Callable[..., str], method: str) -> None:
    message = train("--method", method)
    assert "packed" in message
    assert f"--method {method} needs weights that are not quantized" in message


def test_the_adapter_of_a_whole_method_is_no_part_of_arithmetic(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = trained("folder", "F32", "--method", "full")
    capsys.readouterr()
    assert command("adapters", "show", run) == 2
    assert "trained with --method full and no adapter" in capsys.readouterr().err


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path: Path, data: Path) -> None:
    line = ["train", tiny_folder(tmp_path / "model"), "--data", data, "--method", "full", "--save-steps", 2, *quick()]
    assert command(*line, "--output-dir", tmp_path / "whole") == 0
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("adapter", "checkpoint-6"):
        shutil.rmtree(cut / name)
    (cut / "summary.json").unlink()
    assert command(*line, "--output-dir", cut, "--resume") == 0
    assert json.loads((cut / "summary.json").read_text())["resumed_from"] == 4
    whole, again = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (tmp_path / "whole", cut))
    assert whole.keys() == again.keys()
    assert all(torch.equal(value, again[key]) for key, value in whole.items())
