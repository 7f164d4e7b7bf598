"""How adapters are combined, and how large a reduced one may be."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lorafold.config.checks import refuse

Combination = Literal["cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
PRUNING = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # those that a density belongs to
FACTORWISE = ("linear", *PRUNING)  # those that act on A and on B by themselves, so that ranks must agree


@dataclass(frozen=True)
class CombineConfig:
    """How adapters are combined; names and meanings are those of PEFT's `add_weighted_adapter`.

    Attributes:
        weights: one number for each adapter, in their order; a negative one subtracts.
        combination: `cat` (exactly the weighted sum; the ranks add up), `svd` (the best approximation of that sum of
            rank r), `linear` (weighted sums of A and of B: no sum of updates), `ties`, `dare_linear`, `dare_ties` or
            `magnitude_prune` (these prune A and B first).
        density: share of the entries that pruning leaves.
        r: svd: rank of the result. Default: the largest rank that is combined.
        majority_sign_method: ties, dare_ties: how the sign of an entry is elected: by `total` or by `frequency`.
        seed: dare_linear, dare_ties: of what is dropped.
        union: let layers that only some of the adapters have come from those; otherwise they are refused.
    """

    weights: tuple[float, ...]
    combination: Combination = "cat"
    density: float | None = None
    r: int | None = None
    majority_sign_method: Literal["total", "frequency"] = "total"
    seed: int = 42
    union: bool = False

    def __post_init__(self) -> None:
        faults = []
        kinds = get_args(Combination)
        if self.combination not in kinds:
            faults.append(f"combination is {self.combination!r}; {', '.join(kinds)} are known")
        if not all(math.isfinite(weight) for weight in self.weights):
            faults.append(f"weights are {', '.join(map(str, self.weights))}; they must be finite numbers")
        if self.density is None and self.combination in PRUNING:
            faults.append(f"{self.combination} prunes, so it needs a density, such as 0.5")
        if self.density is not None and self.combination not in PRUNING:
            faults.append(f"density means nothing to {self.combination}; it belongs to {', '.join(PRUNING)}")
        if self.density is not None and not 0 < self.density <= 1:
            faults.append(f"density is {self.density}; it must lie in (0, 1]")
        if self.r is not None and self.combination != "svd":
            faults.append(f"r means nothing to {self.combination}; it belongs to svd")
        if self.r is not None and self.r < 1:
            faults.append(f"r is {self.r}; it must be positive")
        if self.majority_sign_method not in ("total", "frequency"):
            faults.append(f"majority_sign_method is {self.majority_sign_method!r}; total and frequency are known")
        if not 0 <= self.seed < 1 << 63:
            faults.append(f"seed is {self.seed}; it must lie in [0, 2^63)")
        refuse(faults)


@dataclass(frozen=True)
class RankConfig:
    """How large a reduced adapter may be: one of the two.

    Attributes:
        r: rank of every layer.
        energy: share of each layer's sum of squared singular values that its rank must keep, such as 0.95.
    """

    r: int | None = None
    energy: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if (self.r is None) == (self.energy is None):
            faults.append("give either r, a rank, or energy, a share of the sum of squared singular values")
        if self.r is not None and self.r < 1:
            faults.append(f"r is {self.r}; it must be positive")
        if self.energy is not None and not 0 < self.energy <= 1:
            faults.append(f"energy is {self.energy}; it must lie in (0, 1]")
        refuse(faults)
