"""Embedding and head with one weight: one update of both is PEFT's, one of either alone takes them apart on merging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lorafold.adapters.adapt import adapt, merged, unload, unmerged
from lorafold.adapters.adapted import adapter_names, carriers, delete_adapter, set_active
from lorafold.adapters.inject import adapter_state, inject
from lorafold.adapters.tied import tied_pair
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.errors import AdapterError
from lorafold.evals.loss import pack_loss
from lorafold.models.adapter_files import load_adapter, read_spec, save_adapter
from lorafold.models.load import load
from tests.practice import row_losses, same_logits, tiny_folder, token_rows
from tests.tiny import tiny_ids, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of weights with one name more

EXACT = 1e-5  # both compute in float32, with sums in other orders
NAMES = (("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head"))
CASES = [(names, shared, whole) for names in NAMES for shared in (True, False) for whole in (False, True)]
by_case = pytest.mark.parametrize(
    ("theirs", "case"),
    [(case, case) for case in CASES],
    indirect=["theirs"],
    ids=[f"{'+'.join(names)}-{shared}-{whole}" for names, shared, whole in CASES],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("folder"))


def options_of(names: tuple[str, ...], shared: bool, whole: bool) -> dict[str, Any]:
    """Options that ours and PEFT's configurations have by the same names."""
    where = (
        {"target_modules": ["q_proj"], "modules_to_save": [*names]} if whole else {"target_modules": ["q_proj", *names]}
    )
    return {"r": 2, "lora_alpha": 4, "ensure_weight_tying": shared, **where}


def spec_of(names: tuple[str, ...], shared: bool, whole: bool = False) -> AdapterSpec:
    values = options_of(names, shared, whole).items()
    return AdapterSpec("lora", **{k: tuple(v) if isinstance(v, list) else v for k, v in values})


@pytest.fixture
def theirs(request: pytest.FixtureRequest) -> Any:
    """PEFT's model of a case, with random numbers in all that is trained."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options_of(*request.param))
    model = peft.get_peft_model(tiny_model("llama", "F32"), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def spread(model: nn.Module, name: str = "default") -> None:
    """Random numbers in everything an adapter has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_state(model, name).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(tiny_ids(20)).logits


@by_case
def test_files_go_both_ways(theirs: Any, case: Any, folder: Path, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load(folder)
    load_adapter(loaded, tmp_path / "theirs")
    same_logits(loaded.model, theirs, EXACT)
    spec, _ = read_spec(tmp_path / "theirs")
    assert spec.ensure_weight_tying == case[1]
    save_adapter(tmp_path / "ours", loaded, spec)
    again = peft.PeftModel.from_pretrained(tiny_model("llama", "F32"), tmp_path / "ours")
    same_logits(again, theirs, EXACT)


@by_case
def test_losses_and_gradients_are_pefts(theirs: Any, case: Any, folder: Path, tmp_path: Path) -> None:
    """Of shared parameters PEFT has two, in one place of memory, each with the gradient of its use."""
    theirs.save_pretrained(tmp_path / "adapter")
    loaded, rows = load(folder), token_rows(4)
    load_adapter(loaded, tmp_path / "adapter")
    state = adapter_state(loaded.model)
    for parameter in state.values():
        parameter.requires_grad_()
    ours, other = pack_loss(loaded, pack(rows, 16)), row_losses(theirs, rows)
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=0)
    count = sum(sum(row.supervised) for row in rows)
    (ours / count).backward()
    (other / count).backward()
    wanted = gradients(theirs)
    if case[1] and not case[2]:
        for end, head in (("A", "B"), ("B", "A")):
            wanted[f"model.embed_tokens.lora_embedding_{end}"] += wanted.pop(f"lm_head.lora_{head}").T
    assert {key.removesuffix(".change") for key in state} == wanted.keys()
    for key, parameter in state.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted[key.removesuffix(".change")], atol=1e-6, rtol=1e-4)


def gradients(theirs: Any) -> dict[str, Tensor]:
    """Gradients of PEFT's parameters by our names."""
    found = {}
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            key = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            key = key.replace(".default", "")
            found[key if "modules_to_save" in name else key.removesuffix(".weight")] = parameter.grad
    return found


@pytest.mark.parametrize("whole", [False, True], ids=["lora", "whole"])
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("names", NAMES, ids="+".join)
def test_merged_weights_compute_what_the_adapter_did(
    names: tuple[str, ...], shared: bool, whole: bool, folder: Path, tmp_path: Path
) -> None:
    """PEFT is no oracle here: it adds an update of tied weights to both uses, a shared one twice (0.21)."""
    model = load(folder).model
    base = model.model.embed_tokens.weight.clone()  # type: ignore[union-attr]
    adapt(model, spec_of(names, shared, whole))
    spread(model)
    wanted = logits(model)
    with unmerged(model):
        plain = logits(model)
    assert (wanted - plain).abs().max() > 0.1
    with merged(model):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)  # (W + BA) x and W x + BA x
    torch.testing.assert_close(logits(model), wanted, atol=0, rtol=0)
    assert tied_pair(model) == ("model.embed_tokens", "lm_head")
    unload(model, merge=True)
    torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    assert model.config.tie_word_embeddings == shared
    assert (tied_pair(model) is not None) == shared
    if not shared and len(names) == 1:
        other = model.lm_head if names[0] == "embed_tokens" else model.model.embed_tokens  # type: ignore[union-attr]
        assert torch.equal(other.weight, base)  # type: ignore[union-attr]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), wanted, atol=1e-4, rtol=0)


