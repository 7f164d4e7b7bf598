"""What a stranger tried on adapters: modes, names, sharing, second adapters, other people's layers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lorafold.adapters.adapt import adapt, merged, unload, unmerged
from lorafold.adapters.adapted import carriers, delete_adapter, set_active, uses
from lorafold.adapters.inject import adapter_state, inject
from lorafold.adapters.rows import adapters_by_row
from lorafold.adapters.targets import linear_layers
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.models.adapter_files import attach_tensors, load_adapter, save_adapter
from lorafold.models.load import load
from lorafold.models.peft_config import spec_of
from lorafold.models.peft_format import stored_tensors
from tests.practice import lora_like, tiny_folder

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")


def spread(model: nn.Module, name: str = "default", scale: float = 0.5) -> None:
    """Let an adapter do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_state(model, name).values():
            parameter += scale * torch.randn(parameter.shape)


def lora(*targets: str, **options: Any) -> AdapterSpec:
    return AdapterSpec("lora", **{"r": 2, "target_modules": targets} | options)


def test_a_loaded_adapter_drops_nothing(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """The model is in evaluation mode, and so is what is put on it."""
    loaded = load(tiny_file("llama", "Q4_1"))
    spec = AdapterSpec("lora", r=2, lora_dropout=0.5)
    inject(loaded.model, spec)
    lora_like(loaded.model)
    save_adapter(tmp_path / "adapter", loaded, spec)
    again = load(tiny_file("llama", "Q4_1"))
    load_adapter(again, tmp_path / "adapter")
    assert not [name for name, module in again.model.named_modules() if module.training]
    ids = torch.randint(0, 40, (1, 9))
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, again.model(ids).logits)
    again.model.train()
    with torch.no_grad():
        assert not torch.equal(again.model(ids).logits, again.model(ids).logits)


@pytest.mark.parametrize("options", [{"modules_to_save": ("1",)}, {"bias": "all"}], ids=["modules", "bias"])
def test_a_second_adapter_trains_as_much_as_the_first(options: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    rows = [adapt(model, lora("0", **options), name).rows for name in ("one", "two")]
    assert rows[0] == rows[1]
    assert stored_tensors(model, "one").keys() == stored_tensors(model, "two").keys()


def test_the_newest_is_the_one_that_is_active() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(2, 4)
    adapt(model, lora("0", "1"), "one")
    spread(model, "one")
    adapt(model, lora("1"), "two")
    with unmerged(model):
        plain = model(x)
    torch.testing.assert_close(model(x), plain)  # two has changed nothing yet, and one has no part in it
    model(x).sum().backward()
    assert all(p.grad is None for p in adapter_state(model, "one").values())


def test_what_cannot_be_trained_whole_is_refused(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    packed = load(tiny_file("llama", "Q4_1", tied=False)).model
    with pytest.raises(AdapterError, match="embed_tokens is packed"):
        inject(packed, lora("q_proj", modules_to_save=("embed_tokens",)))
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU())
    with pytest.raises(AdapterError, match=r"(?s)1 has buffers.*2 has no parameters"):
        adapt(model, lora("0", modules_to_save=("1", "2")))
    tied = load(tiny_folder(tmp_path, tied=True)).model
    with pytest.raises(AdapterError, match="serves as embedding and as head"):
        inject(tied, lora("q_proj", target_parameters=("embed_tokens.weight",)))
    assert not carriers(packed)
    assert not carriers(model)
    assert not carriers(tied)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ("0",)}], ids=["lora", "whole"])
def test_merging_gives_one_use_of_a_shared_weight_its_own(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    model[1].weight = model[0].weight
    shared, before = model[0].weight, model[0].weight.clone()
    adapt(model, lora("2" if options else "0", **options))
    spread(model)
    y = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), y)
    assert [value for _, _, value in uses(model) if value is shared] == [shared, shared]
    unload(model, merge=True)
    torch.testing.assert_close(model(x), y)
    assert model[1].weight is shared
    assert torch.equal(shared, before)


@pytest.mark.parametrize("dora", [False, True])
def test_autocast_computes_as_in_peft(dora: bool) -> None:
    ours = nn.Sequential(nn.Linear(8, 6), nn.Tanh())
    base, x = copy.deepcopy(ours), torch.randn(3, 8)
    adapt(ours, lora("0", use_dora=dora))
    spread(ours)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=dora))
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, value in adapter_state(ours).items():
            parameters[f"base_model.model.{key}.default.weight"].copy_(value)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), theirs(x).float(), atol=0.03, rtol=0)  # bfloat16 of sums near 2
        ours(x).sum().backward()
    assert all(p.grad is not None for p in adapter_state(ours).values())


