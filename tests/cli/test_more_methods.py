"""Runs of the LoRA family: trained by the command, stored, compared, folded and exported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto import AutoModelForCausalLM

from lorafold.adapters.adapt import adapt
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.models.exports import lora_pairs
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.adapters.test_methods import mixtral
from tests.cli.conftest import quick
from tests.practice import command, same_logits, tiny_folder

peft = pytest.importorskip("peft")

METHODS: dict[str, tuple[object, ...]] = {
    "dora": ("--method", "lora", "--use-dora"),
    "pissa": ("--method", "lora", "--init-lora-weights", "pissa"),
    "olora": ("--method", "lora", "--init-lora-weights", "olora", "--use-rslora"),
    "patterns": ("--method", "lora", "--rank-pattern", '{"q_proj": 2}', "--alpha-pattern", '{"up_proj": 9}'),
    "blocks": ("--method", "lora", "--layers-to-transform", 0, "--layers-to-transform", 2),
    "embedding": ("--method", "lora", "--target-modules", "embed_tokens", "q_proj"),
    "head": ("--method", "lora", "--modules-to-save", "lm_head", "norm"),
    "eva": ("--method", "lora", "--init-lora-weights", "eva"),
    "moving ranks": ("--method", "lora", "--target-r", 2, "--tfinal", 1),
    "LoRA+": ("--method", "lora", "--loraplus-lr-ratio", 4),
    "vera": ("--method", "vera", "--learning-rate", 0.05),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("folder"), tied=False)


def run_of(model: Path, data: Path, out: Path, options: tuple[object, ...]) -> Path:
    line = [model, "--data", data, *quick("--r", 4, *options), "--output-dir", out]
    assert command("train", *line) == 0
    return out


@pytest.mark.parametrize("method", METHODS)
def test_trained_folded_and_read_by_peft(method: str, folder: Path, data: Path, tmp_path: Path) -> None:
    """The folded folder, PEFT with the exported adapter, and the run itself give the same logits."""
    run = run_of(folder, data, tmp_path / "run", METHODS[method])
    trained = load_trained(read_run(run)).model
    summary = read_run(run).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"]
    assert command("fold", run, "-o", tmp_path / "folded") == 0
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    same_logits(folded, trained, 2e-5)
    assert command("export", run, "--to", "peft", "-o", tmp_path / "adapter") == 0
    base: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(AssertionError):
        same_logits(base, trained, 1e-3)
    same_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), trained, 2e-5)


@pytest.mark.parametrize("method", ["dora", "pissa", "vera", "embedding", "moving ranks"])
def test_on_a_packed_base(method: str, tiny_file: Callable[..., Path], data: Path, tmp_path: Path) -> None:
    """Folded with --to f16: what is lost is the rounding of dense weights."""
    base = tiny_file("llama", "Q4_1", tied=False)
    run = run_of(base, data, tmp_path / "run", METHODS[method])
    assert command("fold", run, "-o", tmp_path / "out.gguf") == 2
    assert command("fold", run, "-o", tmp_path / "out.gguf", "--to", "f32") == 0
    trained = load_trained(read_run(run))
    same_logits(load(tmp_path / "out.gguf").model, trained.model, 5e-5)
    if method in ("pissa", "vera", "moving ranks"):
        assert command("export", run, "--to", "gguf-adapter", "-o", tmp_path / "a.gguf") == 0
    else:
        assert command("export", run, "--to", "gguf-adapter", "-o", tmp_path / "a.gguf") == 2
        with pytest.raises(AdapterError, match=r"DoRA|QuantEmbedding"):
            lora_pairs(trained)


def test_what_a_packed_file_cannot_take_is_refused(
    tiny_file: Callable[..., Path], data: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    base = tiny_file("llama", "Q4_1", tied=False)
    line = ("train", base, "--data", data, "--method", "lora", "--output-dir", tmp_path / "other")
    assert "lm_head is packed" in refused(*line, "--modules-to-save", "lm_head")
    assert "no target lies in block 7" in refused(*line, "--layers-to-transform", 7)
    message = refused(*line, "--rank-pattern", '{"(": 0}', "--bias", "all", "--adapt", "both")
    for text in ("'(' is no regular expression", "'(' has 0", "adapt means nothing to lora"):
        assert text in message


def test_lora_on_experts_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with pytest.raises(AdapterError, match=r"'gate_proj' matches no parameter .* there are gate_up"):
        adapt(mixtral(), AdapterSpec("lora", target_parameters=("gate_proj",)))
