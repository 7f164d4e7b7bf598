"""Mixtures of experts, which files hold one by one and transformers in one tensor: trained, folded, quantized."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lorafold.adapters.adapt import unload
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command, same_logits
from tests.tiny import VOCABULARY, tiny_gguf

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 64, "num_local_experts": 4},
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny mixture of experts as a transformers folder in bfloat16."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    load_tokenizer(GGUFFile(tiny_gguf(tmp_path / "gguf", "llama"))).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    "method",
    [["full"], ["lora", "--target-parameters", "gate_up_proj", "down_proj"]],
)
@pytest.mark.parametrize("to", [[], ["--to", "f32"]])
def test_trained_experts_are_folded_one_by_one(
    method: list[str], to: list[str], base: Path, data: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    options = quick("--method", *method, "--learning-rate", 0.02)
    assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
    assert command("fold", run, "-o", out, *to) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (base, out))
    assert before.keys() == after.keys()
    assert any(".experts.3." in name for name in after)
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert any(".experts." in name for name in moved)
    trained, tuned = load_trained(read_run(run)).model, AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    if to:
        same_logits(tuned, trained, 1e-3)  # of up to 10
    expected = dict(unload(trained, merge=True).named_parameters())
    for name, value in tuned.named_parameters():  # logits in bfloat16 may go through other experts
        assert torch.equal(value, expected[name].to(torch.float32 if to else torch.bfloat16).float()), name
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with pytest.raises(AssertionError):
        same_logits(tuned, plain, 1.0)


def test_what_was_not_trained_stays_as_it_is(base: Path, data: Path, tmp_path: Path) -> None:
    """Numbers of another type, tensors that transformers does not load, and other files."""
    path, odd = base / "model.safetensors", "model.layers.7.mtp.weight"
    tensors = load_file(path)
    routers = [name for name in tensors if name.endswith(".gate.weight")]
    assert len(routers) == 2
    tensors |= {name: tensors[name].float() + 1e-4 for name in routers} | {odd: torch.randn(3, 4)}
    save_file(tensors, path, {"format": "pt"})
    (base / "NOTES.md").write_text("notes")
    run, out = tmp_path / "run", tmp_path / "out"
    options = quick("--method", "lora", "--target-parameters", "down_proj", "--learning-rate", 0.02)
    assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
    assert command("fold", run, "-o", out) == 0
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    moved = {name for name in tensors if not torch.equal(tensors[name], written[name])}
    targets = {
        n
        for n in tensors
        if re.search(r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|w2|shared_expert_gate)\.weight", n)
    }
    assert any(".experts." in name for name in moved)
    assert moved <= targets
    assert {name: value.dtype for name, value in written.items()} == {n: value.dtype for n, value in tensors.items()}
    assert (out / "NOTES.md").read_text() == "notes"


def test_what_stays_plain_is_said(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("quantize", base, "-o", tmp_path / "out", "--format", "nf4") == 0
    kind = AutoConfig.from_pretrained(base).model_type
    count = 2 * 4 * (3 * 64 * (64 if kind == "mixtral" else 32) + 64)  # and what chooses among them
    assert f"{count:,} weights are in no linear layer and stay plain" in capsys.readouterr().out
