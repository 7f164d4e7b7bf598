"""Memory by choice: what is planned, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from lorafold.adapters.adapted import parameters_once
from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.tokens import Tokens
from lorafold.errors import ConfigError, DataError, TrainingError
from lorafold.evals.loss import pack_loss, packed
from lorafold.files import parse_bytes
from lorafold.models.load import LoadedModel, load
from lorafold.train import budget
from lorafold.train.budget import Plan, pass_over, plan_within, trial_of_packs
from lorafold.train.loop import plan_step, train_steps

ROWS = [Tokens(list(range(2, 2 + n)), [False] + [True] * (n - 1), i) for i, n in enumerate([20, 90, 50, 30])]


@pytest.fixture
def loaded(tiny_file: Callable[..., Path]) -> LoadedModel:
    model = load(tiny_file("llama", "Q4_1"))
    torch.manual_seed(0)
    inject(model.model, AdapterSpec("qa-lora", 4))
    return model


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2e9), ("1.5 GiB", 1.5 * 2**30), ("900mb", 9e8), ("0GB", None), ("2", None), ("GB", None), ("-1GB", None)],
)
def test_parse_bytes(text: str, expected: float | None) -> None:
    assert parse_bytes(text) == expected


def test_a_wrong_memory_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"memory is '2'.*2GB"):
        TrainingConfig(memory="2")


def _with(monkeypatch: pytest.MonkeyPatch, fixed: float, whole: float, again: float) -> None:
    """What is measured is given: bytes of everything else, and by token without and with checkpointing."""
    given = cycle([(whole, 0.0), (again, 0.0)])
    monkeypatch.setattr(budget, "_kept_by_token", lambda *_: next(given))
    monkeypatch.setattr(budget, "_measured", lambda *_: (fixed, 0.0))


def test_plans(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    _with(monkeypatch, 1e6, 1000.0, 100.0)
    layers = loaded.model.config.num_hidden_layers
    again = 100 + 1000 / layers
    assert plan_within(10**8, loaded, trial_of_packs(loaded, ROWS), 4096) == Plan(
        4096, False, 10**8, int((0.95e8 - 1e6) / 1000) - 64
    )
    fit = int((0.95 * 2e6 - 1e6) / 1000) - 64
    assert plan_within(2 * 10**6, loaded, trial_of_packs(loaded, ROWS), 4096) == Plan(fit, False, 2 * 10**6, fit)
    assert plan_within(2 * 10**6, loaded, trial_of_packs(loaded, ROWS), 4096, checkpointing=True).checkpointing
    tight = int((1e6 + 120 * 1000) / 0.95)  # 120 tokens, and the longest row takes 90 and the rest of a pack
    fit = int((0.95 * tight - 1e6) / again) - 64
    assert plan_within(tight, loaded, trial_of_packs(loaded, ROWS), 4096) == Plan(fit, True, tight, fit)
    with pytest.raises(TrainingError, match=r"longest row has 90 tokens, which takes 0\.00 GB.*max_length"):
        plan_within(10**6, loaded, trial_of_packs(loaded, ROWS), 4096)


def test_weights_made_for_a_pass_are_counted(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all blocks where they are kept whole, of one at a time where they are computed again, whatever the tokens."""
    weight = torch.ones(1 << 20, requires_grad=True)
    for layer in loaded.model.base_model.layers:
        layer.mlp.register_forward_hook(lambda _, x, y: y + (weight * 2).square().sum() * 0)
    monkeypatch.setattr(budget, "_measured", lambda *_: (5e8, 0.0))
    loaded.model.train()
    whole, again = budget._ways(loaded, trial_of_packs(loaded, [ROWS[1]] * 3), 10**10)
    layers = loaded.model.config.num_hidden_layers
    assert whole.fixed - again.fixed == pytest.approx(layers * weight.nbytes, rel=0.02)
    assert again.fixed == 5e8
    assert again.each < whole.each


