"""One seed, one result: initialization apart, everything random in training is drawn from the configuration's seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.models.load import load
from lorafold.train.loop import train_steps
from tests.practice import lora_like, token_rows

CONFIG = TrainingConfig(learning_rate=0.01, per_device_train_batch_size=3, max_steps=3, seed=5)


def test_order_and_dropout_follow_the_seed_alone(tiny_file: Callable[..., Path]) -> None:
    """Whatever random numbers were drawn before."""

    def state(config: TrainingConfig, dropout: float, drawn: int) -> torch.Tensor:
        loaded = load(tiny_file("llama", "Q4_1"))
        inject(loaded.model, AdapterSpec("lora", r=2, lora_dropout=dropout, target_modules=("q_proj",)))
        lora_like(loaded.model)
        torch.rand(drawn)
        losses = [step.loss for step in train_steps(loaded, token_rows(8), config)]
        parameters = [p.detach().flatten() for p in adapter_state(loaded.model).values()]
        return torch.cat([*parameters, torch.tensor(losses)])

    expected = state(CONFIG, 0.5, drawn=0)
    assert torch.equal(state(CONFIG, 0.5, drawn=7), expected)
    assert not torch.equal(state(replace(CONFIG, seed=6), 0.5, drawn=0), expected)
    assert not torch.equal(state(CONFIG, 0.0, drawn=0), expected)
