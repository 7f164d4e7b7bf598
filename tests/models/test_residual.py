"""Blocks whose sums stand in memory of our own against transformers' blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.evals.loss import hidden_states
from lorafold.models.attention import kernel_for
from lorafold.models.load import load
from lorafold.models.residual import replace_blocks
from lorafold.train.budget import checkpointed
from tests.practice import lora_like, related_rows, token_rows

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}
MODELS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def _run(model: nn.Module, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    logits = model(ids).logits
    logits.float().square().sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_blocks_compute_what_transformers_do(kind: str, dtype: torch.dtype) -> None:
    """Logits and all gradients bit for bit; also with a cache, and with blocks computed again."""
    torch.manual_seed(0)
    config, model_class = MODELS[kind]
    plain = model_class(config(**SIZES)).to(dtype)
    ours = copy.deepcopy(plain)
    replace_blocks(ours)
    ids = torch.randint(50, (1, 70))
    expected, found = _run(plain, ids), _run(ours, ids)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with torch.no_grad():
        cached = [model(ids, use_cache=True).past_key_values for model in (plain, ours)]
        after = [m(ids[:, :1], past_key_values=c).logits for m, c in zip((plain, ours), cached, strict=True)]
    assert torch.equal(*after)
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    ours.train()
    passes: list[object] = []
    ours.model.layers[1].mlp.register_forward_pre_hook(lambda *_: passes.append(None))
    torch.testing.assert_close(_run(ours, ids), expected, rtol=0, atol=0)
    assert len(passes) == 2


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3"])
def test_the_last_block_computes_what_is_wanted(
    tiny_file: Callable[..., Path], architecture: str, dtype: torch.dtype, again: bool
) -> None:
    """Hidden states and gradients are those of the whole block, of fewer rows where the block is ours."""
    loaded = load(tiny_file(architecture, "Q4_1", wide=True), dtype)
    inject(loaded.model, AdapterSpec("lora", r=2))
    lora_like(loaded.model)
    loaded.model.train()
    batch = pack([*related_rows(6, longest=60), *token_rows(3)], 1, 4, 16)
    assert len(batch.wanted) < len(batch.ids)
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    sizes: list[tuple[str, int]] = []
    for name, module in loaded.model.named_modules():
        if name.endswith((".mlp", ".o_proj")):
            module.register_forward_pre_hook(lambda _, x, name=name: sizes.append((name, x[0].shape[1])))
    weights = torch.randn(len(batch.targets), loaded.model.config.hidden_size).to(dtype)
    everything = replace(batch, wanted=torch.arange(len(batch.ids)), target_in=batch.target_at)
    found = []
    for given in (batch, everything):
        with checkpointed(loaded, again):
            hidden = hidden_states(loaded, given)
            found.append([hidden.detach(), *torch.autograd.grad((hidden * weights).sum(), parameters)])
    last = f".{loaded.model.config.num_hidden_layers - 1}."
    ours = {"mlp": architecture != "gemma3", "o_proj": architecture in {"llama", "qwen2"}}
    width = loaded.model.config.hidden_size // loaded.model.config.num_attention_heads
    ours["o_proj"] &= kernel_for(torch.empty(len(batch.ids), 64, dtype=dtype), width) is not None
    for name, size in sizes[: len(sizes) // 2]:
        part = last in name and ours[name.rpartition(".")[2]]
        assert size == len(batch.wanted if part else batch.ids), name
    bound = 1e-5 if dtype == torch.float32 else 0.02  # products of other sizes add in another order
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))


def test_sums_are_ours_where_kernels_are() -> None:
    """Both sums of a block in float32; in float64 torch's."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    replace_blocks(model)
    replace_blocks(model)
    kind = type(model.model.layers[0])
    assert kind.__bases__[0].__name__ == "LlamaDecoderLayer"
    assert kind.__bases__[0].__module__.startswith("transformers")
    x = torch.randn(1, 70, 64, requires_grad=True)
    places = model.model.rotary_emb(x, torch.arange(70)[None])
    assert _sums(model.model.layers[0](x, None, position_embeddings=places)) == 2
    places = tuple(place.double() for place in places)
    assert _sums(model.double().model.layers[0](x.double(), position_embeddings=places)) == 0


def _sums(y: Tensor) -> int:
    """How many of our sums a tensor was computed with."""
    seen, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return sum("_Sum" in node.name() for node in seen)
