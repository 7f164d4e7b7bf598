"""EVA: A is the inputs' largest singular vectors, and ranks lie where these explain most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.start import shared_out
from lorafold.adapters.targets import linear_layers
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.models.load import load
from lorafold.runs.eva import inject_for
from tests.practice import same_logits, token_rows


def test_ranks_and_directions_are_those_of_the_inputs(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against singular values of the inputs that a plain run, row by row, sees in float64.

    Without products of rounded inputs, which move shares by a thousandth: a random model's lie that close together.
    """
    monkeypatch.setattr("lorafold.runs.blocks.compute_dtype", lambda: torch.float32)
    path, rows = tiny_file("llama", "Q4_1"), token_rows(12)
    loaded, plain = load(path), load(path)
    seen: dict[str, list[torch.Tensor]] = {}
    layers = {name: layer for name, layer in linear_layers(plain.model).items() if name != "lm_head"}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda _module, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2))
        )
    with torch.no_grad():
        for row in rows:
            plain.model(torch.tensor(row.ids)[None])
    inject_for(loaded, AdapterSpec("lora", r=3, lora_alpha=6, init_lora_weights="eva"), rows)
    shares, directions = {}, {}
    for name, inputs in seen.items():
        _, s, vt = torch.linalg.svd(torch.cat(inputs).double(), full_matrices=False)
        shares[name], directions[name] = (s**2 / (s**2).sum())[:6], vt
    listed = sorted(float(share) for of_layer in shares.values() for share in of_layer)
    smallest = listed[-3 * len(layers)]
    ranks = {name: int((of_layer >= smallest).sum()) for name, of_layer in shares.items()}
    adapters = {name: layer.adapter for name, layer in adapted_layers(loaded.model)}
    assert {name: len(adapter.lora_A) for name, adapter in adapters.items()} == {n: r for n, r in ranks.items() if r}
    assert len(set(ranks.values())) > 1  # some layers have more than others
    assert sum(ranks.values()) == 3 * len(layers)
    for name, adapter in adapters.items():
        assert adapter.scaling == pytest.approx(2.0)
        # the same subspace: single vectors may swap where singular values are close
        inside = adapter.lora_A.double() @ directions[name][: ranks[name]].T
        torch.testing.assert_close(inside.norm(dim=1), torch.ones(ranks[name]).double(), atol=1e-3, rtol=0)
    same_logits(loaded.model, load(path).model, 0.0)


def test_budget_goes_to_the_largest_shares() -> None:
    shares = {"a": torch.tensor([0.9, 0.05]), "b": torch.tensor([0.5, 0.3]), "c": torch.tensor([0.01, 0.001])}
    assert shared_out(shares, 3) == {"a": 1, "b": 2, "c": 0}


def test_layers_outside_of_blocks_are_refused(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1", tied=False))
    spec = AdapterSpec("lora", r=2, init_lora_weights="eva", target_modules=("q_proj", "lm_head"))
    with pytest.raises(AdapterError, match="lie in none: lm_head"):
        inject_for(loaded, spec, token_rows(3))
