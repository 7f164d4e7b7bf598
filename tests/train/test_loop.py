"""The training loop: what must not change its result, and what must stop it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.packs import pack
from lorafold.data.tokens import Tokens
from lorafold.errors import TrainingError
from lorafold.evals.loss import evaluate, pack_loss
from lorafold.models.load import LoadedModel, load
from lorafold.train.loop import drops_out, epoch_batches, total_steps, train_steps
from lorafold.train.schedule import learning_rate_at

CONFIG = TrainingConfig(learning_rate=0.01, per_device_train_batch_size=4, max_steps=3, max_grad_norm=0)


def random_rows(count: int = 8, seed: int = 3) -> list[Tokens]:
    """Rows of 5 to 40 tokens, about half of them supervised; every other row begins as the one before it."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tokens] = []
    for i in range(count):
        n = int(torch.randint(5, 40, (1,), generator=generator))
        ids = torch.randint(10, 250, (n,), generator=generator).tolist()
        if i % 2:
            ids = (rows[-1].ids[: n // 2] + ids)[:n]
        rows.append(Tokens(ids, [j > n // 2 for j in range(n)], i))
    return rows


@pytest.fixture
def adapted(tiny_file: Callable[..., Path]) -> Callable[..., LoadedModel]:
    def make(spec: AdapterSpec | None = None, types: str = "Q4_1") -> LoadedModel:
        loaded = load(tiny_file("llama", types))
        torch.manual_seed(0)
        inject(loaded.model, spec or AdapterSpec("qa-lora", 4))
        return loaded

    return make


def trained_state(loaded: LoadedModel, config: TrainingConfig) -> dict[str, Tensor]:
    for _ in train_steps(loaded, random_rows(), config):
        pass
    return {key: value.detach().clone() for key, value in adapter_state(loaded.model).items()}


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_tokens": 1},
        {"micro_batch_tokens": 10_000},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"shared_prefix_tokens": 0},
        {"shared_prefix_tokens": 1, "micro_batch_tokens": 40},
    ],
)
@pytest.mark.parametrize("spec", [AdapterSpec("lora", 4), AdapterSpec("qa-lora", "full")], ids=["lora", "full"])
def test_how_a_step_is_computed_changes_nothing(
    adapted: Callable[..., LoadedModel], spec: AdapterSpec, change: dict[str, int]
) -> None:
    """Three steps in float32 end at the same parameters.

    The order of sums differs, which changes gradients in their last bits; Adam divides a gradient by its size, so the
    few parameters whose gradient is nearly zero may move by a visible part of a step (0.01): hence 2e-3 at most, and
    1e-5 on average.
    """
    expected = trained_state(adapted(spec), CONFIG)
    actual = trained_state(adapted(spec), replace(CONFIG, **change))
    for key, value in expected.items():
        difference = (actual[key] - value).abs()
        assert difference.max() < 2e-3, key
        assert difference.mean() < 1e-5, key


@pytest.mark.parametrize("align", [1, 4, 16])
def test_pack_loss_equals_rows_computed_by_transformers(adapted: Callable[..., LoadedModel], align: int) -> None:
    """Loss and gradients of a pack against one plain forward pass a row and torch's cross-entropy, to 1e-5."""
    loaded, rows = adapted(), random_rows(4)
    state = adapter_state(loaded.model)
    for value in state.values():
        torch.nn.init.normal_(value, std=0.1)  # B is zero at first, and then A has no gradient
    total = pack_loss(loaded, pack(rows, align))
    total.backward()
    packed = {key: value.grad.clone() for key, value in state.items() if value.grad is not None}
    loaded.model.zero_grad()
    plain = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.ids)
        targets = torch.where(torch.tensor(row.supervised), ids, -100)[1:]
        plain = plain + F.cross_entropy(loaded.model(input_ids=ids[None]).logits[0, :-1], targets, reduction="sum")
    plain.backward()
    torch.testing.assert_close(total, plain, atol=1e-4, rtol=1e-6)
    assert packed.keys() == state.keys()
    for key, value in state.items():
        assert value.grad is not None
        scale = max(1.0, float(value.grad.abs().max()))
        torch.testing.assert_close(packed[key], value.grad, atol=1e-5 * scale, rtol=1e-4)


def test_training_lowers_the_loss_and_leaves_the_base_alone(adapted: Callable[..., LoadedModel]) -> None:
    loaded, rows = adapted(AdapterSpec("qa-lora", "full")), random_rows()
    blocks = {name: b.clone() for name, b in loaded.model.named_buffers() if name.endswith("blocks")}
    before = evaluate(loaded, rows)
    steps = list(train_steps(loaded, rows, replace(CONFIG, max_steps=20)))
    assert evaluate(loaded, rows) < before - 0.5
    assert [step.step for step in steps] == list(range(1, 21))
    for name, b in loaded.model.named_buffers():
        if name.endswith("blocks"):
            assert torch.equal(b, blocks[name])


def test_a_loss_that_is_not_finite_names_step_and_row_and_changes_nothing(
    adapted: Callable[..., LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = adapted()
    original = pack_loss

    def poisoned(model: LoadedModel, batch: object) -> Tensor:
        loss = original(model, batch)  # type: ignore[arg-type]
        bad = random_rows()[5].ids[:5]
        ids = batch.ids.tolist()  # type: ignore[attr-defined]
        return loss * float("nan") if any(ids[i : i + 5] == bad for i in range(len(ids))) else loss

    monkeypatch.setattr("lorafold.train.loop.pack_loss", poisoned)
    seen: dict[str, Tensor] = {}

    def watch() -> None:
        for _ in train_steps(loaded, random_rows(), replace(CONFIG, max_steps=9)):
            seen.update({key: value.detach().clone() for key, value in adapter_state(loaded.model).items()})

    with pytest.raises(TrainingError, match=r"step \d, row 5 of the data"):
        watch()
    for key, value in adapter_state(loaded.model).items():
        assert torch.isfinite(value).all()
        assert not seen or torch.equal(value, seen[key])


def test_an_epoch_takes_every_row_once_and_is_drawn_from_the_seed() -> None:
    config = replace(CONFIG, max_steps=None, num_train_epochs=1.5)
    batches = epoch_batches(10, config)
    epoch = [next(batches) for _ in range(3)]
    assert sorted(i for batch in epoch for i in batch) == list(range(10))
    assert [len(batch) for batch in epoch] == [4, 4, 2]
    assert next(epoch_batches(10, config)) == epoch[0]
    assert next(epoch_batches(10, replace(config, seed=1))) != epoch[0]
    assert total_steps(10, config) == 5


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ],
)
def test_schedule(kind: str, expected: list[float]) -> None:
    """Two of ten steps rise (the first moves already), the other eight stay or fall; worked out by hand."""
    rates = [learning_rate_at(step, 10, 1.0, 0.2, kind) for step in range(10)]
    assert rates == pytest.approx(expected)


def test_cosine_falls_from_the_peak_to_almost_nothing() -> None:
    rates = [learning_rate_at(step, 100, 2.0, 0.1, "cosine") for step in range(10, 100)]
    assert rates[0] == pytest.approx(2.0)
    assert rates[45] == pytest.approx(1.0)
    assert 0 < rates[-1] < 1e-2
    assert rates == sorted(rates, reverse=True)


def test_nothing_is_shared_where_features_are_dropped(adapted: Callable[..., LoadedModel]) -> None:
    """By a module, by an adapter, or by a number that a block hands to torch itself."""
    model = adapted().model
    assert not drops_out(model)
    assert drops_out(adapted(AdapterSpec("lora", 2, lora_dropout=0.1)).model)
    model.model.layers[0].residual_dropout = 0.1
    assert drops_out(model)
    model.model.layers[0].residual_dropout = 0.0
    model.model.layers[1].dropped = torch.nn.Dropout(0.2)
    assert drops_out(model)
