"""Layers of one input, such as q, k and v: one product for all of them, where that computes the same.

The input is read once and not once a layer, and its gradient is one sum; otherwise each layer's part of it would be
written, read again and added.
"""

# r rank, I input features, O output features

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorafold.adapters.adapted import AdaptedLayer, watched
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA, lora_linear
from lorafold.quant.linear import multiply_packed, stacked


def together(x: Tensor, layers: Sequence[nn.Module]) -> Tensor | None:
    """The outputs of packed layers for x [..., I], side by side; None where they have to compute one by one.

    That is where a layer is dense, watched by a hook, or has several adapters, dropout, DoRA or learned scales, or
    where only some of them learn offsets.
    """
    bases = [layer.base if isinstance(layer, AdaptedLayer) else layer for layer in layers]
    weight = stacked(bases, x)
    if weight is None or any(isinstance(layer, AdaptedLayer) and watched(layer) for layer in layers):
        return None
    adapters = [layer.active_adapters() if isinstance(layer, AdaptedLayer) else [] for layer in layers]
    if not any(adapters):
        y = multiply_packed(x, weight)
    elif all(len(own) < 2 and all(_is_plain(adapter) for adapter in own) for own in adapters):
        y = lora_linear(x, *_factors(bases, adapters), weight)  # type: ignore[arg-type]
    elif all(len(own) == 1 and _moves_offsets(own[0]) for own in adapters) and weight.one_group_size:
        offsets = [layer.group_parameters()[0] for layer in layers]  # type: ignore[operator]
        y = multiply_packed(x, weight, torch.cat(offsets))
    else:
        return None
    biases = [base.bias for base in bases]
    if all(bias is None for bias in biases):
        return y
    return y + torch.cat([y.new_zeros(b.out_features) if b.bias is None else b.bias.to(y.dtype) for b in bases])  # type: ignore[union-attr, arg-type]


def _is_plain(adapter: object) -> bool:
    return isinstance(adapter, LoRA) and not adapter.dora and not (adapter.training and adapter.dropout)


def _moves_offsets(adapter: object) -> bool:
    return isinstance(adapter, GroupAdapter) and not adapter.learns_scale


def _factors(bases: Sequence[nn.Module], adapters: Sequence[Sequence[LoRA]]) -> tuple[Tensor, Tensor]:
    """A [sum of r, I] and s B [sum of O, sum of r], which is zero but for each layer's own rows and ranks."""
    a, b = [], []
    for base, own in zip(bases, adapters, strict=True):
        factors = own[0].factors() if own else None
        a += [factors[0]] if factors else []
        b += [own[0].scaling * factors[1] if factors else torch.empty(base.out_features, 0)]  # type: ignore[arg-type]
    return torch.cat(a), torch.block_diag(*b)
