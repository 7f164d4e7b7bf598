"""Learning scales, alone and with offsets: gradients, rounding, folding, refusals."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.adapters.adapted import adapted_layers, parameters_once
from lorafold.adapters.fold import fold, merged_weight, requantize
from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, ConfigError, FoldError
from lorafold.models.exports import lora_pairs
from lorafold.models.load import LoadedModel, load
from lorafold.quant.codecs import GGUF_CODECS
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import QuantizedWeight, encode
from tests.practice import lora_like
from tests.tiny import tiny_gguf, tiny_ids

SCALABLE = [name for name, codec in GGUF_CODECS.items() if codec.scalable and codec.encodes]
adapts = pytest.mark.parametrize("adapt", ["scale", "both"])
ranks = pytest.mark.parametrize("r", [4, "full"])


@pytest.fixture
def adapted(tiny_file: Callable[..., Path]) -> Callable[..., LoadedModel]:
    def make(adapt: str, types: str = "Q4_1", r: int | str = 4, size: float = 0.3) -> LoadedModel:
        loaded = load(tiny_file("llama", types))
        inject(loaded.model, AdapterSpec("qa-lora", r=r, adapt=adapt))  # type: ignore[arg-type]
        lora_like(loaded.model, scale=size)
        return loaded

    return make


@pytest.mark.parametrize("codec", SCALABLE)
def test_gradients_equal_autograds(codec: str) -> None:
    """Against float64 through a dense weight written out as scale times level plus offset."""
    weight = encode(torch.randn(40, 96), codec)
    form, blocks = weight.format, weight.blocks
    scale, offset = form.scale(blocks).requires_grad_(True), form.offset(blocks).requires_grad_(True)
    x = torch.randn(2, 7, 96, requires_grad=True)
    factors = torch.randn(2, 7, 40)
    (QuantLinear(weight)(x, offset, scale) * factors).sum().backward()
    s, o = (t.detach().double().requires_grad_(True) for t in (scale, offset))
    z = x.detach().double().requires_grad_(True)
    dense = (form.levels(blocks).double() * s[..., None] + o[..., None]).flatten(1)
    (z @ dense.T * factors).sum().backward()
    for ours, theirs in ((x.grad, z.grad), (scale.grad, s.grad), (offset.grad, o.grad)):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


def test_gradients_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, the last part shorter."""
    weight = encode(torch.randn(11, 64), "Q4_1")
    scale = weight.format.scale(weight.blocks)
    grads = []
    for entries in (1 << 22, 64 * 4):
        monkeypatch.setattr("lorafold.quant.linear._GRADIENT_ENTRIES", entries)
        leaf = scale.clone().requires_grad_(True)
        QuantLinear(weight)(torch.ones(3, 64), None, leaf).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("codec", SCALABLE)
def test_moved_scales_are_what_is_stored(codec: str) -> None:
    weight = encode(torch.randn(6, 96), codec)
    form, blocks = weight.format, weight.blocks
    stored = form.scale(blocks)
    update = (0.1 * torch.randn(6, 3)).requires_grad_(True)
    with torch.no_grad():
        update[2] = 0
    moved = form.move_scale(stored, update)
    expected = (stored * (1 + update.detach())).half().float()
    torch.testing.assert_close(moved.detach(), expected, rtol=2**-10, atol=0)  # two ways to round before the last
    assert torch.equal(moved[2], stored[2])
    new = form.with_scale(blocks, moved.detach())
    assert torch.equal(form.scale(new), moved)
    assert torch.equal(form.offset(new), form.offset(blocks))
    assert torch.equal(form.codes(new), form.codes(blocks))
    moved.sum().backward()
    assert update.grad is not None
    assert torch.equal(update.grad, stored)


@adapts
@ranks
@pytest.mark.parametrize("types", ["Q4_1", "Q5_0"])
def test_folded_blocks_decode_to_the_training_weights(
    adapted: Callable[..., LoadedModel], adapt: str, r: int | str, types: str
) -> None:
    loaded = adapted(adapt, types, r)
    layers = dict(adapted_layers(loaded.model))
    for result in fold(loaded.model):
        layer = layers[result.name]
        base = layer.base.packed
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                assert torch.equal(result.weight.decode(dtype), base.decode(dtype, layer.offset(), layer.scale()))
        assert torch.equal(result.weight.decode(), merged_weight(layer))
        assert not torch.equal(result.weight.decode(), base.decode())
        assert torch.equal(result.weight.format.codes(result.weight.blocks), base.format.codes(base.blocks))
        assert result.kept == pytest.approx(1, abs=2e-3)
        assert 0 < result.error_steps < 0.2  # a float16 scale errs by 2^-11 of itself, times a code of up to 31
        assert result.weight.codec == (types if adapt == "scale" or types == "Q4_1" else "Q5_1")


