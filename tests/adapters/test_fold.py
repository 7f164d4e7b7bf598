"""Folding: exact for offsets, refused where float16 cannot hold the update, lossy by name only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import LEAST_KEPT, fold, kept_fraction, merged_weight, requantize
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.errors import FoldError
from lorafold.models.load import LoadedModel, load
from tests.practice import lora_like, tiny_folder
from tests.tiny import tiny_gguf

Adapted = Callable[..., LoadedModel]


@pytest.fixture
def adapted(tiny_file: Callable[..., Path]) -> Adapted:
    def make(spec: AdapterSpec, types: str = "Q4_1", scale: float = 0.3) -> LoadedModel:
        loaded = load(tiny_file("llama", types))
        inject(loaded.model, spec)
        lora_like(loaded.model, scale=scale)
        return loaded

    return make


@pytest.mark.parametrize("types", ["Q4_1", "Q5_1", "Q4_0", "Q5_0"])
@pytest.mark.parametrize("r", [4, "full"])
def test_folded_blocks_decode_to_the_training_weights(adapted: Adapted, r: int, types: str) -> None:
    """Difference 0 in both compute types, and codes and scales as they were."""
    loaded = adapted(AdapterSpec("qa-lora", r=r), types)
    layers = dict(adapted_layers(loaded.model))
    folds = fold(loaded.model)
    assert [f.name for f in folds] == list(layers)
    for result in folds:
        layer = layers[result.name]
        base, codec = layer.base.packed, result.weight.format
        for dtype in (torch.float32, torch.bfloat16):
            with torch.no_grad():
                assert torch.equal(result.weight.decode(dtype), base.decode(dtype, layer.offset()))
        assert not torch.equal(result.weight.decode(), base.decode())
        changed = (result.weight.blocks != base.blocks).any(0).any(0)
        assert set(changed.nonzero().flatten().tolist()) <= {2, 3}
        assert torch.equal(codec.scale(result.weight.blocks), codec.scale(base.blocks))
        assert result.kept == pytest.approx(1, abs=1e-3)  # rounding errors of 2^-11 cancel over a layer
        # an offset of below 2 is rounded by at most 2^-11; scales are 2 x 0.45 / 15 (31) and more
        assert 0 < result.error_steps < 0.05


def test_folding_leaves_the_model_as_it_is(adapted: Adapted) -> None:
    loaded = adapted(AdapterSpec("qa-lora", r=4))
    before = {name: layer.base.blocks.clone() for name, layer in adapted_layers(loaded.model)}
    fold(loaded.model)
    for name, layer in adapted_layers(loaded.model):
        assert torch.equal(layer.base.blocks, before[name])
        assert layer.adapter is not None


def test_zero_adapter_folds_to_the_same_bytes(adapted: Adapted) -> None:
    loaded = adapted(AdapterSpec("qa-lora", r=4), scale=0.0)
    layers = dict(adapted_layers(loaded.model))
    for result in fold(loaded.model):
        assert torch.equal(result.weight.blocks, layers[result.name].base.blocks)
        assert (result.kept, result.error_steps) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("realized", "wanted", "expected"),
    [
        ([1.0, 2.0], [1.0, 2.0], 1.0),
        ([0.0, 0.0], [1.0, 2.0], 0.0),
        ([0.5, 1.0], [1.0, 2.0], 0.5),
        ([2.0, -1.0], [1.0, 2.0], 0.0),
        ([-1.0, -2.0], [1.0, 2.0], -1.0),
        ([3.0, 3.0], [0.0, 0.0], 1.0),
        ([1e-30, 0.0], [1e-30, 0.0], 1.0),
    ],
)
def test_kept_fraction(realized: list[float], wanted: list[float], expected: float) -> None:
    """The last: squares that float32 could not hold."""
    assert kept_fraction(torch.tensor(realized), torch.tensor(wanted)) == pytest.approx(expected)


def test_update_that_float16_swallows_is_refused(adapted: Adapted) -> None:
    """Offsets of about 0.3 have steps of 2^-12: an update of 3e-5 is lost almost everywhere."""
    loaded = adapted(AdapterSpec("qa-lora", r="full", target_modules=("q_proj",)), scale=3e-5)
    with pytest.raises(FoldError) as caught:
        fold(loaded.model)
    for i in range(3):
        assert f"model.layers.{i}.self_attn.q_proj: Q4_1 keeps only" in str(caught.value)
    assert "train longer" in str(caught.value)


def test_bound_is_where_it_is_said_to_be(adapted: Adapted) -> None:
    """The smaller the update the less is kept; the refusal sets in at 99 %."""
    seen = []
    for scale in (1e-2, 1e-3, 5e-4, 3e-4, 2e-4, 1e-4, 3e-5):
        loaded = adapted(AdapterSpec("qa-lora", r="full", target_modules=("1.self_attn.q_proj",)), scale=scale)
        (layer,) = (layer for _, layer in adapted_layers(loaded.model))
        with torch.no_grad():
            realized = layer.offset() - layer.base.packed.format.offset(layer.base.blocks)
            kept = kept_fraction(realized, layer.adapter.offset_update())
        try:
            fold(loaded.model)
            refused = False
        except FoldError:
            refused = True
        assert refused == (kept < LEAST_KEPT)
        seen.append(refused)
    assert seen[0] is False
    assert seen[-1] is True


@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_offset_beyond_float16_is_refused(adapted: Adapted, value: float) -> None:
    loaded = adapted(AdapterSpec("qa-lora", r="full", target_modules=("q_proj", "k_proj")))
    layers = dict(adapted_layers(loaded.model))
    with torch.no_grad():
        layers["model.layers.1.self_attn.k_proj"].adapter.offset_delta[3, 1] = value
    with pytest.raises(
        FoldError, match=r"model\.layers\.1\.self_attn\.k_proj: an offset or scale is beyond float16"
    ) as caught:
        fold(loaded.model)
    assert str(caught.value).count("model.layers") == 1
    assert "train longer" not in str(caught.value)
    with pytest.raises(FoldError, match="beyond float16"):
        requantize(loaded.model, "Q4_1")


def test_lora_has_no_exact_place(adapted: Adapted) -> None:
    with pytest.raises(FoldError, match="--to gguf-adapter"):
        fold(adapted(AdapterSpec("lora", r=4)).model)


@pytest.mark.parametrize("types", ["Q4_1", "Q4_0", "Q8_0", "F16"])
@pytest.mark.parametrize("target", ["Q4_1", "Q8_0"])
def test_lossy_merge_says_what_it_keeps(adapted: Adapted, types: str, target: str) -> None:
    """Against numbers computed from the decoded result; 8 bits keep much more than 4."""
    loaded = adapted(AdapterSpec("lora", r=4, target_modules=("up_proj",)), types, scale=0.05)
    layers = dict(adapted_layers(loaded.model))
    for result in requantize(loaded.model, target):
        layer = layers[result.name]
        delta = layer.adapter.delta().detach()
        base = layer.base.weight if types == "F16" else layer.base.packed.decode()
        torch.testing.assert_close(merged_weight(layer), base + delta)
        assert result.weight.codec == target
        realized = result.weight.decode() - base
        assert result.kept == pytest.approx(float((realized * delta).sum() / delta.square().sum()), rel=1e-4)
        steps = (result.weight.decode() - base - delta).abs().unflatten(1, (-1, 32)).amax(-1)
        steps /= result.weight.format.scale(result.weight.blocks).abs()
        assert result.error_steps == pytest.approx(float(steps.max()), rel=1e-4)
        # half a step, and what rounding the scale to float16 does to the largest code: 127 x 2^-11
        assert target != "Q8_0" or 0.4 < result.error_steps <= 0.5 + 127 / 2048
        assert abs(1 - result.kept) < (0.02 if target == "Q8_0" else 0.5)


def test_lossy_merge_leaves_exact_places_exact(tmp_path: Path) -> None:
    """Of a mixed file only the matrices that change their format are quantized again."""
    types = {"ffn_up": "Q5_1", "token_embd": "F16", "": "Q4_1"}
    loaded = load(tiny_gguf(tmp_path, "llama", types))
    inject(loaded.model, AdapterSpec("qa-lora", r=4))
    lora_like(loaded.model, scale=0.3)
    exact = {result.name: result for result in fold(loaded.model)}
    for result in requantize(loaded.model, "Q4_1"):
        assert result.weight.codec == "Q4_1"
        if exact[result.name].weight.codec == "Q4_1":
            assert torch.equal(result.weight.blocks, exact[result.name].weight.blocks)
        else:
            assert result.error_steps > 0.3  # 5 bits into 4: up to half a step


def test_lossy_merge_keeps_each_format_unless_told(adapted: Adapted, tmp_path: Path) -> None:
    folds = requantize(adapted(AdapterSpec("lora", r=4), "Q5_0").model, None)
    assert {result.weight.codec for result in folds} == {"Q5_0"}
    loaded = load(tiny_folder(tmp_path))
    inject(loaded.model, AdapterSpec("lora", r=4))
    assert requantize(loaded.model, None) == []  # dense: they need not be quantized
