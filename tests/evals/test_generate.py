"""Greedy generation against transformers' own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.evals.generate import end_tokens, generate
from lorafold.models.load import load
from lorafold.quant import linear
from lorafold.quant.linear import QuantLinear
from tests.practice import lora_like
from tests.tiny import ARCHITECTURES, tiny_gguf, tiny_ids, tiny_model

PROMPT = tiny_ids(6)[0].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_continues_as_transformers_does(tiny_file: Callable[..., Path], architecture: str) -> None:
    """20 tokens from 6: beyond Gemma's window of 8."""
    loaded = load(tiny_file(architecture, "Q4_1"))
    theirs = tiny_model(architecture, "Q4_1").generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, 6, dtype=torch.long),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ends, expected = end_tokens(loaded), theirs[0, 6:].tolist()
    first_end = next((i for i, token in enumerate(expected) if token in ends), 20)
    assert generate(loaded, PROMPT, 20) == expected[:first_end]
    assert first_end > 3  # so that the comparison says something


def test_ends_where_the_file_ends_a_turn(tmp_path: Path) -> None:
    """An end-of-turn token apart from the end of the text, by its number or by the name llama.cpp knows."""

    def ids(metadata: dict, _: dict) -> None:
        metadata["tokenizer.ggml.eos_token_id"] = metadata["tokenizer.ggml.tokens"].index("<|endoftext|>")
        metadata["tokenizer.ggml.eot_token_id"] = 7

    loaded = load(tiny_gguf(tmp_path, "llama", "Q4_1", edit=ids))
    named = {loaded.tokenizer.convert_tokens_to_ids(text) for text in ("<|endoftext|>", "<|im_end|>")}
    assert end_tokens(loaded) == {7} | named


def test_large_models_are_not_kept_dense(tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    expected = generate(loaded, PROMPT, 5)
    monkeypatch.setattr(linear, "MOST_KEPT", 30_000)
    with linear.decoded_once(loaded.model):
        loaded.model(tiny_ids(4))
        kept = [m._dense.numel() for m in loaded.model.modules() if isinstance(m, QuantLinear) and m._dense is not None]
    assert 0 < sum(kept) <= 30_000
    assert generate(loaded, PROMPT, 5) == expected


@pytest.mark.parametrize("spec", [AdapterSpec("lora", r=2), AdapterSpec("qa-lora", r=2)])
def test_uses_the_active_adapter_and_forgets_decoded_weights(tiny_file: Callable[..., Path], spec: AdapterSpec) -> None:
    """Each token is the likeliest of a forward pass without a cache."""
    loaded = load(tiny_file("llama", "Q4_1"))
    alone = generate(loaded, PROMPT, 8)
    inject(loaded.model, spec)
    lora_like(loaded.model, scale=0.5)
    out = generate(loaded, PROMPT, 8)
    assert out
    assert out != alone
    ids = list(PROMPT)
    for token in out:
        with torch.no_grad():
            assert token == int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert all(m._dense is None and not m._keep_dense for m in loaded.model.modules() if isinstance(m, QuantLinear))


def test_stops_before_the_end_token(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    free = generate(loaded, PROMPT, 10)
    position = next(i for i in range(2, 10) if free[i] not in free[:i])
    loaded.model.generation_config.eos_token_id = [free[position], 1]
    assert generate(loaded, PROMPT, 10) == free[:position]
    assert generate(loaded, PROMPT, 1) == free[:1]
    assert generate(loaded, PROMPT, 0) == []


def test_end_tokens_come_from_everywhere(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    loaded.model.config.eos_token_id = 5
    loaded.model.generation_config.eos_token_id = [6, 7]
    named = set(loaded.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))  # by llama.cpp's list
    assert end_tokens(loaded) == {5, 6, 7, loaded.tokenizer.eos_token_id} | named
    loaded.model.config.eos_token_id = loaded.model.generation_config.eos_token_id = None
    assert end_tokens(loaded) == {loaded.tokenizer.eos_token_id} | named
