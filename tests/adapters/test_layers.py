"""The two kinds of adapter on one layer, against their formulas written out densely."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lorafold.adapters.adapted import AdaptedLayer, set_active
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.inject import attach, make_adapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.sites import LinearSite
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import encode

SPECS = {
    "lora": AdapterSpec("lora", r=3, lora_alpha=5),
    "qa-lora": AdapterSpec("qa-lora", r=3, lora_alpha=5),
    "rslora": AdapterSpec("qa-lora", r=4, lora_alpha=5, use_rslora=True),
    "full": AdapterSpec("qa-lora", r="full"),
}


def quantized(codec: str = "Q4_1", out: int = 24, width: int = 96) -> QuantLinear:
    return QuantLinear(encode(torch.randn(out, width), codec))


def adapted(spec: AdapterSpec, base: nn.Linear | QuantLinear | None = None, std: float = 0.3) -> AdaptedLayer:
    """A layer with a random adapter."""
    layer = AdaptedLayer(base if base is not None else quantized())
    adapter = make_adapter(layer.base, spec)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter, std=std)
    layer.adapters["default"] = adapter
    layer.wanted = ("default",)
    return layer


@pytest.mark.parametrize("trained_base", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_lora_is_its_formula(bias: bool, trained_base: bool) -> None:
    """Output and gradients, fused (a frozen base) and step by step."""
    base = nn.Linear(6, 4, bias=bias).requires_grad_(trained_base)
    adapter = LoRA(LinearSite(base), r=2, scaling=1.5)
    nn.init.normal_(adapter.lora_A)
    nn.init.normal_(adapter.lora_B)
    x, dy = torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 4)
    update = torch.einsum("bti,ri,or->bto", x, adapter.lora_A, adapter.lora_B) * 1.5
    torch.testing.assert_close(x @ adapter.delta().T, update)
    leaves = (x, adapter.lora_A, adapter.lora_B)
    torch.testing.assert_close(adapter(x), base(x) + update)
    ours, theirs = (torch.autograd.grad(y, leaves, dy) for y in (adapter(x), base(x) + update))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_acts_on_the_adapters_input_while_training_only() -> None:
    """With A and B the identity, each output is zero or the input over what is kept."""
    nothing = nn.Linear(1000, 1000, bias=False).requires_grad_(False)
    nn.init.zeros_(nothing.weight)
    adapter = LoRA(LinearSite(nothing), r=1000, scaling=1.0, dropout=0.3)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.eye(1000))
        adapter.lora_B.copy_(torch.eye(1000))
    x = torch.rand(4, 1000) + 0.5
    y = adapter(x)
    dropped = y == 0
    assert 0.25 < dropped.float().mean() < 0.35  # 4,000 draws: a standard deviation of 0.007
    torch.testing.assert_close(y[~dropped], (x / 0.7)[~dropped])
    torch.testing.assert_close(adapter.eval()(x), x)


def test_a_new_adapter_changes_nothing() -> None:
    x = torch.randn(2, 96)
    for spec in SPECS.values():
        layer = AdaptedLayer(quantized())
        layer.adapters["default"] = make_adapter(layer.base, spec)
        layer.wanted = ("default",)
        assert torch.equal(layer(x), layer.base(x))


@pytest.mark.parametrize("name", SPECS)
def test_scaling_follows_from_alpha_and_rank(name: str) -> None:
    spec = SPECS[name]
    adapter = make_adapter(quantized(), spec)
    rank = math.sqrt(4) if name == "rslora" else 3
    assert adapter.scaling == (1.0 if spec.r == "full" else pytest.approx(5 / rank))


@pytest.mark.parametrize("codec", ["Q4_1", "Q5_1"])
@pytest.mark.parametrize("name", ["qa-lora", "rslora", "full"])
def test_group_adapter_computes_with_the_rounded_weights(name: str, codec: str) -> None:
    """W = scale code + half(offset + s/sqrt(32) B A), spelled out."""
    layer = adapted(SPECS[name], quantized(codec))
    packed, adapter = layer.base.packed, layer.adapter
    assert isinstance(adapter, GroupAdapter)
    stored, scale = packed.format.offset(packed.blocks), packed.format.scale(packed.blocks)
    if name == "full":
        update = adapter.offset_delta
    else:
        update = SPECS[name].scaling / math.sqrt(32) * (adapter.lora_B @ adapter.lora_A)
    offset = (stored + update).half().float()
    assert update.abs().mean() > 0.02  # float16 resolves 2^-10 of offsets below 4
    weight = packed.format.codes(packed.blocks).float() * scale[..., None] + offset[..., None]
    x = torch.randn(5, 96)
    torch.testing.assert_close(layer(x), x @ weight.flatten(1).T, atol=1e-4, rtol=0)  # outputs of some 10
    torch.testing.assert_close(layer.offset(), offset, atol=0, rtol=0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("codec", ["Q4_1", "Q5_1"])
def test_gradients_equal_those_of_the_dense_layer(name: str, codec: str) -> None:
    """Autograd in float64 through a dense weight with the update added, at the rounded weights."""
    layer = adapted(SPECS[name], quantized(codec))
    x, dy = torch.randn(2, 7, 96, requires_grad=True), torch.randn(2, 7, 24)
    layer(x).backward(dy)
    adapter = layer.adapter
    assert adapter is not None
    with torch.no_grad():
        rounded = layer.base.packed.decode(torch.float32, layer.offset()).double()
    twins = {key: p.detach().double().requires_grad_() for key, p in adapter.named_parameters()}
    if name == "full":
        delta = twins["offset_delta"].repeat_interleave(32, 1)
    elif name == "lora":
        delta = SPECS[name].scaling * twins["lora_B"] @ twins["lora_A"]
    else:
        delta = SPECS[name].scaling / math.sqrt(32) * (twins["lora_B"] @ twins["lora_A"]).repeat_interleave(32, 1)
    weight = rounded + delta - (0 if name == "lora" else delta.detach())  # the straight-through estimator
    x_twin = x.detach().double().requires_grad_()
    (x_twin @ weight.T).backward(dy.double())
    for key, parameter in adapter.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1
        # sums of 14 x 32 products of about 1 in float32
        torch.testing.assert_close(parameter.grad.double(), twins[key].grad, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(x.grad.double(), x_twin.grad, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["qa-lora", "rslora", "full"])
def test_expanded_is_the_same_update_of_the_weights(name: str) -> None:
    layer = adapted(SPECS[name])
    adapter, packed = layer.adapter, layer.base.packed
    assert isinstance(adapter, GroupAdapter)
    a, b = adapter.expanded()
    scaling = 1.0 if name == "full" else SPECS[name].scaling
    unrounded = packed.format.offset(packed.blocks) + adapter.offset_update().detach()
    wanted = packed.decode(offset=unrounded)
    # adding to a weight of about 1 in float32, in another order
    torch.testing.assert_close(packed.decode() + scaling * (b @ a), wanted, atol=2e-6, rtol=0)
    assert (wanted - packed.decode()).abs().max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_adapters_work_in_bfloat16(name: str) -> None:
    """Their parameters stay float32; outputs differ from float32's by bfloat16's rounding, 2^-8 of sums of about 10."""
    layer = adapted(SPECS[name])
    x = torch.randn(4, 96)
    low = layer(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), layer(x), atol=0.25, rtol=0.02)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(low.float(), layer.base(x), atol=0.25, rtol=0.02)
    low.float().square().mean().backward()
    for parameter in layer.adapters.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_several_adapters_on_one_base() -> None:
    model = nn.Sequential(quantized())
    x = torch.randn(3, 96)
    alone = model(x)
    outputs = {}
    for name in ("a", "b"):
        adapter = make_adapter(AdaptedLayer(quantized()).base, SPECS["qa-lora"])
        nn.init.normal_(adapter.lora_B)
        attach(model, "0", adapter, name)
        outputs[name] = model(x)  # the new one is active
    assert not torch.equal(outputs["a"], outputs["b"])
    for name in ("a", "b"):
        set_active(model, name)
        assert torch.equal(model(x), outputs[name])
    set_active(model, None)
    assert torch.equal(model(x), alone)
    with pytest.raises(AdapterError, match="no adapter named 'unknown'; it has a, b"):
        set_active(model, ["a", "unknown"])
    with pytest.raises(AdapterError, match="already carries an adapter named 'a'"):
        attach(model, "0", make_adapter(quantized(), SPECS["lora"]), "a")
