"""How the learning rate moves over a run."""

from __future__ import annotations

import math


def learning_rate_at(step: int, total: int, peak: float, warmup_ratio: float, kind: str) -> float:
    """Learning rate of optimizer step `step` (0-based) out of `total`.

    It rises linearly over the first `warmup_ratio` of the steps (the first step already moves), then stays
    (`constant`) or falls to 0 just after the last step, linearly or along half a cosine.
    """
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if kind == "constant":
        return peak
    left = (total - step) / max(1, total - warmup)
    return peak * (left if kind == "linear" else (1 - math.cos(math.pi * left)) / 2)
