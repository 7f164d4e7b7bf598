"""Causal attention over the segments of a pack on a CPU, from projections to output in one step with its own gradient.

It is a kernel for bfloat16 on matrix tiles, or one for any processor and rows of any length. Both keep queries, keys
and values and compute attention weights again in the backward pass. Heads that are no multiple of 32 wide, rows too
long for the tiles, caches, other types and devices take transformers' own forward pass with `attention.py`.
"""

# T tokens of the pack

from __future__ import annotations

from functools import lru_cache
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.together import together
from lorafold.kernels import attention as plain
from lorafold.kernels import block
from lorafold.kernels import tiled_attention as tiled
from lorafold.kernels.packs import Layout
from lorafold.models.attention import paths
from lorafold.quant.again import once_differentiable

# classes with projections, rotary queries and keys, softmax(scaling q k) v and one more projection
REPLACED = ("LlamaAttention", "Qwen2Attention", "MistralAttention")
_ENDLESS = 1 << 40  # tokens


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, kernel: ModuleType, layout: Layout, scale: float, window: int
    ) -> Tensor:
        out, found = kernel.forward(qkv, cos, sin, layout, scale, window)
        ctx.save_for_backward(qkv, found, cos, sin)
        ctx.kernel, ctx.given = kernel, (layout, scale, window)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, found, cos, sin = ctx.saved_tensors
        return ctx.kernel.backward(qkv, found, cos, sin, *ctx.given, grads[0]), *[None] * 6


@lru_cache(maxsize=4)
def _layout(segments: tuple[int, ...], parents: tuple[int, ...], key_heads: int) -> Layout:
    return Layout(list(segments), paths(list(parents)), key_heads)


def longest(segments: list[int], parents: list[int] | None) -> int:
    """Tokens of the longest row, which is a segment and its ancestors."""
    ends: list[int] = []
    for length, parent in zip(segments, parents or [-1] * len(segments), strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def _kernel(dtype: torch.dtype, width: int) -> ModuleType | None:
    """The kernel for projections of a type and heads of a width on a CPU."""
    return next((kernel for kernel in (tiled, plain) if kernel.usable(dtype, width)), None)


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    segments: list[int] | None = None,
    parents: list[int] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The forward pass of an attention module: hidden states [1, T, N] -> [1, T, N], and no attention weights."""
    width = position_embeddings[0].shape[-1]
    kernel = _kernel(hidden_states.dtype, width) if block.usable(hidden_states) else None
    most = tiled.most_tokens(module.num_key_value_groups) if kernel is tiled else _ENDLESS
    fits = segments is not None and longest(segments, parents) <= most
    if segments is None or not fits or past_key_values is not None or kernel is None:
        options |= {"segments": segments, "parents": parents}
        return type(module).forward(
            module, hidden_states, position_embeddings, attention_mask, past_key_values, **options
        )
    cos, sin = (x.expand(1, *x.shape[1:])[0] for x in position_embeddings)
    assert len(hidden_states) == 1  # rows lie end to end
    owner = module.config if type(module).__name__ == "MistralAttention" else module  # Qwen2 says it layer by layer
    window = getattr(owner, "sliding_window", None)
    window, parents = window or most, parents or [-1] * len(segments)
    projections = (module.q_proj, module.k_proj, module.v_proj)
    qkv = together(hidden_states, projections)
    qkv = torch.cat([project(hidden_states) for project in projections], -1) if qkv is None else qkv
    qkv, key_heads = qkv.flatten(0, 1), qkv.shape[-1] // width // (module.num_key_value_groups + 2)
    layout = _layout(tuple(segments), tuple(parents), key_heads)
    out = _Attention.apply(qkv, cos, sin, kernel, layout, module.scaling, window)
    return module.o_proj(out[None]), None  # type: ignore[index]


def any_length(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether rows of any length are taken without compiling and keeping something for each.

    In bfloat16 torch's products do that.
    """
    found = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    if not found or any(type(module).__name__ not in REPLACED for module in found):
        return False
    kernels = {_kernel(dtype, getattr(module, "head_dim", 0) or 1) for module in found}
    return kernels == {tiled} or (kernels == {plain} and dtype == torch.float32)


def replace_attention(model: nn.Module) -> None:
    """Give every attention module of transformers that computes the same this forward pass."""
    for module in model.modules():
        if type(module).__name__ in REPLACED:
            module.forward = MethodType(attention_forward, module)