def test_dropout_with_a_start_and_lengths_is_pefts() -> None:
    """The same mask: both draw one for the input first."""
    options = {"init_lora_weights": "pissa", "use_dora": True, "lora_dropout": 0.5}
    ours = nn.Sequential(nn.Linear(16, 6))
    base, x = copy.deepcopy(ours), torch.randn(3, 16)
    adapt(ours, lora("0", **options))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, lora_alpha=4, target_modules=["0"], **options))
    parameters = dict(theirs.named_parameters())
    spread(ours)
    with torch.no_grad():
        for key, value in adapter_state(ours).items():
            parameters[f"base_model.model.{key}.default.weight"].copy_(value)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(x))
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=0)


def test_pefts_adapters_of_gpt2_are_read(tmp_path: Path) -> None:
    """PEFT writes fan_in_fan_out for its Conv1D; the tensors mean the same."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ours = GPT2LMHeadModel(config).eval()
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    written = theirs.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    assert written["fan_in_fan_out"]
    from safetensors.torch import load_file

    attach_tensors(ours, spec_of(written), written, load_file(tmp_path / "adapter_model.safetensors"))
    ids = torch.randint(0, 32, (1, 7))
    torch.testing.assert_close(ours(ids).logits, theirs.eval()(ids).logits, atol=1e-5, rtol=0)


def test_vera_without_its_matrices_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    adapt(model, AdapterSpec("vera", r=2, target_modules=("0",)))
    tensors = {k: v for k, v in stored_tensors(model, "default").items() if "vera_A" not in k and "vera_B" not in k}
    config = {"peft_type": "VERA", "r": 2, "target_modules": ["0"]}
    with pytest.raises(AdapterError, match="lacks the random matrices"):
        attach_tensors(nn.Sequential(nn.Linear(4, 5)), spec_of(config), config, tensors)


def test_rows_are_counted_and_trained_biases_come_off() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).bfloat16(), torch.randn(3, 4).bfloat16()
    plain = model(x)
    adapt(model, lora("0"), "one")
    adapt(model, lora("1", bias="all"), "two")
    spread(model, "one")
    spread(model, "two")
    with adapters_by_row(model, ["one", None, "one"]):
        y = model(x)
        with pytest.raises(AdapterError, match="3 rows, and a layer is given 2"):
            model(x[:2])
    torch.testing.assert_close(y[1], plain[1])
    assert (y[0] - plain[0]).abs().max() > 0.05
    assert all(carrier.active == ("two",) for path, carrier in carriers(model) if "two" in carrier.adapters)


def test_layers_that_do_more_than_multiply() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, x = nn.Sequential(Doubled(4, 5)), torch.randn(2, 4)
    plain, seen = model(x), []
    adapt(model, lora("0"))
    torch.testing.assert_close(model(x), plain)
    model = nn.Sequential(nn.Linear(4, 5))
    adapt(model, lora("0"))
    model[0].base.register_forward_hook(lambda *_: seen.append(1))
    model(x)
    assert seen
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    plain = encoder(x)
    adapt(encoder, lora("linear1"))
    spread(encoder)
    with torch.no_grad():
        assert (encoder(x) - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["v1.5", "keys", "", "a b"])
def test_names_that_no_module_can_have(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    with pytest.raises(AdapterError, match="cannot be named"):
        adapt(model, lora("0"), name)
    assert not carriers(model)


def test_refusals_leave_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.raises(AdapterError, match="pissa takes r = 2 directions"):
        adapt(model, lora("0", "1", init_lora_weights="pissa"))
    assert not carriers(model)
    adapt(model, lora("1"), "one")
    with pytest.raises(AdapterError, match="already carries"):
        adapt(model, lora("0", "1"), "one")
    assert [path for path, _ in carriers(model)] == ["1"]
    for root in (nn.Linear(4, 4), nn.MultiheadAttention(4, 2)):
        with pytest.raises(AdapterError, match="put it into another one"):
            adapt(root, lora("all-linear"))
    with pytest.raises(AdapterError, match="lorafold train"):
        adapt(model, lora("0", init_lora_weights="eva"), "two")


def test_a_refusal_promotes_nothing(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_0"))
    with pytest.raises(AdapterError, match="cannot be named"):
        inject(loaded.model, AdapterSpec("qa-lora", target_modules=("q_proj",)), "a b")
    assert {layer.codec for layer in linear_layers(loaded.model).values()} == {"Q4_0"}


def test_names_of_other_peoples_modules() -> None:
    model = nn.ModuleDict({"base": nn.Linear(4, 4), "base_proj": nn.Linear(4, 4), "adapters": nn.Linear(4, 4)})
    adaptation = adapt(model, lora("base", modules_to_save=("base_proj", "adapters"), bias="all"))
    assert {row[0] for row in adaptation.rows} == {
        *("base", "base.bias", "base_proj.weight", "base_proj.bias", "adapters.weight", "adapters.bias")
    }


def test_unload_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.MultiheadAttention(4, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapt(model, lora("all-linear", bias="all"))
    unload(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert pickle.dumps(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.state_dict().keys() == before.keys()
    set_active(model, None)


def test_after_the_active_adapter_is_deleted_the_one_is_active_that_peft_makes_so() -> None:
    """And of several active ones those that are left; an adapter that was not active changes nothing."""
    ours = nn.Sequential(nn.Linear(4, 4))
    theirs = peft.get_peft_model(copy.deepcopy(ours), peft.LoraConfig(r=2, target_modules=["0"]), "c")
    for name in "cab":
        adapt(ours, lora("0"), name)
        if name != "c":
            theirs.add_adapter(name, peft.LoraConfig(r=2, target_modules=["0"]))
    for wanted, deleted, left in (("c", "b", ["c"]), ("c", "c", ["a"])):
        for model, switch in ((ours, set_active), (theirs.base_model, lambda m, n: m.set_adapter(n))):
            switch(model, wanted)
        delete_adapter(ours, deleted)
        theirs.delete_adapter(deleted)
        assert list(next(c for _, c in carriers(ours)).active) == theirs.active_adapters == left
    adapt(ours, lora("0"), "z")
    set_active(ours, ["z", "a"])
    delete_adapter(ours, "a")
    assert next(c for _, c in carriers(ours)).active == ("z",)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_a_state_dict_holds_where_an_adapter_began(start: str) -> None:
    """`pissa_niter` draws random numbers, so another model begins elsewhere until it has loaded."""
    model, x = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), torch.randn(3, 8)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        adapt(one, lora("0", "2", init_lora_weights=start))
        spread(one)
    with torch.no_grad():
        twin[0].base.weight.zero_()  # type: ignore[union-attr, operator]
        for adapter in (layer.adapters["default"] for _, layer in carriers(twin)):
            adapter.start_A.zero_()  # type: ignore[union-attr]
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))


def test_a_switch_reaches_what_was_put_in_since_the_last_one() -> None:
    """And each of two copies its own layers."""
    model, part = nn.Sequential(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    for one in (model, part):
        adapt(one, lora("0"), "a")
        spread(one, "a")
        set_active(one, "a")
    twin = copy.deepcopy(model)
    set_active(twin, None)
    assert [one.active for m in (model, twin) for _, one in carriers(m)] == [("a",), ()]
    model.append(part)
    set_active(model, None)
    assert [c.active for _, c in carriers(model)] == [(), ()]
    set_active(model, "a")
    assert [c.active for _, c in carriers(model)] == [("a",), ("a",)]
    assert [c.active for _, c in carriers(twin)] == [()]
    model[0] = nn.Linear(4, 4)
    adapt(model, lora("0"), "b")
    assert [c.active for _, c in carriers(model)] == [("b",), ("b",)]


def test_a_copy_of_a_layer_that_is_adapted_in_two_ways_has_both() -> None:
    """torch gives a layer with an adapted bias its own way of being copied, and that is not its adapter's."""
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)), torch.randn(2, 4)
    adapt(model, lora("0", bias="all"))
    spread(model)
    twin = copy.deepcopy(model)
    assert [path for path, _ in carriers(twin)] == [path for path, _ in carriers(model)]
    assert torch.equal(twin(x), model(x))
    set_active(twin, None)
    assert [one.active for _, one in carriers(twin)] == [(), (), ()]


@pytest.mark.parametrize("undo", [unload, lambda model: delete_adapter(model, "default")], ids=["unload", "delete"])
def test_a_deep_copy_is_a_model_of_its_own(undo: Callable[..., object]) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 4), "layer": nn.Linear(4, 4)})
    adapt(model, lora("layer", modules_to_save=("table",)))
    copied = copy.deepcopy(model)
    undo(copied)
    assert (model["table"](torch.arange(3)) == copied["table"](torch.arange(3))).all()
    undo(model)
    assert type(model["table"]) is type(copied["table"]) is nn.Embedding


def test_a_deep_copy_takes_adapters_of_its_own() -> None:
    """Torch would give the model's layer a parametrized bias as well, and nothing that makes it."""
    model = nn.ModuleDict({"layer": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    adapt(model, AdapterSpec("lora", r=2, target_modules=("other",), target_parameters=("layer.weight",)))
    copied = copy.deepcopy(model)
    adapt(copied, AdapterSpec("lora", r=2, target_modules=("other",), bias="all"), "biases")
    x = torch.randn(3, 4)
    torch.testing.assert_close(model["layer"](x), copied["layer"](x), atol=0, rtol=0)
