"""Layers of one input computed together, against the same layers one by one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lorafold.adapters.adapt import adapt
from lorafold.adapters.adapted import AdaptedLayer, set_active
from lorafold.adapters.rows import adapters_by_row
from lorafold.adapters.together import together
from lorafold.config import AdapterSpec
from lorafold.quant.linear import QuantLinear, decoded_once
from lorafold.quant.weight import encode

SIZES = {"q": 64, "k": 32, "v": 96}
CODECS = {"one format": ("Q4_1", "Q4_1", "Q4_1"), "three formats": ("Q4_1", "Q8_0", "NF4")}


def layers(codecs: tuple[str, ...] = CODECS["one format"], biased: str = "") -> nn.ModuleDict:
    torch.manual_seed(0)
    made = {}
    for (name, out), codec in zip(SIZES.items(), codecs, strict=True):
        bias = torch.randn(out) if name in biased else None
        made[name] = QuantLinear(encode(0.1 * torch.randn(out, 128), codec), bias)
    return nn.ModuleDict(made)


def adapted(spec: AdapterSpec | None, **options: object) -> nn.ModuleDict:
    """Layers whose adapters do something."""
    model = layers(**options)  # type: ignore[arg-type]
    if spec is not None:
        adapt(model, spec)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) * parameter.requires_grad
    return model


CASES = {
    "bare": None,
    "lora": AdapterSpec("lora", r=3, lora_alpha=5),
    "lora on some": AdapterSpec("lora", r=3, target_modules=("q", "v")),
    "ranks": AdapterSpec("lora", r=3, rank_pattern={"k": 5}),
    "pissa": AdapterSpec("lora", r=3, init_lora_weights="pissa"),
    "vera": AdapterSpec("vera", r=4),
    "qa-lora": AdapterSpec("qa-lora", r=3),
    "offsets": AdapterSpec("qa-lora", r="full"),
}


@pytest.mark.parametrize("biased", ["", "qv"], ids=["plain", "biases"])
@pytest.mark.parametrize("formats", CODECS)
@pytest.mark.parametrize("case", CASES)
def test_one_product_is_three(case: str, formats: str, biased: str) -> None:
    """Outputs and all gradients; float32, sums of 128 products in another order."""
    codecs = CODECS[formats]
    if case in ("qa-lora", "offsets"):
        codecs = tuple("Q4_1" if codec == "Q4_1" else "Q5_1" for codec in codecs)  # formats that hold offsets
    model = adapted(CASES[case], codecs=codecs, biased=biased)
    x = torch.randn(2, 5, 128, requires_grad=True)
    ours, theirs = together(x, list(model.values())), torch.cat([layer(x) for layer in model.values()], -1)
    assert ours is not None
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    leaves, dy = [x, *(p for p in model.parameters() if p.requires_grad)], torch.randn(theirs.shape)
    assert len(leaves) > 1 or case == "bare"
    for a, b in zip(*(torch.autograd.grad(y, leaves, dy) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def _second(model: nn.ModuleDict) -> None:
    adapt(model, AdapterSpec("lora", r=2), "second")
    set_active(model, ["default", "second"])


def _watched(model: nn.ModuleDict) -> None:
    model["k"].register_forward_hook(lambda *_: None)


def _watched_backward(model: nn.ModuleDict) -> None:
    model["k"].register_full_backward_hook(lambda *_: None)


def _adapter_watched(model: nn.ModuleDict) -> None:
    model["k"].get_submodule("adapters.default").register_forward_hook(lambda *_: None)


def _replaced(model: nn.ModuleDict) -> None:
    model["k"].forward = model["k"].forward


def _base_watched(model: nn.ModuleDict) -> None:
    model["k"].get_submodule("base").register_forward_pre_hook(lambda *_: None)


APART: dict[str, tuple[AdapterSpec, Callable[[nn.ModuleDict], object]]] = {
    "two adapters": (CASES["lora"], _second),  # type: ignore[dict-item]
    "watched": (CASES["lora"], _watched),  # type: ignore[dict-item]
    "watched backward": (CASES["lora"], _watched_backward),  # type: ignore[dict-item]
    "adapter watched": (CASES["lora"], _adapter_watched),  # type: ignore[dict-item]
    "replaced": (CASES["lora"], _replaced),  # type: ignore[dict-item]
    "base watched": (CASES["lora"], _base_watched),  # type: ignore[dict-item]
    "dropout": (AdapterSpec("lora", r=3, lora_dropout=0.5), lambda model: model.train()),
    "dora": (AdapterSpec("lora", r=3, use_dora=True), lambda _: None),
    "scales": (AdapterSpec("qa-lora", r=3, adapt="both"), lambda _: None),
    "offsets of some": (AdapterSpec("qa-lora", r=3, target_modules=("q", "v")), lambda _: None),
}


@pytest.mark.parametrize("case", APART)
def test_what_has_to_be_computed_apart_is(case: str) -> None:
    spec, change = APART[case]
    model = adapted(spec)
    change(model)
    assert together(torch.randn(4, 128), list(model.values())) is None


def test_layers_that_are_busy_otherwise() -> None:
    model, x = adapted(CASES["lora"]), torch.randn(2, 4, 128)
    found = list(model.values())
    assert all(isinstance(layer, AdaptedLayer) for layer in found)
    with adapters_by_row(model, ["default", None]):
        assert together(x, found) is None
    with decoded_once(model):
        assert together(x, found) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert together(x, found) is None
    assert together(x, [*found[:2], nn.Linear(128, 8)]) is None
    assert together(x, found) is not None
