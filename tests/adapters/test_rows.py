"""Several adapters on one base: switched, stacked, deleted, and another one for each row of a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lorafold.adapters.adapt import adapt
from lorafold.adapters.adapted import adapter_names, carriers, delete_adapter, set_active
from lorafold.adapters.inject import adapter_state, inject
from lorafold.adapters.rows import adapters_by_row
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.models.load import LoadedModel, load

SPECS = {
    "lora": [AdapterSpec("lora", r=4), AdapterSpec("lora", r=2, lora_alpha=7, target_modules=("q_proj", "up_proj"))],
    "qa-lora": [AdapterSpec("qa-lora", r=4), AdapterSpec("qa-lora", r="full", target_modules=("v_proj", "down_proj"))],
    "dora": [AdapterSpec("lora", r=4, use_dora=True), AdapterSpec("lora", r=2, init_lora_weights="pissa")],
    "vera": [AdapterSpec("vera", r=8), AdapterSpec("vera", r=4, target_modules=("q_proj",))],
}


def several(path: Path, kind: str) -> LoadedModel:
    """A model with two adapters, a and b, that both do something."""
    loaded = load(path)
    torch.manual_seed(0)
    for name, spec in zip("ab", SPECS[kind], strict=True):
        inject(loaded.model, spec, name)
        with torch.no_grad():
            for parameter in adapter_state(loaded.model, name).values():
                parameter += 0.05 * torch.randn(parameter.shape)
    return loaded


@pytest.fixture(params=SPECS)
def loaded(request: pytest.FixtureRequest, tiny_file: Callable[..., Path]) -> LoadedModel:
    return several(tiny_file("llama", "Q4_1"), request.param)


@torch.no_grad()
def logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    return loaded.model(ids).logits


@pytest.mark.parametrize("lengths", [[9, 3, 7, 1, 6], [5, 5, 5, 5, 5]], ids=["pack", "even pack"])
def test_each_row_has_its_own(loaded: LoadedModel, lengths: list[int]) -> None:
    """As if the rows had been computed one after the other; 1e-5 for sums in another order (few rows: torch's)."""
    names = ["b", None, "a", "a", "b"]
    rows = [torch.randint(0, 40, (1, length)) for length in lengths]
    wanted = []
    for row, name in zip(rows, names, strict=True):
        set_active(loaded.model, name)
        wanted.append(logits(loaded, row))
    set_active(loaded.model, "a")
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    pack = {"input_ids": torch.cat(rows, 1), "position_ids": positions, "segments": lengths, "use_cache": False}
    with torch.no_grad():
        with adapters_by_row(loaded.model, names, lengths):
            together = loaded.model(**pack).logits
        of_a = loaded.model(**pack).logits
    torch.testing.assert_close(together, torch.cat(wanted, 1), atol=1e-5, rtol=0)
    assert (together - of_a).abs().max() > 1e-3  # a is active again, for all
    torch.testing.assert_close(logits(loaded, rows[2]), wanted[2], atol=0, rtol=0)


def test_a_stack_is_the_sum_of_its_updates(tiny_file: Callable[..., Path]) -> None:
    loaded = several(tiny_file("llama", "Q4_1"), "lora")
    ids = torch.randint(0, 40, (1, 9))
    set_active(loaded.model, ("a", "b"))
    stacked = logits(loaded, ids)
    dense = {}
    for path, carrier in carriers(loaded.model):
        dense[path] = carrier.base.packed.decode() + sum(carrier.adapters[n].delta() for n in carrier.adapters)
    delete_adapter(loaded.model, "a")
    delete_adapter(loaded.model, "b")
    for path, weight in dense.items():
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.detach())
        loaded.model.set_submodule(path, layer)
    torch.testing.assert_close(stacked, logits(loaded, ids), atol=1e-5, rtol=0)


def test_stacked_offsets_add_before_they_are_rounded(tiny_file: Callable[..., Path]) -> None:
    loaded = several(tiny_file("llama", "Q4_1"), "qa-lora")
    set_active(loaded.model, ("a", "b"))
    layer = dict(carriers(loaded.model))["model.layers.0.self_attn.v_proj"]
    updates = [layer.adapters[name].offset_update() for name in "ab"]
    packed = layer.base.packed
    stored = packed.format.offset(packed.blocks)
    assert torch.equal(layer.offset(), (stored + updates[0] + updates[1]).half().float())


def test_deleting_leaves_the_others_and_at_last_the_base(loaded: LoadedModel) -> None:
    ids = torch.randint(0, 40, (1, 9))
    set_active(loaded.model, None)
    plain = logits(loaded, ids)
    set_active(loaded.model, "b")
    of_b = logits(loaded, ids)
    delete_adapter(loaded.model, "a")
    assert adapter_names(loaded.model) == ["b"]
    assert torch.equal(logits(loaded, ids), of_b)
    with pytest.raises(AdapterError, match="no adapter named 'a'; it has b"):
        delete_adapter(loaded.model, "a")
    delete_adapter(loaded.model, "b")
    assert not list(carriers(loaded.model))
    assert torch.equal(logits(loaded, ids), plain)


def test_what_cannot_differ_from_row_to_row_is_refused(tiny_file: Callable[..., Path]) -> None:
    loaded = several(tiny_file("llama", "Q4_1"), "lora")
    inject(loaded.model, AdapterSpec("qa-lora", r=2), "c")
    before = [carrier.active for _, carrier in carriers(loaded.model)]
    for rows, message in ((["a", "z"], "no adapter named 'z'"), (["a", "c"], "offsets or LoRA, not both")):
        with pytest.raises(AdapterError, match=message), adapters_by_row(loaded.model, rows):
            pass
    assert [carrier.active for _, carrier in carriers(loaded.model)] == before
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    adapt(model, AdapterSpec("lora", r=2))
    with pytest.raises(AdapterError, match="cannot differ from row to row"), adapters_by_row(model, ["default"]):
        pass


def test_embeddings_and_convolutions_by_row() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Conv1d(7, 5, 3), nn.Linear(4, 3))
    for name in "ab":
        adapt(model, AdapterSpec("lora", r=2, target_modules=("0", "1", "2")), name)
        with torch.no_grad():
            for parameter in adapter_state(model, name).values():
                parameter += 0.5 * torch.randn(parameter.shape)
    ids = torch.randint(0, 20, (3, 7))
    wanted = []
    for i, name in enumerate("bab"):
        set_active(model, name)
        wanted.append(model(ids[i : i + 1]))
    twin = copy.deepcopy(model)
    with adapters_by_row(twin, list("bab")):
        torch.testing.assert_close(twin(ids), torch.cat(wanted), atol=1e-5, rtol=0)
