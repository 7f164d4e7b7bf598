"""What is learned, and where."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorafold.config.checks import refuse

Method = Literal["qa-lora", "lora"]
FULL = "full"


# AdamW's step is about the learning rate per element whatever the gradient, so the rate that suits a parametrization
# follows from what one step does to a weight. Low ranks: half of the best rate of three or four in runs of 50 steps,
# since longer runs want less; full: the best (docs/results/gsm8k.md).
DEFAULT_LEARNING_RATE = {"lora": 1e-3, "qa-lora": 4e-3, "qa-lora full": 1e-3}


@dataclass(frozen=True)
class AdapterSpec:
    """What is learned, and where.

    Attributes:
        method: `lora` (activations; any base) or `qa-lora` (offsets of a group-quantized base; folds exactly).
        r: rank; `full` (qa-lora only) trains every offset directly.
        lora_alpha: the update is scaled by alpha / r; default 2 r. Unused with r = full.
        lora_dropout: probability of zeroing an input feature of the adapter while training (lora only).
        target_modules: `all-linear` (every linear layer but the head), layer names, or one regular expression.
        exclude_modules: layer names or one regular expression, taken out of the targets.
        use_rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
        adapt: what qa-lora learns of each group: `offset`, `scale` (any type with a scale per group, also Q8_0), or
            `both` (a third more time; the update is no LoRA, so it can be folded but not exported).
        k_quants: how qa-lora adapts Q4_K and Q5_K: `promote` to Q4_1 and Q5_1 first (float16 offsets; the file grows
            by half a bit per weight), or `in-place` (same file size; offsets move in the steps the format has).
    """

    method: Method = "qa-lora"
    r: int | Literal["full"] = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    use_rslora: bool = False
    adapt: Literal["offset", "scale", "both"] = "offset"
    k_quants: Literal["promote", "in-place"] = "promote"

    def __post_init__(self) -> None:
        faults = []
        if self.method not in ("qa-lora", "lora"):
            faults.append(f"method is {self.method!r}; qa-lora and lora are known")
        if self.r == FULL and self.method == "lora":
            faults.append(
                "r = full trains offsets directly, which only --method qa-lora can; give lora a rank such as 8"
            )
        if self.r != FULL and (type(self.r) is not int or self.r < 1):
            faults.append(f"r is {self.r!r}; it must be a positive whole number or 'full'")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            faults.append(f"lora_alpha is {self.lora_alpha}; it must be positive")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")
        if self.lora_dropout and self.method == "qa-lora":
            faults.append("lora_dropout acts on activations, which qa-lora never sees; leave it 0 or use --method lora")
        if self.adapt not in ("offset", "scale", "both"):
            faults.append(f"adapt is {self.adapt!r}; offset, scale and both are known")
        if self.adapt != "offset" and self.method == "lora":
            faults.append("adapt chooses what qa-lora learns of a group; lora learns neither offsets nor scales")
        if self.k_quants not in ("promote", "in-place"):
            faults.append(f"k_quants is {self.k_quants!r}; promote and in-place are known")
        if not self.target_modules:
            faults.append("target_modules is empty; all-linear adapts every linear layer but the head")
        refuse(faults)

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * (self.r if isinstance(self.r, int) else 1)

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora; 1 where there is no rank."""
        if not isinstance(self.r, int):
            return 1.0
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def label(self) -> str:
        """Short name for tables, such as `qa-lora r=8`."""
        what = {"offset": "", "scale": " scales", "both": " offsets and scales"}[self.adapt]
        return f"{self.method} r={self.r}{what}"

    @property
    def default_learning_rate(self) -> float:
        """The learning rate used when none is given."""
        return DEFAULT_LEARNING_RATE[f"{self.method} full" if self.r == FULL else self.method]
