"""Weighted combinations of adapters, named and defined as in PEFT's `LoraModel.add_weighted_adapter`.

    cat                   sum_i w_i s_i B_i A_i, exactly: A's on top of each other, B's side by side
    svd                   the best approximation of that sum of a given rank
    linear                A = sum_i sign(c_i) sqrt|c_i| A_i,  B = sum_i sqrt|c_i| B_i,  c_i = w_i s_i: sums of factors,
                          so B A holds products of different adapters as well
    magnitude_prune       as linear, of each A and B only the entries of largest magnitude left
    dare_linear           as linear, entries dropped at random and the rest scaled up (arXiv 2311.03099)
    ties, dare_ties       each entry the mean of those adapters whose entry has the elected sign (arXiv 2306.01708),
                          after pruning by magnitude, or at random

Offsets that are learned directly (r = full) have no factors: there cat, svd and linear are the plain sum, and the
others prune and elect the offsets themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorafold.adapters.lowrank import LowRank, reduced, stacked
from lorafold.config import CombineConfig, RankConfig


def combine(
    updates: Sequence[LowRank], weights: Sequence[float], config: CombineConfig, generator: torch.Generator
) -> LowRank:
    """One update of several, of the same shape and (but for `cat` and `svd`) of the same rank; its scaling is 1.

    Args:
        weights: one for each update; those of the config belong to whole adapters, some of which may lack this layer.
        generator: of what `dare_linear` and `dare_ties` drop.
    """
    if config.combination == "cat":
        return stacked(updates, weights)
    if config.combination == "svd":
        rank = config.r or max(update.rank for update in updates)
        return reduced(stacked(updates, weights), RankConfig(rank)).update
    scaled = [weight * update.scaling for update, weight in zip(updates, weights, strict=True)]
    roots = [math.sqrt(abs(c)) for c in scaled]
    signed = [math.copysign(root, c) for root, c in zip(roots, scaled, strict=True)]
    a = combine_tensors([update.a for update in updates], signed, config, generator)
    b = combine_tensors([update.b for update in updates], roots, config, generator)
    return LowRank(a, b)


def combine_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float], config: CombineConfig, generator: torch.Generator
) -> Tensor:
    """One tensor of several of the same shape: pruned, weighted, and summed or averaged over those of one sign."""
    if config.density is not None and config.density < 1:
        if config.combination.startswith("dare"):
            tensors = [_dropped(tensor, config.density, generator) for tensor in tensors]
        else:
            tensors = [_largest(tensor, config.density) for tensor in tensors]
    entries = torch.stack(list(tensors))
    weighted = entries * torch.tensor(weights).view(-1, *[1] * (entries.dim() - 1))
    if not config.combination.endswith("ties"):
        return weighted.sum(0)
    signs = entries.sign()
    elected = torch.where((entries if config.majority_sign_method == "total" else signs).sum(0) >= 0, 1, -1)
    agreeing = signs == elected
    return (weighted * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def _largest(tensor: Tensor, density: float) -> Tensor:
    """Zeros but for the share `density` of entries with the largest magnitudes."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(tensor)


def _dropped(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Each entry left with probability `density` and divided by it, so that the expectation stays."""
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density
