"""Ranks that move: importance, schedule and choice are those of PEFT's AdaLoRA, and the budget goes where it pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.adapters.adapt import adapt
from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.lora import LoRA
from lorafold.adapters.ranks import MovingRanks, Schedule
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, ConfigError

SPEC = AdapterSpec("lora", r=4, target_r=2, target_modules=("first", "second", "third"))


class Branches(nn.Module):
    """Three layers side by side, none of which can do the work of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(12, 10), nn.Linear(8, 10), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of their outputs, each for its own part of the input [n, 32]."""
        a, b, c = x.split([12, 8, 12], -1)
        return self.first(a) + self.second(b) + self.third(c)


def moving(spec: AdapterSpec = SPEC, steps: int = 20) -> tuple[nn.Module, MovingRanks, dict[str, LoRA]]:
    torch.manual_seed(0)
    model = Branches()
    adapt(model, spec.begun)
    ranks = MovingRanks(model, spec, steps)
    return model, ranks, {path: layer.adapter for path, layer in adapted_layers(model)}  # type: ignore[misc]


@pytest.mark.parametrize(("tinit", "tfinal", "delta_t"), [(0, 0, 1), (3, 7, 2), (5, 0, 4), (0, 19, 3)])
def test_the_schedule_is_that_of_peft(tinit: int, tfinal: int, delta_t: int) -> None:
    peft = pytest.importorskip("peft")
    options = {"tinit": tinit, "tfinal": tfinal, "deltaT": delta_t, "total_step": 20}
    config = peft.AdaLoraConfig(init_r=12, target_r=4, target_modules=list(SPEC.target_modules), **options)
    theirs = peft.get_peft_model(Branches(), config).base_model.rankallocator
    schedule = Schedule(20, 36, 12, tinit, tfinal, delta_t)
    for step in range(1, 20):
        assert (schedule.budget(step), schedule.decides(step)) == theirs.budget_schedule(step)
    assert schedule.budget(20) == 12
    assert schedule.decides(20)  # also where PEFT's delta_t would let the run end with too many


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_importance_and_choice_are_those_of_peft() -> None:
    """PEFT's P diag(E) Q with E = 1 is our B A: after five steps the same importance and the same ranks.

    Float32 on both sides, with sums of at most twelve numbers in another order.
    """
    peft = pytest.importorskip("peft")
    _, ranks, ours = moving()
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=20, target_modules=list(ours))
    model = peft.get_peft_model(Branches(), config)
    theirs = model.base_model.rankallocator
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for step in range(1, 6):
        x, y = draw(16, 32), draw(16, 10)
        for path, adapter in ours.items():
            layer = model.base_model.model.get_submodule(path)
            a, b = adapter.learned()
            values = draw(*a.shape), draw(*b.shape), torch.ones(4, 1)
            for p, value in zip(("lora_A", "lora_B", "lora_E"), values, strict=True):
                getattr(layer, p)["default"].data = value.clone()
            a.data, b.data = values[0], values[1]
        model.zero_grad()
        (model(x) - y).square().mean().backward()
        theirs.update_ipt(model)
        for path, adapter in ours.items():
            layer = model.base_model.model.get_submodule(path)
            for p, parameter in zip(("lora_A", "lora_B"), adapter.learned(), strict=True):
                parameter.grad = getattr(layer, p)["default"].grad.clone()
        ranks.observe(step)
    found = theirs.mask_to_budget(model, 7)
    wanted = {key.split(".lora_E")[0].removeprefix("base_model.model."): value for key, value in found.items()}
    assert {path: keep.tolist() for path, keep in ranks.kept(7).items()} == wanted
    for path, values in ranks.importance().items():
        parts = [theirs._element_score(f"base_model.model.{path}.lora_{p}.default") for p in "EAB"]
        expected = parts[0].flatten() + parts[1].mean(1) + parts[2].mean(0)
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)


def test_what_stands_for_the_singular_value_is_its_derivative() -> None:
    """Of a loss of W + s sum e_k b_k a_k at e = 1, in float64 and with dense weights."""
    model, ranks, ours = moving()
    x = torch.randn(16, 32)
    for adapter in ours.values():
        nn.init.normal_(adapter.learned()[1])
    model(x).square().mean().backward()
    parts = dict(zip(ours, x.double().split([12, 8, 12], -1), strict=True))
    e = {path: torch.ones(4, dtype=torch.float64, requires_grad=True) for path in ours}
    y = torch.zeros(16, 10, dtype=torch.float64)
    for path, adapter in ours.items():
        a, b = (w.detach().double() for w in adapter.learned())
        base = adapter.site.base
        weight = base.weight.double() + adapter.scaling * (b * e[path]) @ a
        y = y + parts[path] @ weight.T + base.bias.double()
    y.square().mean().backward()
    for path, values in e.items():
        assert values.grad is not None
        # float32 sums of 12 numbers of which the largest are of size one
        torch.testing.assert_close(ranks._products()[f"{path}.E"].double(), values.grad.abs(), atol=1e-5, rtol=1e-4)


def test_the_budget_goes_to_the_layer_that_matters() -> None:
    """Three layers of rank 4 fall to 3 ranks in all; what is to be learned is of rank 3 and lies in the second."""
    torch.manual_seed(1)
    spec = AdapterSpec("lora", r=4, target_r=1, target_modules=SPEC.target_modules)
    model, ranks, ours = moving(spec, 200)
    missing = torch.randn(10, 3) @ torch.randn(3, 8) / 3
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0)
    base = Branches()
    base.load_state_dict({n.replace(".base", ""): p for n, p in model.state_dict().items() if "adapters" not in n})
    base.second.weight.data += missing
    for step in range(1, 201):
        x = torch.randn(32, 32)
        loss = (model(x) - base(x)).square().mean()
        loss.backward()
        ranks.observe(step)
        optimizer.step()
        optimizer.zero_grad()
        ranks.prune(step)
        of_each = [int(adapter.learned()[1].any(0).sum()) for adapter in ours.values()]
        if ranks.schedule.decides(step):
            assert sum(of_each) == ranks.schedule.budget(step)
    x = torch.randn(32, 32)
    before = model(x)
    found = ranks.cut()
    assert found["second"] >= 3
    assert sum(found.values()) == 3
    assert isinstance(model.first, nn.Linear)  # a layer without ranks is what it was
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=0)  # what is cut out was zero: float32 sums
    assert (model(x) - base(x)).square().mean() < 1e-2 * missing.square().mean()


def test_equal_ranks_are_shared_out_among_layers() -> None:
    _, ranks, _ = moving()
    assert [int(keep.sum()) for keep in ranks.kept(7).values()] == [3, 2, 2]


def test_what_is_known_of_importance_goes_to_another_process() -> None:
    model, ranks, ours = moving()
    for adapter in ours.values():
        nn.init.normal_(adapter.learned()[1])
    model(torch.randn(4, 32)).square().mean().backward()
    ranks.observe(1)
    _, other, _ = moving()
    other.restore({name: value.clone() for name, value in ranks.state().items()})
    for path, values in ranks.importance().items():
        assert values.any()
        assert torch.equal(other.importance()[path], values)
    with pytest.raises(ValueError, match="other layers or ranks"):
        moving(AdapterSpec("lora", r=5, target_r=2, target_modules=("first",)))[1].restore(ranks.state())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "qa-lora"}, "target_r means nothing to qa-lora"),
        ({"method": "vera"}, "target_r means nothing to vera"),
        ({"target_r": 0}, "target_r is 0"),
        ({"target_r": 8}, "ranks fall from r"),
        ({"target_r": None, "tinit": 3, "beta1": 0.5}, "tinit is about ranks that move"),
        ({"tinit": -1, "tfinal": 2.5}, "tfinal is 2.5"),
        ({"beta1": 1.0, "beta2": 0}, "beta2 is 0"),
        ({"use_dora": True}, "could not be left"),
        ({"init_lora_weights": "eva"}, "shares out the ranks itself"),
        ({"init_lora_weights": "pissa"}, "nothing only together"),
        ({"target_parameters": ("x",)}, "experts share one rank"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdapterSpec(**{"method": "lora", "r": 8, "target_r": 2, **options})


def test_what_is_only_known_of_the_model() -> None:
    with pytest.raises(AdapterError, match="lorafold train"):
        adapt(Branches(), SPEC)
    with pytest.raises(ConfigError, match=r"tinit \(12\) and tfinal \(8\) leave none of the run's 20 steps"):
        moving(AdapterSpec("lora", r=4, target_r=2, tinit=12, tfinal=8, target_modules=("first",)))
    few = replace(SPEC, rank_pattern={"first": 1, "second": 1})
    with pytest.raises(ConfigError, match="for 6 ranks in all, and the layers begin with 6"):
        moving(few)
    model = nn.Sequential(nn.Conv1d(4, 4, 1))
    adapt(model, AdapterSpec("lora", r=4, target_modules=("0",)))
    with pytest.raises(AdapterError, match="linear layers and embeddings, and 0 is neither"):
        MovingRanks(model, AdapterSpec("lora", r=4, target_r=2), 20)
