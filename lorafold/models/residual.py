"""A transformer block whose two sums stand in memory that glibc finds again, and the last one, where little is wanted.

The sums are kept until the backward pass. Taken as torch takes memory, they leave holes in the heap that packs of other
sizes do not fit (see `kernels.compiled.empty`). What follows attention in the last block is of use only where a token
is predicted that counts.
"""

# T tokens of a pack, W of them wanted

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.kernels import block
from lorafold.kernels.compiled import empty

# classes whose forward is h = x + self_attn(input_layernorm(x)); h + mlp(post_attention_layernorm(h))
REPLACED = ("LlamaDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "MistralDecoderLayer")


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:  # noqa: ARG004
        return torch.add(x, y, out=empty(*x.shape, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return grads[0], grads[0]


def _sum(x: Tensor, y: Tensor) -> Tensor:
    """x + y; where kernels compute, which is where passes are long, in memory of our own."""
    if not block.usable(x) or x.dtype != y.dtype or x.shape != y.shape:
        return x + y
    total: Tensor = _Sum.apply(x, y)  # type: ignore[assignment]
    return total


def block_forward(
    module: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    wanted: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The forward pass of a block, [..., N] -> [..., N], with the arguments of the classes that it is for.

    Args:
        wanted: positions [W] of a pack; the last block returns these alone, [1, T, N] -> [1, W, N].
    """
    wanted = wanted if module.is_last else None
    attended, _ = module.self_attn(
        hidden_states=module.input_layernorm(hidden_states),
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        wanted=wanted,
        **options,
    )
    if wanted is not None:
        hidden_states = hidden_states.index_select(1, wanted)
        attended = attended if attended.shape[1] == len(wanted) else attended.index_select(1, wanted)
    hidden_states = _sum(hidden_states, attended)
    return _sum(hidden_states, module.mlp(module.post_attention_layernorm(hidden_states)))


@functools.cache
def _with_sums(kind: type[nn.Module]) -> type[nn.Module]:
    """The class with this forward pass, for blocks of which none is the last yet.

    A class, because transformers wraps the forward pass of each class, to compute blocks again in the backward pass;
    one that a module has for itself would be called as it is.
    """
    return type(kind.__name__, (kind,), {"forward": block_forward, "is_last": False, "__module__": __name__})


def replace_blocks(model: nn.Module) -> None:
    """Give every block of transformers that computes the same this forward pass."""
    for module in model.modules():
        if type(module).__name__ in REPLACED and type(module).__module__ != __name__:
            module.__class__ = _with_sums(type(module))
        if isinstance(module, nn.ModuleList) and len(module) and type(module[-1]).__name__ in REPLACED:
            last: Any = module[-1]
            last.is_last = True
