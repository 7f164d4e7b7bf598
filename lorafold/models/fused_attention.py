"""Causal attention over the segments of a pack on a CPU, from projections to output in one step with its own gradient.

With matrix tiles it is one kernel. Elsewhere the rotary embedding writes queries and keys in the order that torch's
products read, and mask and softmax take one pass in place. Both keep queries, keys and values and compute attention
weights again in the backward pass. Packs with rows too long for that, caches, other types and devices take
transformers' own forward pass with `attention.py`.
"""

# T tokens of the pack, H query heads, K key-value heads, D head width; a row of L tokens is [H, L, D], contiguous

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.together import together
from lorafold.kernels import attention as tiled
from lorafold.kernels import block
from lorafold.kernels.attention import Layout
from lorafold.kernels.compiled import empty
from lorafold.models.attention import KEPT_TOKENS, joined, paths
from lorafold.quant.again import once_differentiable

# classes with projections, rotary queries and keys, softmax(scaling q k) v and one more projection
REPLACED = ("LlamaAttention", "Qwen2Attention", "MistralAttention")


class _PackAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor,
        sin: Tensor,
        key_heads: int,
        segments: list[int],
        parents: list[int],
        scale: float,
        window: int,
    ) -> Tensor:
        ctx.segments, ctx.paths, ctx.key_heads = segments, paths(parents), key_heads
        ctx.scale, ctx.window = scale, window
        q, k, v = _parts(qkv, key_heads * cos.shape[-1])
        q_rows, k_rows = (block.rotate(x, cos, sin, segments) for x in (q, k))
        values = _heads(v, cos.shape[-1])
        out = empty(*q.shape, dtype=q.dtype)
        queries, keys, values_of = _by_row(segments, q_rows, k_rows, values)
        for path, out_row in zip(ctx.paths, out.split(segments), strict=True):
            weights = _weights(queries, keys, path, segments, scale, window)
            _put_heads(out_row, torch.bmm(weights, joined(values_of, path)))
        ctx.save_for_backward(q_rows, k_rows, values, cos, sin)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_rows, k_rows, values, cos, sin = ctx.saved_tensors
        segments, width = ctx.segments, cos.shape[-1]
        d_rows = empty(*q_rows.shape, dtype=q_rows.dtype), empty(*k_rows.shape, dtype=k_rows.dtype)
        queries, keys, values_of = _by_row(segments, q_rows, k_rows, values)
        d_queries, d_keys, _ = _by_row(segments, *d_rows, values)
        d_qkv = empty(len(cos), (len(q_rows) + 2 * len(k_rows)) // len(cos) * width, dtype=q_rows.dtype)
        dq, dk, dv = _parts(d_qkv, ctx.key_heads * width)
        ancestors = {i for path in ctx.paths for i in path[:-1]}
        totals: list[tuple[Tensor, Tensor]] = []  # gradients of each segment's keys and values
        for path, dy_row in zip(ctx.paths, grads[0].split(segments), strict=True):
            own = path[-1]
            p = _weights(queries, keys, path, segments, ctx.scale, ctx.window)
            dy = _heads(dy_row, width).reshape(queries[own].shape)
            d_value = torch.bmm(p.transpose(1, 2), dy)
            d = torch.bmm(dy, joined(values_of, path).transpose(1, 2))
            block.causal_softmax_backward_(p, segments[own], ctx.scale, ctx.window, d)
            torch.bmm(d, joined(keys, path), out=d_queries[own])
            parts = (
                x.split([segments[i] for i in path], 1) for x in (torch.bmm(d.transpose(1, 2), queries[own]), d_value)
            )
            *older, newest = zip(*parts, strict=True)
            for i, (of_key, of_value) in zip(path, older, strict=False):
                totals[i][0].add_(of_key)
                totals[i][1].add_(of_value)
            totals.append(tuple(x.float() for x in newest) if own in ancestors else newest)
        for (of_key, of_value), d_key, dv_row in zip(totals, d_keys, dv.split(segments), strict=True):
            d_key.copy_(of_key)
            _put_heads(dv_row, of_value)
        for target, rows in zip((dq, dk), d_rows, strict=True):
            target.copy_(block.rotate_back(rows, cos, sin, segments))
        return d_qkv, *[None] * 7


def _parts(qkv: Tensor, width: int) -> Sequence[Tensor]:
    """q, k and v of [T, .], of which the last two have so many columns."""
    return qkv.split([qkv.shape[1] - 2 * width, width, width], 1)


def _weights(
    queries: list[Tensor], keys: list[Tensor], path: list[int], segments: list[int], scale: float, window: int
) -> Tensor:
    """Attention weights [K, H / K * L, M] of the last segment of a path over all M tokens of the path."""
    scores = torch.bmm(queries[path[-1]], joined(keys, path).transpose(1, 2))
    block.causal_softmax_(scores, segments[path[-1]], scale, window)
    return scores


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, layout: Layout, scale: float, window: int) -> Tensor:
        out, found = tiled.forward(qkv, cos, sin, layout, scale, window)
        ctx.save_for_backward(qkv, found, cos, sin)
        ctx.layout, ctx.scale, ctx.window = layout, scale, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        qkv, found, cos, sin = ctx.saved_tensors
        return tiled.backward(qkv, found, cos, sin, ctx.layout, ctx.scale, ctx.window, grads[0]), *[None] * 5


