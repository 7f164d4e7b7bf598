"""Causal attention over rows laid end to end, without padding and without a mask over the whole pack.

Registered with transformers under the name `lorafold`; the lengths of the segments arrive as the keyword
`segments`, which transformers hands through to the attention function untouched. Each segment attends to itself and to
its ancestors (`parents`), which stand for what several rows have in common from their start.
On a CPU a kernel computes a pack in one step with its own gradient, which keeps queries, keys and values and computes
attention weights again. Where there is none (heads that are no multiple of 32 wide, other types, fewer than 16 rows of
float32, earlier tokens in a cache; bfloat16 where there are matrix tiles, unless `fused_attention.py` takes it), short
rows take two matrix products and a softmax, and long rows torch's flash kernel. On a GPU, where every call costs more
than the arithmetic of a short row, a pack is one call with a mask of all its tokens, made once.
"""

# H query heads, K key-value heads, N tokens of a pack, T tokens of a row, D head width

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from lorafold.kernels import attention as plain
from lorafold.kernels import block
from lorafold.kernels import tiled_attention as tiled
from lorafold.kernels.packs import Layout
from lorafold.quant.again import once_differentiable

NAME = "lorafold"
KEPT_TOKENS = 640  # the longest row that takes the plain path on a CPU, which keeps attention weights
_MASK_TOKENS = 640  # the longest row whose mask is kept
_ENDLESS = 1 << 40  # tokens
_PACK_TOKENS = 4096  # the longest pack that is one call on a GPU: its mask takes 32 MiB in 16 bits


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float,
    segments: list[int] | None = None,
    parents: list[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend within each segment of a pack.

    Args:
        query: [1, H, N, D] with N the sum of the segments; key and value: [1, K, M, D], M >= N where a
            cache holds earlier tokens (then there is one segment).
        segments: lengths of the segments, in order; None for a single row.
        parents: for each segment an earlier one whose tokens, and whose ancestors', it sees as well; -1 for none.
        sliding_window: how many tokens back a token sees, itself included.

    Returns:
        [1, N, H, D] and None (no attention weights).

    Raises:
        ValueError: a batch of several rows, or capped scores or attention sinks, which are not computed here.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError("attention with capped scores (softcap) or sinks (s_aux) is not supported yet")
    if query.shape[0] != 1:
        raise ValueError(f"rows are packed into a batch of one, this batch has {query.shape[0]}")
    lengths = segments or [query.shape[2]]
    if sum(lengths) != query.shape[2]:
        raise ValueError(f"the segments have {sum(lengths)} tokens in all, the pack has {query.shape[2]}")
    width = query.shape[-1]
    alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape and key.shape[2] == query.shape[2]
    if alike and kernel_for(query[0, 0], width) is plain:
        qkv = torch.cat([x[0].transpose(0, 1) for x in (query, key, value)], 1).flatten(1)
        turned = query.new_empty(0, width)
        out = attend(qkv, turned, turned, plain, key.shape[1], lengths, parents, scaling, sliding_window)
        return out.view(1, len(out), -1, width), None
    if len(lengths) == 1:
        return _attend(query[0], key[0], value[0], scaling, sliding_window)[None], None
    if _in_one_call(query):
        return _attend_at_once(query, key, value, scaling, lengths, parents, sliding_window), None
    q, k, v = (tensor[0].split(lengths, dim=1) for tensor in (query, key, value))
    rows = [
        _attend(q[path[-1]], joined(k, path), joined(v, path), scaling, sliding_window)
        for path in paths(parents or [-1] * len(lengths))
    ]
    return torch.cat(rows)[None], None


class _PackAttention(torch.autograd.Function):
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


def attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    kernel: ModuleType,
    key_heads: int,
    segments: list[int],
    parents: list[int] | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of queries, keys and values side by side [N, (H + 2 K) D] -> [N, H * D], by a kernel.

    Args:
        cos, sin: [N, D], or [0, D] where queries and keys are rotated already, which the tiles do not take.

    Raises:
        ValueError: the segments or angles are not those of so many tokens, or the window is negative.
    """
    if sum(segments) != len(qkv) or len(cos) not in (0, len(qkv)):
        raise ValueError(f"segments of {sum(segments)} tokens and {len(cos)} angles for a pack of {len(qkv)} tokens")
    if window is not None and window < 0:
        raise ValueError(f"a token cannot see {window} tokens back")
    layout = _layout(tuple(segments), tuple(parents or [-1] * len(segments)), key_heads)
    return _PackAttention.apply(qkv, cos, sin, kernel, layout, float(scale), window or _ENDLESS)  # type: ignore[return-value]


def kernel_for(x: Tensor, width: int) -> ModuleType | None:
    """The kernel for rows of a pack x [N, .] and heads of a width, if there is one."""
    kernels = (kernel for kernel in (tiled, plain) if kernel.usable(x.dtype, width))
    return next(kernels, None) if block.usable(x) else None


def paths(parents: list[int]) -> list[list[int]]:
    """For each segment the numbers of its ancestors, the oldest first, and its own."""
    found: list[list[int]] = []
    for index, parent in enumerate(parents):
        if not -1 <= parent < index:
            raise ValueError(f"segment {index} has the parent {parent}, which does not stand before it")
        found.append([*(found[parent] if parent >= 0 else []), index])
    return found


def joined(parts: Sequence[Tensor], path: list[int]) -> Tensor:
    """The parts [K, L, D] of a path, one after the other."""
    return parts[path[0]] if len(path) == 1 else torch.cat([parts[i] for i in path], 1)


def _in_one_call(query: Tensor) -> bool:
    return query.device.type != "cpu" and query.shape[2] <= _PACK_TOKENS


def _attend_at_once(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    lengths: list[int],
    parents: list[int] | None,
    window: int | None,
) -> Tensor:
    """All rows of a pack: q [1, H, N, D], k and v [1, K, N, D] -> [1, N, H, D]."""
    mask = _pack_mask(tuple(lengths), tuple(parents or [-1] * len(lengths)), window, q.dtype, q.device)
    k, v = (_for_every_head(x, q.shape[1]) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scaling).transpose(1, 2)


def _for_every_head(x: Tensor, heads: int) -> Tensor:
    """Keys or values [1, K, M, D] as [1, H, M, D]: with a mask torch's fast kernels of a GPU share none."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@lru_cache(maxsize=2)  # a model has one window, and layers without one
def _pack_mask(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[N, N]: 0 where a token of a pack may look, -inf elsewhere."""
    with torch.inference_mode(False):  # a mask made while evaluating is used again in training
        ancestors, places = torch.zeros(len(lengths), len(lengths), dtype=torch.bool), []
        for path in paths(list(parents)):
            ancestors[path[-1], path] = True
            before = sum(lengths[i] for i in path[:-1])
            places.append(torch.arange(before, before + lengths[path[-1]]))
        segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        segment, place, ancestors = (x.to(device, non_blocking=True) for x in (segment, torch.cat(places), ancestors))
        distance = place[:, None] - place
        visible = ancestors[segment[:, None], segment] & (distance >= 0) & (distance < (window or len(place)))
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, window: int | None) -> Tensor:
    """One row: q [H, T, D], k and v [K, M, D] -> [T, H, D]."""
    heads, tokens, width = q.shape
    kv_heads, seen, _ = k.shape
    windowed = window is not None and seen > window
    if q.device.type != "cpu" or tokens > KEPT_TOKENS:
        causal = tokens == seen and not windowed
        mask = None if causal else _mask(tokens, seen, window if windowed else None, torch.bool, q.device)
        k, v = k[None], v[None]
        if not causal and q.device.type != "cpu":
            k, v = _for_every_head(k, heads), _for_every_head(v, heads)
        gqa = k.shape[1] != heads
        out = F.scaled_dot_product_attention(q[None], k, v, mask, is_causal=causal, scale=scaling, enable_gqa=gqa)
        return out[0].transpose(0, 1)
    grouped = q.reshape(kv_heads, heads // kv_heads * tokens, width)  # the query heads that share a key head
    scores = torch.bmm(grouped * scaling, k.transpose(1, 2)).view(heads, tokens, seen)
    if tokens > 1 or windowed:
        scores = scores + _mask(tokens, seen, window if windowed else None, q.dtype, q.device)
    weights = scores.softmax(-1).view(kv_heads, -1, seen)
    return torch.bmm(weights, v).view(heads, tokens, width).transpose(0, 1)


def _mask(tokens: int, seen: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[tokens, seen]: True or 0 where a token may look, False or -inf elsewhere; the last tokens of `seen` look."""
    if seen <= _MASK_TOKENS:
        return _corner(window, dtype, device)[seen - tokens : seen, :seen]
    return _build_mask(seen - tokens, seen, window, dtype, device)


@lru_cache(maxsize=8)
def _corner(window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask of the longest cached row, of which shorter rows use a corner."""
    return _build_mask(0, _MASK_TOKENS, window, dtype, device)


def _build_mask(first: int, seen: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a mask made while evaluating is used again in training
        distance = torch.arange(first, seen, device=device)[:, None] - torch.arange(seen, device=device)
        visible = (distance >= 0) & (distance < (window or seen))
        if dtype == torch.bool:
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible, float("-inf"))


AttentionInterface.register(NAME, packed_attention)
