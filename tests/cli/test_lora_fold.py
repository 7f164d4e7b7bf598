"""A LoRA merged into other types, exported, and into transformers folders: what is kept is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import base_weight
from lorafold.evals import llama_cpp
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import needs_llama_cpp
from tests.practice import command, same_logits, tensors_of
from tests.tiny import ARCHITECTURES

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]


def test_lora_is_not_folded_in_silence(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    capsys.readouterr()
    assert command("fold", run, "-o", out) == 2
    message = capsys.readouterr().err
    assert "export" in message
    assert "--to gguf-adapter" in message
    assert "--lossy" in message
    assert command("fold", run, "-o", out, "--to", "q4_1") == 2
    assert "--to f16" in capsys.readouterr().err
    assert not out.exists()


def test_own_type_by_name_is_the_exact_fold(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1")
    assert command("fold", run, "-o", tmp_path / "plain.gguf") == 0
    assert command("fold", run, "-o", tmp_path / "named.gguf", "--to", "q4_1") == 0
    assert capsys.readouterr().out.count("exact fold of 21 layers") == 2
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_lossy_fold_says_what_is_left(trained: Trained, data: Path, tmp_path: Path, capsys: Output) -> None:
    base, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    capsys.readouterr()
    assert command("fold", run, "-o", out, "--lossy") == 0
    text = capsys.readouterr().out
    before, trained_loss, written, left = map(
        float, re.search(r"base (\S+), trained (\S+), this file (\S+): (\S+)% of the gain", text).groups()
    )
    summary = json.loads((run / "summary.json").read_text())
    # bfloat16 while training, float32 here
    assert before == pytest.approx(summary["eval_loss_before"], abs=0.02)
    assert trained_loss == pytest.approx(summary["eval_loss_after"], abs=0.05)
    assert left == pytest.approx(100 * (before - written) / (before - trained_loss), abs=0.1)
    assert out.stat().st_size == base.stat().st_size
    assert command("verify", out, "--run", run, "--no-runtime") == 2  # there is no exact file to compare with


@pytest.mark.parametrize(("to", "atol"), [("f32", 5e-5), ("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.3)])
def test_lora_folds_into_wider_types(trained: Trained, tmp_path: Path, to: str, atol: float) -> None:
    """atol: what rounding the weights to 24, 11, 8 and about 8 bits does to logits of up to 6."""
    base, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    assert command("fold", run, "-o", out, "--to", to, *(["--lossy"] if to == "q8_0" else [])) == 0
    model = load_trained(read_run(run)).model
    same_logits(load(out).model, model, atol)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(out).items()}
    assert {kinds[name] for name in kinds if name.startswith("blk.") and "norm" not in name} == {to.upper()}
    assert kinds["token_embd.weight"] == "Q4_1"
    with pytest.raises(AssertionError):
        same_logits(load(base).model, model, 2 * atol)


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "qa-lora"])
def test_exported_adapter_works_in_llama_cpp(
    trained: Trained, tmp_path: Path, capsys: Output, data: Path, architecture: str, method: str
) -> None:
    base, run = trained(architecture, "Q4_1", *(["--method", "lora"] if method == "lora" else []))
    out = tmp_path / "adapter.gguf"
    assert command("export", run, "--to", "gguf-adapter", "-o", out) == 0
    names = set(tensors_of(out))
    assert names == {f"{t}.lora_{x}" for t in tensors_of(base) if "blk" in t and "norm" not in t for x in "ab"} - {
        f"{t}.lora_{x}" for t in tensors_of(base) if t.endswith("bias") for x in "ab"
    }
    loaded = load_trained(read_run(run))
    ids = [5, 100, 260, 33, 270, 12, 99, 280]
    with torch.no_grad():
        ours = loaded.model(torch.tensor([ids])).logits[0].numpy()
    with llama_cpp.LlamaCpp(base, out, n_ctx=64) as runtime:
        theirs = next(iter(runtime.logits(ids)))[1]
    with llama_cpp.LlamaCpp(base, n_ctx=64) as runtime:
        alone = next(iter(runtime.logits(ids)))[1]
    error, effect = (float(np.sqrt(np.mean((x - theirs) ** 2))) for x in (ours, alone))
    assert error < 0.15 < 3 * error + 0.15 < effect  # 8-bit activations give about 0.05


def test_export_overwrites_only_when_told(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1")
    for to, out in (("peft", tmp_path / "peft"), ("gguf-adapter", tmp_path / "adapter.gguf")):
        assert command("export", run, "--to", to, "-o", out) == 0
        capsys.readouterr()
        assert command("export", run, "--to", to, "-o", out) == 2
        assert "exists already" in capsys.readouterr().err
        assert command("export", run, "--to", to, "-o", out, "--overwrite") == 0


def test_transformers_folder_folds_to_a_folder(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    model, run = trained("folder", "F32", "--method", "lora")
    out = tmp_path / "merged"
    assert command("fold", run, "-o", out) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    same_logits(theirs, load_trained(read_run(run)).model, 1e-4)  # float32, W + BA added before or after the product
    with pytest.raises(AssertionError):
        same_logits(AutoModelForCausalLM.from_pretrained(model), theirs, 0.1)
    assert AutoTokenizer.from_pretrained(out)("the cat") == AutoTokenizer.from_pretrained(model)("the cat")
    ours, before = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    adapted = {f"{path}.weight" for path, _ in adapted_layers(load_trained(read_run(run)).model)}
    assert ours.keys() == before.keys()
    for key in before.keys() - adapted:
        assert torch.equal(ours[key], before[key])


def test_folded_folder_keeps_its_weights_in_their_type(trained: Trained, tmp_path: Path) -> None:
    _, run = trained("folder", "F32", "--method", "lora")
    assert command("fold", run, "-o", tmp_path / "merged", "--to", "f16") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    trained_model = load_trained(read_run(run)).model
    for path, layer in adapted_layers(trained_model):
        wanted = base_weight(layer.base) + layer.adapter.delta()
        assert torch.equal(merged[f"{path}.weight"], wanted.half())
    assert merged["model.embed_tokens.weight"].dtype == torch.float32
