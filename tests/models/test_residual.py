"""Blocks whose sums stand in memory of our own against transformers' blocks."""

from __future__ import annotations

import copy

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

from lorafold.models.residual import replace_blocks

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
