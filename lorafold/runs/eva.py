"""EVA (arXiv 2410.07170): A begins with what a layer's inputs mostly are, and ranks go where they explain most.

The model reads some training rows block by block. Of the directions of all layers' inputs those that explain the
largest share of their layer's sum of squares are taken, as many as the ranks that were asked for together, and no more
than twice of these in one layer; a layer that gets none is not adapted. alpha / r stays what it was in every layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import Injection, inject
from lorafold.adapters.lora import LoRA
from lorafold.adapters.start import directions, shared_out
from lorafold.adapters.targets import find_targets
from lorafold.config import AdapterSpec
from lorafold.data.packs import micro_batches, pack
from lorafold.data.tokens import Tokens
from lorafold.errors import AdapterError
from lorafold.models.load import LoadedModel
from lorafold.runs.blocks import BlockWalk

ROWS, PACK_TOKENS = 64, 1024  # rows that are read, and tokens of them at once
SPREAD = 2  # the largest rank beside the one asked for (rho in the paper)


def inject_for(loaded: LoadedModel, spec: AdapterSpec, rows: Iterable[Tokens]) -> Injection:
    """`inject`, with ranks and A from the first rows where `init_lora_weights` is `eva`.

    Raises:
        AdapterError: as `inject`, or a target lies in no block, so that its inputs are not seen.
    """
    if spec.init_lora_weights != "eva":
        return inject(loaded.model, spec)
    targets = find_targets(loaded.model, spec)
    found = _input_directions(loaded, spec, targets, list(islice(rows, ROWS)))
    asked = {path: _rank(spec, path) for path in targets}
    ranks = shared_out({path: shares for path, (_, shares) in found.items()}, sum(asked.values()))
    kept = tuple(path for path in targets if ranks[path])
    scalings = {path: spec.for_layer(path).scaling for path in kept}
    moved = replace(
        spec,
        target_modules=kept,
        exclude_modules=(),
        layers_to_transform=(),
        init_lora_weights="kaiming",
        rank_pattern={re.escape(path): ranks[path] for path in kept},
        alpha_pattern={
            re.escape(path): scalings[path] * (ranks[path] ** 0.5 if spec.use_rslora else ranks[path]) for path in kept
        },
    )
    result = inject(loaded.model, moved)
    with torch.no_grad():
        for path, layer in adapted_layers(loaded.model):
            adapter = layer.adapter
            assert isinstance(adapter, LoRA)
            adapter.learned()[0].copy_(found[path][0][: ranks[path]])
    return result


def _rank(spec: AdapterSpec, path: str) -> int:
    rank = spec.for_layer(path).r
    assert isinstance(rank, int)
    return rank


@torch.no_grad()
def _input_directions(
    loaded: LoadedModel, spec: AdapterSpec, targets: list[str], rows: list[Tokens]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Directions [n, I] and shares [n] of each target's inputs, the largest first."""
    packs = [pack(group) for group in micro_batches(rows, PACK_TOKENS)]
    walk = BlockWalk(loaded, packs)
    found = {}
    for index in range(len(walk.blocks)):
        hessians = walk.hessians(index)
        known: dict[int, tuple[Tensor, Tensor]] = {}  # layers that share their input share its sums
        for path in targets:
            if path in hessians:
                most, key = SPREAD * _rank(spec, path), id(hessians[path])
                if key not in known:
                    known[key] = directions(hessians[path], most)
                found[path] = (known[key][0][:most], known[key][1][:most])
        walk.advance(index)
    outside = [path for path in targets if path not in found]
    if outside:
        raise AdapterError(f"eva sees the inputs of layers in blocks, and these lie in none: {', '.join(outside[:5])}")
    return found
