"""Memory by choice for every task but language modelling: what is planned, and that the process stays below."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.labels import Labelled
from lorafold.data.pairs import Pair
from lorafold.data.tags import Tagged
from lorafold.evals.embed import in_batches
from lorafold.models.classifier import load_classifier
from lorafold.models.encoder import load_encoder
from lorafold.models.load import LoadedModel
from lorafold.train import budget
from lorafold.train.loop import make_optimizer
from lorafold.train.objectives import InfoNCE, Objective, classify_texts, classify_words
from lorafold.train.rows import plan_rows, train_rows
from tests.tiny_classifier import tiny_bert

LABELS = ("no", "yes")
LENGTHS = [5, 30, 12, 20, 3, 17, 9, 25]
CONFIG = TrainingConfig(learning_rate=1e-2, per_device_train_batch_size=8, max_steps=3)


def ids(length: int, start: int) -> tuple[int, ...]:
    return tuple(5 + (start + 3 * i) % 14 for i in range(length))


def texts() -> Sequence[Any]:
    return [Labelled([*ids(n, i)], i % 2, i) for i, n in enumerate(LENGTHS)]


def words() -> Sequence[Any]:
    return [Tagged([*ids(n, i)], [0, n - 1], [i % 2, 1], i, 0, 0) for i, n in enumerate(LENGTHS)]


def pairs() -> Sequence[Any]:
    return [Pair(ids(n, i), ids(n // 2 + 1, i), ids(4, i + 7), i) for i, n in enumerate(LENGTHS)]


TASKS: dict[str, tuple[str, Callable[[], Sequence[Any]], Objective]] = {
    "texts": ("classification", texts, classify_texts(LABELS)),
    "words": ("token-classification", words, classify_words(LABELS)),
    "pairs": ("embedding", pairs, InfoNCE(20.0)),
}


@pytest.fixture(params=TASKS)
def task(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[LoadedModel, Sequence[Any], Objective]:
    """A model with an adapter, its rows and what it learns."""
    name, make, objective = TASKS[request.param]
    folder = tiny_bert(tmp_path)
    loaded = load_encoder(folder) if name == "embedding" else load_classifier(folder, LABELS, task=name)
    torch.manual_seed(0)
    inject(loaded.model, AdapterSpec("lora", 4))
    return loaded, make(), objective


def learned(loaded: LoadedModel, given: Sequence[Any], objective: Objective, config: TrainingConfig) -> Any:
    """Losses and parameters after a few steps, from the same beginning."""
    state = {key: value.detach().clone() for key, value in adapter_state(loaded.model).items()}
    plan = plan_rows(objective, loaded, given, config)
    steps = train_rows(objective, loaded, given, config, plan, make_optimizer(loaded, config))
    losses = [(step.loss, step.grad_norm) for step in steps]
    after = {key: value.detach().clone() for key, value in adapter_state(loaded.model).items()}
    for key, value in adapter_state(loaded.model).items():
        value.data.copy_(state[key])
    return plan, losses, after


@pytest.mark.parametrize(("budget_of", "tokens", "checkpointing"), [("all", 320, False), ("few", 32, True)])
def test_the_result_is_the_same(
    task: tuple[LoadedModel, Sequence[Any], Objective],
    monkeypatch: pytest.MonkeyPatch,
    budget_of: str,
    tokens: int,
    checkpointing: bool,
) -> None:
    """Within a budget that all texts of a step fit, and within one that is enough for the longest alone."""
    loaded, given, objective = task
    _, expected, wanted = learned(loaded, given, objective, CONFIG)
    whole, kept, again = {"all": (1e5, 10.0, 1e3), "few": (1e9, 1e4, 1e5)}[budget_of]  # bytes by token
    by_token = cycle([(whole, 0.0), (kept, 0.0)])
    monkeypatch.setattr(budget, "_kept_by_token", lambda *_: next(by_token))
    monkeypatch.setattr(budget, "_measured", lambda *_: (0.0, again))
    each = whole + again - kept if budget_of == "all" else again
    trial = objective.trial(loaded, given, 8)
    allowed = int(((tokens + 16.5) * each + trial.held) / 0.95)
    plan, losses, after = learned(loaded, given, objective, replace(CONFIG, memory=f"{-(-allowed // 1000)}KB"))
    assert (plan.micro_batch_tokens, plan.checkpointing, plan.longest) == (tokens, checkpointing, tokens)
    assert losses[0] != losses[-1]
    for found, known in zip(losses, expected, strict=True):
        assert found == pytest.approx(known, rel=1e-4)
    for key, value in wanted.items():  # AdamW's first steps have the size of the rate whatever the gradient
        torch.testing.assert_close(after[key], value, atol=2e-4, rtol=0)


def test_too_little_is_refused_with_what_is_needed(
    task: tuple[LoadedModel, Sequence[Any], Objective], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, given, objective = task
    what = "text" if isinstance(objective, InfoNCE) else "row"
    message = rf"memory: the longest {what} has 30 tokens, which takes \d.* allow more, or cut {what}s with a smaller"
    with pytest.raises(budget.TrainingError, match=message):
        plan_rows(objective, loaded, given, replace(CONFIG, memory="1MB"))
    monkeypatch.setattr(type(loaded.model), "supports_gradient_checkpointing", False)
    with pytest.raises(budget.TrainingError, match="transformers cannot do it with Bert"):
        plan_rows(objective, loaded, given, replace(CONFIG, gradient_checkpointing=True))


def test_what_a_token_keeps_is_that_of_the_longest(
    task: tuple[LoadedModel, Sequence[Any], Objective],
) -> None:
    """By the same count over other numbers of rows; what is tried has the length of the longest, filled up."""
    loaded, given, objective = task
    loaded.model.train()
    trial = objective.trial(loaded, given, 8)
    assert trial.longest == 30
    assert trial.loss(1)[1] == 9 * 32
    each, _ = budget._kept_by_token(loaded, trial.loss)
    (some, few), (rest, more) = (budget._bytes_kept(loaded, trial.loss, times) for times in (3, 5))
    assert each == pytest.approx((rest - some) / (more - few), rel=1e-3)
    config = loaded.model.config
    assert each > 4 * config.num_hidden_layers * (config.intermediate_size + 4 * config.hidden_size)


def test_texts_that_fit_together_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so do all where nobody said how many may be kept; else every text is computed twice."""
    loaded, given, objective = load_encoder(tiny_bert(tmp_path)), pairs(), InfoNCE(20.0)
    loaded.model.requires_grad_(True)
    passes: list[bool] = []
    loaded.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    monkeypatch.setattr("lorafold.train.objectives.usual_tokens", lambda _: 64)
    every = [*(p.anchor for p in given), *(p.positive for p in given), *(p.negative for p in given)]
    for limit, at_once, expected in (
        (None, 64, [True]),
        (len(every) * 32, len(every) * 32, [True]),
        (200, 200, [False, True]),
    ):
        passes.clear()
        objective.add_gradients(loaded, given, limit)
        assert sorted(set(passes)) == expected
        assert len(passes) == len(expected) * len(in_batches(every, at_once))