def test_two_adapters_may_share_differently(folder: Path) -> None:
    model = load(folder).model
    adapt(model, spec_of(("embed_tokens",), True), "both")
    adapt(model, spec_of(("lm_head",), False), "one")
    for name in ("both", "one"):
        spread(model, name)
    set_active(model, ["both", "one"])
    wanted = logits(model)
    with merged(model):
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=0)
    delete_adapter(model, "both")
    assert adapter_names(model) == ["one"]
    assert [path for path, _ in carriers(model) if "layers" not in path] == ["lm_head"]


@pytest.mark.parametrize("types", ["F32", "Q8_0", "Q4_1"])
def test_a_packed_embedding_is_shared_as_a_dense_one(types: str, tiny_file: Callable[..., Path], folder: Path) -> None:
    """The oracle is the dense model with the weights that the file decodes to."""
    packed, dense = load(tiny_file("gemma3", types)), tiny_model("gemma3", types)
    for model in (packed.model, dense):
        adapt(model, spec_of(("lm_head",), True))
        spread(model)
    assert adapter_state(packed.model).keys() == adapter_state(dense).keys()
    torch.testing.assert_close(logits(packed.model), logits(dense), atol=1e-4, rtol=0)  # as for the bare models


def test_what_cannot_be_shared_is_refused(folder: Path) -> None:
    untied = AutoModelForCausalLM.from_config(tiny_model("llama", tied=False).config)
    with pytest.raises(AdapterError, match="do not have one weight"):
        adapt(untied, spec_of(("embed_tokens",), True))
    model = load(folder).model
    with pytest.raises(AdapterError, match="neither is named"):
        adapt(model, AdapterSpec("lora", ensure_weight_tying=True))
    with pytest.raises(AdapterError, match="use_dora learns a length for each column"):
        adapt(model, AdapterSpec("lora", target_modules=("lm_head",), ensure_weight_tying=True, use_dora=True))
    assert not carriers(model)
    adapt(model, spec_of(("embed_tokens",), False, whole=True), "one")
    with pytest.raises(AdapterError, match="already has an adapter on one of its uses"):
        inject(model, spec_of(("embed_tokens",), True, whole=True), "two")
    assert adapter_names(model) == ["one"]


@pytest.mark.parametrize("adapt", ["offset", "scale", "both"])
def test_offsets_and_scales_of_both_uses_have_the_gradients_of_one_dense_weight(
    adapt: str, tiny_file: Callable[..., Path]
) -> None:
    """The oracle is transformers' own tied weight: dOffset is its gradient, of both uses, summed over groups."""
    loaded, dense, ids = load(tiny_file("gemma3", "Q4_1")), tiny_model("gemma3", "Q4_1"), tiny_ids(12)
    spec = AdapterSpec("qa-lora", r="full", target_modules=("embed_tokens",), adapt=adapt, ensure_weight_tying=True)
    adapt_result = inject(loaded.model, spec)
    assert adapt_result.apart is None
    weight = dense.model.embed_tokens.weight.requires_grad_()  # type: ignore[union-attr]
    for model in (loaded.model, dense):
        model(ids).logits.square().mean().backward()
    assert weight.grad is not None
    table = loaded.model.model.embed_tokens.base.packed  # type: ignore[union-attr]
    grouped = weight.grad.unflatten(1, (-1, table.format.group_size))
    step = table.format.scale(table.blocks)
    wanted = {
        "offset_delta": grouped.sum(-1),
        "scale_delta": step * (grouped * table.format.levels(table.blocks)).sum(-1),
    }
    state = adapter_state(loaded.model)
    assert len(state) == (2 if adapt == "both" else 1)
    for key, parameter in state.items():
        assert parameter.grad is not None
        other = wanted[key.rpartition(".")[2]]
        torch.testing.assert_close(parameter.grad, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)


def test_only_embeddings_with_offsets_take_a_group_adapter(tiny_file: Callable[..., Path]) -> None:
    model = load(tiny_file("llama", "Q8_0")).model
    with pytest.raises(AdapterError, match=r"Q8_0: 1 layers \(model.embed_tokens\)"):
        inject(model, AdapterSpec("qa-lora", target_modules=("all-linear", "embed_tokens"), ensure_weight_tying=True))
