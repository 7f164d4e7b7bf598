"""Causal attention over the segments of a pack on a CPU, from projections to output in one step with its own gradient.

It is a kernel for bfloat16 on matrix tiles, or one for any processor and rows of any length. Both keep queries, keys
and values and compute attention weights again in the backward pass. Heads that are no multiple of 32 wide or rotated in
part, rows too long for the tiles, caches, a few rows of float32, other types and devices take transformers' own forward
pass with `attention.py`.
"""

# T tokens of the pack, W positions that are wanted

from __future__ import annotations

import math
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.together import together
from lorafold.kernels import attention as plain
from lorafold.kernels import tiled_attention as tiled
from lorafold.models.attention import attend, kernel_for

# classes with projections, rotary queries and keys, softmax(scaling q k) v and one more projection
REPLACED = ("LlamaAttention", "Qwen2Attention", "MistralAttention")


def longest(segments: list[int], parents: list[int] | None) -> int:
    """Tokens of the longest row, which is a segment and its ancestors."""
    ends: list[int] = []
    for length, parent in zip(segments, parents or [-1] * len(segments), strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def attention_forward(
    module: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    segments: list[int] | None = None,
    parents: list[int] | None = None,
    wanted: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The forward pass of an attention module: hidden states [1, T, N] -> [1, T, N], and no attention weights.

    Args:
        wanted: positions [W] to which the output is confined, [1, W, N], where a kernel computes.
    """
    width = position_embeddings[0].shape[-1]
    kernel = kernel_for(hidden_states[0], width) if width == module.head_dim else None
    most = tiled.most_tokens(module.num_key_value_groups) if kernel is tiled else math.inf
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
    projections = (module.q_proj, module.k_proj, module.v_proj)
    qkv = together(hidden_states, projections)
    qkv = torch.cat([project(hidden_states) for project in projections], -1) if qkv is None else qkv
    qkv, key_heads = qkv.flatten(0, 1), qkv.shape[-1] // width // (module.num_key_value_groups + 2)
    out = attend(qkv, cos, sin, kernel, key_heads, segments, parents, module.scaling, window)
    return module.o_proj((out if wanted is None else out.index_select(0, wanted))[None]), None


def any_length(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether all attention is computed by kernels on a CPU, to which a row's length is nothing.

    Elsewhere products have a row's length, for each of which torch compiles and keeps something in bfloat16, and short
    rows keep attention weights.
    """

    def covered(module: Any) -> bool:
        width = getattr(module, "head_dim", 0) or 1
        if type(module).__name__ in REPLACED and tiled.usable(dtype, width):
            return True
        alike = getattr(module, "v_head_dim", width) == width
        return alike and plain.usable(dtype, width) and not tiled.usable(dtype, width)

    found = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    return bool(found) and all(map(covered, found))


def replace_attention(model: nn.Module) -> None:
    """Give every attention module of transformers that computes the same this forward pass."""
    for module in model.modules():
        if type(module).__name__ in REPLACED:
            module.forward = MethodType(attention_forward, module)