def test_scales_alone_need_no_promotion_and_no_offset(tmp_path: Path) -> None:
    types = {"attn_q": "Q4_0", "attn_k": "Q8_0", "": "Q5_1"}
    loaded = load(tiny_gguf(tmp_path, "llama", types))
    injection = inject(loaded.model, AdapterSpec("qa-lora", adapt="scale"))
    assert (injection.promoted.codecs, injection.frozen, len(injection.modules)) == ({}, {}, 21)
    loaded = load(tiny_gguf(tmp_path, "llama", types, name="both.gguf"))
    injection = inject(loaded.model, AdapterSpec("qa-lora", adapt="both"))
    assert set(injection.frozen.values()) == {"Q8_0"}
    assert set(injection.promoted.codecs.values()) == {("Q4_0", "Q4_1")}
    assert "it stores no offset and scale of its own to learn" in injection.describe()


def test_k_quants_in_place_have_no_scales_of_their_own(tmp_path: Path) -> None:
    loaded = load(tiny_gguf(tmp_path, "llama", "Q4_K", wide=True))
    with pytest.raises(AdapterError, match="qa-lora learns the scale of its own that a quantized group stores"):
        inject(loaded.model, AdapterSpec("qa-lora", adapt="scale", k_quants="in-place"))
    assert inject(loaded.model, AdapterSpec("qa-lora", adapt="scale")).promoted.codecs


@adapts
def test_scales_are_not_exported_as_lora(adapted: Callable[..., LoadedModel], adapt: str) -> None:
    with pytest.raises(AdapterError, match="fold it into the file instead"):
        lora_pairs(adapted(adapt))


def test_zero_update_folds_to_the_same_bytes(adapted: Callable[..., LoadedModel]) -> None:
    loaded = adapted("both", size=0.0)
    layers = dict(adapted_layers(loaded.model))
    for result in fold(loaded.model):
        assert torch.equal(result.weight.blocks, layers[result.name].base.blocks)
        assert (result.kept, result.error_steps) == (1.0, 0.0)


def test_scale_beyond_float16_is_refused(adapted: Callable[..., LoadedModel]) -> None:
    loaded = adapted("scale", r="full")
    layer = dict(adapted_layers(loaded.model))["model.layers.1.mlp.up_proj"]
    with torch.no_grad():
        layer.adapter.scale_delta[3, 1] = 1e9
    with pytest.raises(FoldError, match=r"1\.mlp\.up_proj: an offset or scale is beyond float16"):
        fold(loaded.model)
    with pytest.raises(FoldError, match="beyond float16"):
        requantize(loaded.model, "Q4_1")


def test_scales_are_for_qa_lora() -> None:
    with pytest.raises(ConfigError, match=r"adapt means nothing to lora; .* --method qa-lora"):
        AdapterSpec("lora", adapt="both")
    with pytest.raises(ConfigError, match="offset, scale and both are known"):
        AdapterSpec("qa-lora", adapt="codes")  # type: ignore[arg-type]


def test_with_scale_refuses_a_format_without_one() -> None:
    weight = QuantizedWeight("Q6_K", (1, 256), torch.zeros(1, 1, 210, dtype=torch.uint8))
    with pytest.raises(ValueError, match="Q6_K"):
        weight.format.with_scale(weight.blocks, torch.zeros(1, 16))


@pytest.mark.parametrize("adapt", ["offset", "scale", "both"])
def test_parameters_computed_once_give_the_same_gradients(adapted: Callable[..., LoadedModel], adapt: str) -> None:
    """Two backward passes: the gradients are as if each had computed offsets and scales anew; nothing stays."""
    grads = []
    for once in (contextlib.nullcontext, parameters_once):
        model = adapted(adapt).model
        with once(model):
            for seed in (1, 2):
                model(tiny_ids(9, seed=seed)).logits.square().mean().backward()
        grads.append({key: value.grad for key, value in adapter_state(model).items()})
        assert all(layer._once is None for _, layer in adapted_layers(model))
    for key, expected in grads[0].items():
        torch.testing.assert_close(grads[1][key], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