@lru_cache(maxsize=4)
def _layout(segments: tuple[int, ...], parents: tuple[int, ...], key_heads: int) -> Layout:
    return Layout(list(segments), paths(list(parents)), key_heads)


def longest(segments: list[int], parents: list[int] | None) -> int:
    """Tokens of the longest row, which is a segment and its ancestors."""
    ends: list[int] = []
    for length, parent in zip(segments, parents or [-1] * len(segments), strict=True):
        ends.append(length + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def _by_row(
    segments: list[int], q: Tensor, k: Tensor, v: Tensor
) -> tuple[list[Tensor], list[Tensor], Sequence[Tensor]]:
    """q [T * H, D], k [T * K, D] and v [K, T, D] per row: heads of one key head together, [K, H / K * L, D]."""
    kv_heads, tokens, width = v.shape
    q_rows, k_rows = (x.split([n * (len(x) // tokens) for n in segments]) for x in (q, k))
    return (
        [x.view(kv_heads, -1, width) for x in q_rows],
        [x.view(kv_heads, -1, width) for x in k_rows],
        v.split(segments, 1),
    )


def _heads(x: Tensor, width: int) -> Tensor:
    """[L, H * D] -> [H, L, D], contiguous."""
    return x.view(len(x), -1, width).transpose(0, 1).contiguous()


def _put_heads(x: Tensor, by_head: Tensor) -> None:
    """Write [H, L, D], its first two dimensions split in any way, to x [L, H * D]."""
    x.view(len(x), -1, by_head.shape[-1]).copy_(by_head.reshape(-1, len(x), by_head.shape[-1]).transpose(0, 1))


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
    is_tiled = block.usable(hidden_states) and tiled.usable(hidden_states, width)
    most = tiled.most_tokens(module.num_key_value_groups) if is_tiled else KEPT_TOKENS
    fits = segments is not None and longest(segments, parents) <= most
    if segments is None or not fits or past_key_values is not None or not block.usable(hidden_states):
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
    if is_tiled:
        layout = _layout(tuple(segments), tuple(parents), key_heads)
        out = _TileAttention.apply(qkv, cos, sin, layout, module.scaling, window)
    else:
        out = _PackAttention.apply(qkv, cos, sin, key_heads, segments, parents, module.scaling, window)
    return module.o_proj(out[None]), None  # type: ignore[index]


def any_length(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether attention takes rows of any length without compiling and keeping something for each."""
    found = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    if not found or any(type(module).__name__ not in REPLACED for module in found):
        return False
    some = torch.empty(0, 32, dtype=dtype, device=next(model.parameters()).device)
    return all(tiled.usable(some, getattr(module, "head_dim", 0) or 1) for module in found)


def replace_attention(model: nn.Module) -> None:
    """Give every attention module of transformers that computes the same this forward pass."""
    for module in model.modules():
        if type(module).__name__ in REPLACED:
            module.forward = MethodType(attention_forward, module)
