"""GPT-2, whose linear layers store their weights as [I, O]: what reads layers sees them, and says what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.lora import LoRA
from lorafold.config import AdapterSpec
from lorafold.data.tokens import Tokens
from lorafold.models.adapter_files import load_adapter
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import load
from lorafold.models.tokenizer import load_tokenizer
from lorafold.runs.eva import inject_for
from tests.practice import command, same_logits
from tests.tiny import VOCABULARY, tiny_gguf, tiny_ids


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2 as a transformers folder."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(GGUFFile(tiny_gguf(tmp_path / "gguf", "llama"))).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_a_difference_is_extracted(gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of rank 2 in the widest layers and of any rank in a norm, which is said."""
    tuned, out = tmp_path / "tuned", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(gpt2)
    load_tokenizer(GGUFFile(tiny_gguf(tmp_path / "other", "llama"))).save_pretrained(tuned)
    model.transformer.ln_f.weight.data += 0.5
    model.save_pretrained(tuned)
    extract = ["adapters", "extract", "--base", gpt2, "--tuned", tuned, "--r", 2, "-o", out]
    assert command(*extract) == 2
    said = capsys.readouterr().err
    assert "no linear layer differs" in said
    assert "1 other tensors differ, which no adapter holds: transformer.ln_f.weight" in said
    for block in model.transformer.h:
        block.mlp.c_fc.weight.data += 0.05 * torch.randn(64, 2) @ torch.randn(2, 256)
    model.save_pretrained(tuned)
    assert command(*extract) == 0
    assert "rank 2; 100.00% of the energy" in capsys.readouterr().out
    loaded = load(gpt2)
    load_adapter(loaded, out)
    assert {path for path, _ in adapted_layers(loaded.model)} == {f"transformer.h.{n}.mlp.c_fc" for n in (0, 1)}
    loaded.model.transformer.ln_f.weight.data += 0.5
    same_logits(loaded.model, model, 1e-4)


def test_eva_sees_their_inputs(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first block's first layer A is the directions of the normed embeddings, by a decomposition in float64."""
    monkeypatch.setattr("lorafold.runs.blocks.compute_dtype", lambda: torch.float32)
    loaded, plain = load(gpt2), load(gpt2).model.transformer
    ids = [tiny_ids(30, seed=seed)[0].tolist() for seed in range(4)]
    rows = [Tokens(row, [False] + [True] * (len(row) - 1), number) for number, row in enumerate(ids)]
    inject_for(loaded, AdapterSpec("lora", r=4, init_lora_weights="eva"), rows)
    with torch.no_grad():
        inputs = [plain.h[0].ln_1(plain.wte(torch.tensor(row)) + plain.wpe.weight[: len(row)]) for row in ids]
    _, _, directions = torch.linalg.svd(torch.cat(inputs).double(), full_matrices=False)
    adapter = dict(adapted_layers(loaded.model))["transformer.h.0.attn.c_attn"].adapter
    assert isinstance(adapter, LoRA)
    rank = len(adapter.lora_A)
    inside = adapter.lora_A.double() @ directions[:rank].T
    torch.testing.assert_close(inside.norm(dim=1), torch.ones(rank).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "options", [["--format", "nf4"], ["--format", "int8"], ["--format", "nf4", "--loftq-r", 2], []]
)
def test_formats_of_linear_layers_are_refused(
    options: list[Any], gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("quantize", gpt2, "-o", tmp_path / "out", *options) == 2
    assert "linear layers are quantized, and the blocks of this model (gpt2) hold none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