def test_a_model_that_cannot_compute_blocks_again(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is planned as it is, and refused where it does not fit, or where that was asked for."""
    monkeypatch.setattr(type(loaded.model), "supports_gradient_checkpointing", False)
    plan = plan_within(10**10, loaded, trial_of_packs(loaded, ROWS), 4096)
    assert (plan.micro_batch_tokens, plan.checkpointing) == (4096, False)
    config = TrainingConfig(learning_rate=1e-3, gradient_checkpointing=True)
    for given in (config, replace(config, memory="10GB")):
        with pytest.raises(TrainingError, match=r"gradient_checkpointing: .* LlamaForCausalLM; leave it out"):
            plan_step(loaded, ROWS, given)
    with pytest.raises(TrainingError, match=r"gradient_checkpointing: .* LlamaForCausalLM; leave it out"):
        next(train_steps(loaded, ROWS, config))
    with pytest.raises(TrainingError, match="longest row has 90 tokens"):
        plan_within(10**6, loaded, trial_of_packs(loaded, ROWS), 4096)


def test_what_is_tried_is_short(loaded: LoadedModel) -> None:
    """However long the rows are."""
    tried = budget._to_try(replace(loaded, row_align=1), [Tokens([1] * 5000, [False] + [True] * 4999, 0)])
    assert [(len(row), sum(row.supervised)) for row in tried] == [(256, 255)]


def test_what_a_token_keeps_is_counted(loaded: LoadedModel) -> None:
    """As more rows add; longer ones keep more, here attention's weights; checkpointing less; the model stays."""
    state = {key: value.clone() for key, value in adapter_state(loaded.model).items()}
    loaded.model.train()
    each = [budget._kept_by_token(loaded, pass_over(loaded, [row] * 4))[0] for row in ROWS[:2]]
    for row, by_token in zip(ROWS[:2], each, strict=True):
        (some, few), (rest, more) = (budget._bytes_kept(loaded, pass_over(loaded, [row]), times) for times in (2, 6))
        # what is wanted of the last block, a third of this model, and all tokens are rounded up apart
        assert by_token == pytest.approx((rest - some) / (more - few), rel=0.04)
    assert each[0] < each[1] < 2 * each[0]
    config = loaded.model.config
    assert each[1] > 4 * config.num_hidden_layers * (2 * config.intermediate_size + 4 * config.hidden_size)
    with budget.checkpointed(loaded, True):
        assert budget._kept_by_token(loaded, pass_over(loaded, [ROWS[1]]))[0] < each[1] / 2
    assert all(p.grad is None for p in loaded.model.parameters())
    assert all(torch.equal(state[key], value) for key, value in adapter_state(loaded.model).items())


@pytest.mark.parametrize("again", [False, True])
def test_what_is_counted_is_what_a_backward_pass_finds(loaded: LoadedModel, again: bool) -> None:
    """Of tensors that are all alive, so that no two have the same address."""
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    loaded.model.train()
    model = {t.untyped_storage().data_ptr() for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
    with budget.checkpointed(loaded, again):
        with parameters_once(loaded.model), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            pack_loss(loaded, batch := packed(loaded, ROWS))
        expected = sum(storage.nbytes() for address, storage in found.items() if address not in model)
        assert budget._bytes_kept(loaded, pass_over(loaded, ROWS)) == (expected, len(batch.ids))


@pytest.mark.parametrize("again", [False, True])
def test_the_result_is_the_same(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    """Within a budget the first losses are those without one; with blocks computed again as well."""
    config = TrainingConfig(learning_rate=1e-3, per_device_train_batch_size=4, max_steps=2, shared_prefix_tokens=0)
    state = {key: value.detach().clone() for key, value in adapter_state(loaded.model).items()}
    expected = [step.loss for step in train_steps(loaded, ROWS, config)]
    for key, value in adapter_state(loaded.model).items():
        value.data.copy_(state[key])
    _with(monkeypatch, 1e6, 3000.0 if again else 1000.0, 10.0)
    plan = plan_step(loaded, ROWS, replace(config, memory="1.4MB"))
    assert plan.checkpointing == again
    losses = [step.loss for step in train_steps(loaded, ROWS, config, plan)]
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_longer_row_met_later_is_refused(loaded: LoadedModel) -> None:
    """The others have been trained on by then, and only where a budget was given."""
    plan = Plan(4096, False, 10**9, longest=89)
    steps = train_steps(loaded, ROWS, TrainingConfig(1, learning_rate=1e-3, num_train_epochs=1), plan)
    with pytest.raises(DataError, match=r"row 1 of the data has 90 tokens, and 89 fit.*smaller max_length"):
        list(steps)
    budget.check_fits(Plan(4096, False, 10**9, longest=90), ROWS)
    budget.check_fits(Plan(16, False), ROWS)


def test_too_little_memory_ends_before_the_first_step(loaded: LoadedModel) -> None:
    with pytest.raises(TrainingError, match="longest row"):
        next(train_steps(loaded, ROWS, TrainingConfig(learning_rate=1e-3, memory="1MB")))


PEAK = """
import sys
import torch
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.tokens import Tokens
from lorafold.models.load import compute_dtype, load
from lorafold.train import budget
from lorafold.train.loop import train_steps
from lorafold.train.memory import peak_bytes, restart_peak, resident_bytes

rank, more, *sizes = map(int, sys.argv[1:])
torch.set_num_threads(1)
loaded = load("smollm2", compute_dtype())
inject(loaded.model, AdapterSpec("lora", rank))
rows = [Tokens(torch.randint(9, 9999, (n,)).tolist(), [False] + [True] * (n - 1), i) for i, n in enumerate(sizes)]
peaks = []
budget.restart_peak = lambda: (peaks.append(peak_bytes()), restart_peak())
allowed = resident_bytes() + more
restart_peak()
steps = train_steps(loaded, rows, TrainingConfig(8, learning_rate=1e-3, max_steps=2, memory=f"{allowed // 1000}KB"))
next(steps)
next(steps)
print(max(peaks), peak_bytes(), allowed)
"""


@pytest.mark.parametrize(("rank", "more", "sizes"), [(64, 700_000_000, (110, 120)), (8, 420_000_000, (115, 120))])
def test_the_process_stays_below(rank: int, more: int, sizes: tuple[int, ...]) -> None:
    """Two steps of a real model, and what is measured before, in a process of its own.

    With optimizer states of 156 MB, and with so little that keeping all of 240 tokens in float32 would not fit.
    """
    command = [sys.executable, "-c", PEAK, *map(str, (rank, more, *sizes))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    measuring, training, allowed = map(int, done.stdout.split())
    assert 0.5 * allowed < training <= allowed
    assert 0.5 * allowed < measuring <= allowed


def test_checkpointing_asks_for_no_gradient_below_the_lowest_adapter(loaded: LoadedModel) -> None:
    """transformers lets embeddings ask for one, and goes on when checkpointing has ended."""
    asked: list[bool] = []
    last = loaded.model.base_model.layers[-1]
    adapter = [p for p in last.parameters() if p.requires_grad]
    loaded.model.requires_grad_(False)
    for parameter in adapter:
        parameter.requires_grad_(True)
    last.register_forward_pre_hook(lambda _, args: asked.append(args[0].requires_grad))
    loaded.model.train()
    for wanted in (True, False):
        with budget.checkpointed(loaded, wanted):
            pack_loss(loaded, packed(loaded, ROWS))
    assert adapter
    assert asked == [False, False]
