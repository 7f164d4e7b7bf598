"""Which layers are meant, and what is done to them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import adapter_state, inject
from lorafold.adapters.targets import find_targets, linear_layers
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.models.load import LoadedModel, load
from tests.practice import lora_like, same_logits
from tests.tiny import tiny_gguf

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
PARTS = [f"self_attn.{name}" for name in ATTENTION] + [f"mlp.{name}" for name in MLP]
ALL = [f"model.layers.{i}.{part}" for i in range(3) for part in PARTS]


@pytest.fixture(scope="module")
def loaded(tiny_file: Callable[..., Path]) -> LoadedModel:
    return load(tiny_file("llama", "Q4_1", tied=False))


def named(pattern: str) -> list[str]:
    return [name for name in ALL if re.search(pattern, name)]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), ALL),
        (("q_proj",), named("q_proj")),
        (("q_proj", "up_proj"), named("q_proj|up_proj")),
        (("mlp.up_proj",), named("up_proj")),
        (("1.mlp.up_proj",), ["model.layers.1.mlp.up_proj"]),
        (("model.layers.2.self_attn.o_proj",), ["model.layers.2.self_attn.o_proj"]),
        ((r".*\.[02]\.self_attn\.(q|k)_proj",), named(r"\.[02]\..*[qk]_proj")),
        (("lm_head",), ["lm_head"]),
        (("all-linear", "lm_head"), [*ALL, "lm_head"]),
    ],
)
def test_targets(loaded: LoadedModel, targets: tuple[str, ...], expected: list[str]) -> None:
    """In model order, whatever the order of the targets."""
    assert find_targets(loaded.model, AdapterSpec(target_modules=targets)) == expected
    assert find_targets(loaded.model, AdapterSpec(target_modules=targets[::-1])) == expected


@pytest.mark.parametrize(
    ("excluded", "expected"),
    [
        (("q_proj",), [name for name in ALL if "q_proj" not in name]),
        (("mlp.down_proj", "1.self_attn.q_proj"), [n for n in ALL if "down" not in n and "1.self_attn.q" not in n]),
        ((r".*self_attn.*",), named("mlp")),
    ],
)
def test_exclusions(loaded: LoadedModel, excluded: tuple[str, ...], expected: list[str]) -> None:
    assert find_targets(loaded.model, AdapterSpec(exclude_modules=excluded)) == expected


@pytest.mark.parametrize("target", ["proj", "_proj", "q_proj.", "self_attn", "embed_token", "model.layers"])
def test_part_of_a_name_is_no_target(loaded: LoadedModel, target: str) -> None:
    with pytest.raises(AdapterError, match="matches no layer"):
        find_targets(loaded.model, AdapterSpec(target_modules=(target,)))


def test_regular_expression_counts_only_alone(loaded: LoadedModel) -> None:
    """Among several targets each is a name, as in PEFT."""
    with pytest.raises(AdapterError, match=r"'\.\*q_proj' matches no layer"):
        find_targets(loaded.model, AdapterSpec(target_modules=(".*q_proj", "v_proj")))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        # q and o [64, 64], k and v [32, 64], gate and up [96, 64], down [64, 96]: r (in + out)
        (AdapterSpec("lora", r=4), 3 * 4 * (2 * 128 + 2 * 96 + 3 * 160)),
        (AdapterSpec("qa-lora", r=4), 3 * 4 * (2 * 66 + 2 * 34 + 2 * 98 + 67)),
        (AdapterSpec("qa-lora", r="full"), 3 * (2 * 128 + 2 * 64 + 2 * 192 + 192)),
        (AdapterSpec("lora", r=8, target_modules=("q_proj", "v_proj")), 3 * 8 * (128 + 96)),
    ],
)
def test_only_the_adapter_is_trained(tiny_file: Callable[..., Path], spec: AdapterSpec, expected: int) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    injection = inject(loaded.model, spec)
    parameters = {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert injection.trainable == sum(p.numel() for p in parameters.values()) == expected
    assert len(parameters) == len(adapter_state(loaded.model))
    assert injection.modules == [name for name, _ in adapted_layers(loaded.model)]
    assert f"{expected:,} trainable parameters in {len(injection.modules)} layers" in injection.describe()
    same_logits(loaded.model, load(tiny_file("llama", "Q4_1")).model, atol=0.0)


def test_promotion_changes_no_weight_and_is_reported(tmp_path: Path) -> None:
    types = {"attn_q": "Q4_0", "attn_k": "Q5_0", "token_embd": "Q4_0", "": "Q4_1"}
    path = tiny_gguf(tmp_path, "llama", types)
    loaded = load(path)
    injection = inject(loaded.model, AdapterSpec("qa-lora"))
    promoted = dict.fromkeys(named("q_proj"), ("Q4_0", "Q4_1")) | dict.fromkeys(named("k_proj"), ("Q5_0", "Q5_1"))
    assert injection.promoted.codecs == promoted
    assert injection.promoted.added_bytes == 3 * 2 * (64 * 2 + 32 * 2)  # two bytes a block
    text = injection.describe()
    assert "3 matrices promoted from Q4_0 to Q4_1" in text
    assert "3 matrices promoted from Q5_0 to Q5_1" in text
    assert "1,152 bytes more on disk" in text
    layers, before = linear_layers(loaded.model), linear_layers(load(path).model)
    for name, layer in layers.items():
        assert torch.equal(layer.packed.decode(), before[name].packed.decode())
    assert layers["lm_head"].codec == "Q4_0"  # not a target


def test_lora_promotes_nothing(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_0"))
    injection = inject(loaded.model, AdapterSpec("lora"))
    assert not injection.promoted.codecs
    assert {layer.base.codec for _, layer in adapted_layers(loaded.model)} == {"Q4_0"}


def test_refusal_leaves_the_model_alone(tmp_path: Path) -> None:
    """Targets that can be promoted stand before the one that cannot."""
    loaded = load(tiny_gguf(tmp_path, "llama", {"2.ffn_down": "Q8_0", "": "Q4_0"}))
    with pytest.raises(AdapterError, match=r"Q8_0: 1 layers \(model\.layers\.2\.mlp\.down_proj\)"):
        inject(loaded.model, AdapterSpec("qa-lora", target_modules=("up_proj", "down_proj")))
    assert not list(adapted_layers(loaded.model))
    assert {layer.codec for layer in linear_layers(loaded.model).values()} == {"Q4_0", "Q8_0"}


def test_all_linear_leaves_frozen_what_has_no_offset(tmp_path: Path) -> None:
    loaded = load(tiny_gguf(tmp_path, "llama", {"attn_v": "Q8_0", "ffn_down": "F16", "": "Q4_1"}))
    injection = inject(loaded.model, AdapterSpec("qa-lora"))
    assert len(injection.modules) == 3 * 5
    assert injection.frozen == dict.fromkeys(named("v_proj"), "Q8_0") | dict.fromkeys(
        [f"model.layers.{i}.mlp.down_proj" for i in range(3)], "float32"
    )
    assert {path for path, _ in adapted_layers(loaded.model)} == set(injection.modules)
    assert "3 matrices of type Q8_0 stay as they are" in injection.describe()


def test_second_adapter_needs_another_name(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    inject(loaded.model, AdapterSpec("qa-lora", target_modules=("q_proj",)))
    lora_like(loaded.model)
    with pytest.raises(AdapterError, match="already carries an adapter named 'default'"):
        inject(loaded.model, AdapterSpec("lora", target_modules=("k_proj", "q_proj")))
    assert [name for name, _ in adapted_layers(loaded.model)] == named("q_proj")
    inject(loaded.model, AdapterSpec("lora", target_modules=("k_proj", "q_proj")), "second")
    assert len(adapter_state(loaded.model, "second")) == 12
    assert len(adapter_state(loaded.model)) == 6