PEAK = """
import sys
from pathlib import Path
import torch
from transformers import BertConfig, BertModel
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.models.classifier import load_classifier
from lorafold.models.encoder import load_encoder
from lorafold.train import budget
from lorafold.train.loop import make_optimizer
from lorafold.train.memory import peak_bytes, resident_bytes, restart_peak
from lorafold.train.rows import plan_rows, train_rows
from tests.tiny_classifier import tiny_bert
from tests.train.test_budget_tasks import LABELS, Labelled, Pair, ids
from tests.train.test_budget_tasks import InfoNCE, classify_texts

torch.set_num_threads(1)
task, method, width, more = *sys.argv[1:3], *map(int, sys.argv[3:5])
folder = tiny_bert(Path(sys.argv[5]))
config = BertConfig(vocab_size=19, hidden_size=width, num_hidden_layers=3, num_attention_heads=4,
                    intermediate_size=4 * width, max_position_embeddings=256)
BertModel(config).save_pretrained(folder)
if task == "embedding":
    loaded, objective = load_encoder(folder), InfoNCE(20.0)
    rows = [Pair((*ids(11, i), 5 + i % 14), (5 + i % 14, 5 + i // 14 % 14, 5 + i // 196, 7),
                 (5 + i % 14, 5 + i // 14 % 14, 5 + i // 196, 8), i) for i in range(600)]
else:
    loaded, objective = load_classifier(folder, LABELS), classify_texts(LABELS)
    rows = [Labelled([*ids(90 + i % 110, i)], i % 2, i) for i in range(40)]
inject(loaded.model, AdapterSpec(method, 8) if method == "lora" else AdapterSpec(method))
restart_peak()
peaks = []
budget.restart_peak = lambda: (peaks.append(peak_bytes()), restart_peak())
start = resident_bytes()
allowed = start + more
given = TrainingConfig(len(rows), learning_rate=1e-3, max_steps=1, memory=f"{allowed // 1000}KB")
optimizer = make_optimizer(loaded, given)
plan = plan_rows(objective, loaded, rows, given)
for step in train_rows(objective, loaded, rows, given, plan, optimizer):
    pass
print(start, max(peaks), peak_bytes(), allowed)
"""


@pytest.mark.parametrize(
    ("task", "method", "width", "more"),
    [
        ("classification", "lora", 256, 200_000_000),
        ("classification", "head", 256, 100_000_000),
        ("classification", "last-layers", 256, 150_000_000),
        ("embedding", "lora", 96, 150_000_000),
    ],
)
def test_the_process_stays_below(task: str, method: str, width: int, more: int, tmp_path: Path) -> None:
    """And uses a good part of what it may: rows that would take several times as much, and many short pairs."""
    command = [sys.executable, "-c", PEAK, task, method, str(width), str(more), str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    start, measuring, training, allowed = map(int, done.stdout.split())
    assert start + more / 3 < training <= allowed
    assert measuring <= allowed
