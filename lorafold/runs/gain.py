"""What is left of the gain of training after a lossy fold, measured on the held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lorafold.adapters.adapted import set_active
from lorafold.evals.loss import evaluate
from lorafold.models.load import load
from lorafold.runs.display import Display
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import Run
from lorafold.runs.prepare import held_out_rows


@dataclass(frozen=True)
class Gain:
    """Held-out losses (nats per token, float32) of base, trained model and written file."""

    base: float
    trained: float
    written: float

    @property
    def left(self) -> float:
        """Share of the gain that the file still has; 0 when there was nothing to lose."""
        gain = self.base - self.trained
        return (self.base - self.written) / gain if gain else 0.0

    def describe(self) -> str:
        """One sentence."""
        return (
            f"held-out loss: base {self.base:.4f}, trained {self.trained:.4f}, this file {self.written:.4f}: "
            f"{self.left:.1%} of the gain is left"
        )


def measure_gain(run: Run, path: Path, display: Display, data: Path | None = None) -> Gain:
    """Evaluate base, trained model and written file on the run's held-out rows, or on those of another file."""
    trained = load_trained(run)
    rows = held_out_rows(run, trained.tokenizer, data).rows
    losses = []
    for label, active in (("base", None), ("trained", "default"), ("written file", "")):
        if active == "":
            trained = load(path, torch.float32)
        else:
            set_active(trained.model, active)
        with display.bar(f"held-out loss, {label}", len(rows)) as done:
            losses.append(evaluate(trained, rows, progress=done))
    return Gain(*losses)
