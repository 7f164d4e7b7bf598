"""How many parameters an adapter trains: as published, and as the table of an adaptation says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lorafold.adapters.adapt import adapt
from lorafold.config import AdapterSpec


def test_table_of_what_was_adapted() -> None:
    model = nn.ModuleDict({"layer": nn.Linear(12, 10)})
    adaptation = adapt(model, AdapterSpec("lora", r=4, target_modules=("layer",)))
    assert adaptation.rows == (("layer", "Linear", (10, 12), 88),)
    assert (adaptation.trained, adaptation.total) == (88, 218)
    assert "40.367% of 218" in adaptation.table()


OPEN_LLAMA_3B = {
    "vocab_size": 32000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize(
    ("r", "targets", "expected"),
    [
        (8, ("q_proj", "v_proj"), 2_662_400),
        (16, ("q_proj", "v_proj"), 5_324_800),
        (8, ("all-linear", "lm_head"), 12_994_560),
    ],
)
def test_published_counts(r: int, targets: tuple[str, ...], expected: int) -> None:
    """OpenLLaMA-3B, laid out without a single weight."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**OPEN_LLAMA_3B))
    adaptation = adapt(model, AdapterSpec("lora", r=r, target_modules=targets))
    assert adaptation.trained == expected
    assert adaptation.total == 3_426_473_600 + expected
    assert all(p.is_meta for p in model.parameters())


def test_gpt3_adapter_is_35_megabytes() -> None:
    """175B, r = 4 on queries and values: 96 blocks of 12,288 features; 35 MB in 16-bit numbers (arXiv 2106.09685)."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(12288, 12288) for name in ("query", "key", "value", "out")})
            for _ in range(96)
        )
    trained = adapt(blocks, AdapterSpec("lora", r=4, target_modules=("query", "value"))).trained
    assert trained == 18_874_368
    assert 2 * trained / 2**20 == 36
