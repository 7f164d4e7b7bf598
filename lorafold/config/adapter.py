"""What is learned, and where."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lorafold.config.checks import refuse

FULL = "full"
MOVING = ("target_r", "tinit", "tfinal", "delta_t", "beta1", "beta2")  # how ranks move while training
INITIALIZATIONS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva")  # and pissa_niter_N


@dataclass(frozen=True)
class MethodInfo:
    """One method of training.

    Attributes:
        summary: what it learns, in a few words.
        options: fields of `AdapterSpec` that mean something to it, besides `method` and the targets.
        learning_rate: default; AdamW's step is about the rate per element whatever the gradient, so the rate that suits
            a parametrization follows from what one step does to a weight. Half of the best rate of three or four in
            runs of 50 steps, since longer runs want less (docs/results/gsm8k.md).
        whole: it trains parameters of the model itself, which need no adapter and no target.
    """

    summary: str
    options: tuple[str, ...]
    learning_rate: float
    whole: bool = False


_LOW_RANK = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
METHODS = {
    "qa-lora": MethodInfo(
        "offsets of a group-quantized base",
        (*_LOW_RANK, "adapt", "k_quants", "modules_to_save", "ensure_weight_tying"),
        4e-3,
    ),
    "lora": MethodInfo(
        "a low-rank update of any layer's weight",
        (
            *_LOW_RANK,
            "lora_dropout",
            "use_dora",
            "init_lora_weights",
            "target_parameters",
            "bias",
            "modules_to_save",
            "ensure_weight_tying",
            *MOVING,
        ),
        1e-3,
    ),
    "vera": MethodInfo(
        "two vectors a layer, between shared random matrices",
        ("r", "lora_dropout", "d_initial", "modules_to_save"),
        5e-2,
    ),
    "full": MethodInfo("every parameter of a model that is not quantized", (), 5e-5, whole=True),
    "last-layers": MethodInfo("the last blocks and what follows them", ("layers", "modules_to_save"), 2e-4, whole=True),
    "head": MethodInfo("the head alone", ("modules_to_save",), 1e-2, whole=True),
}
_TARGETS = ("target_modules", "exclude_modules", "layers_to_transform")  # options of every method with adapters
DEFAULT_LEARNING_RATE = {name: info.learning_rate for name, info in METHODS.items()} | {"qa-lora full": 1e-3}


@dataclass(frozen=True)
class AdapterSpec:
    """What is learned, and where.

    Attributes:
        method: `lora` (activations; any base), `qa-lora` (offsets of a group-quantized base; folds exactly), `vera`
            (two vectors a layer between shared random matrices, arXiv 2310.11454), or without adapters `full` (every
            parameter), `last-layers` (the last blocks and what follows them) and `head`.
        r: rank; `full` (qa-lora only) trains every offset directly.
        lora_alpha: the update is scaled by alpha / r; default 2 r. Unused with r = full.
        lora_dropout: probability of zeroing an input feature of the adapter while training (lora and vera).
        target_modules: `all-linear` (every linear layer but the head), layer names, or one regular expression.
        exclude_modules: layer names or one regular expression, taken out of the targets.
        layers_to_transform: numbers of the blocks to adapt; all if not given.
        target_parameters: names of parameters that belong to no layer of their own, such as the weights of experts
            (lora only).
        use_rslora: scale by alpha / sqrt(r) instead (arXiv 2312.03732).
        use_dora: learn the length of each output's weight apart from its direction (arXiv 2402.09353).
        init_lora_weights: how A and B begin: `kaiming` (A uniform, B zero), `gaussian`, `orthogonal`, `pissa` (the
            largest singular vectors, arXiv 2404.02948; `pissa_niter_N` is the fast approximation), `olora` (QR, arXiv
            2406.01775), or `eva` (the inputs' largest singular vectors, arXiv 2410.07170).
        target_r: AdaLoRA's adaptive ranks (arXiv 2303.10512; lora only): layers begin with r, and during training the
            ranks of all layers together fall to target_r a layer, kept where they matter most; alpha / r stays. At the
            end each layer has its own rank, and one that keeps none is not adapted.
        tinit: steps before ranks begin to fall; default 15 % of the run.
        tfinal: steps after they have fallen; default 35 % of the run.
        delta_t: steps from one decision about ranks to the next (PEFT's deltaT); default 1 % of the run.
        beta1: how slowly the importance of a rank follows the gradients.
        beta2: how slowly its uncertainty follows them.
        rank_pattern: regular expressions of layer names -> rank, where it differs.
        alpha_pattern: regular expressions of layer names -> alpha, where it differs.
        bias: which biases are trained: `none`, `all`, or `lora_only` (those of adapted layers).
        modules_to_save: names of modules that are trained whole and stored with the adapter, such as a new head.
        ensure_weight_tying: where embedding and head have one weight and either is named: one update of both. Without
            it the named one alone is updated, and gets a weight of its own where it is merged or folded.
        adapt: what qa-lora learns of each group: `offset`, `scale` (any type with a scale per group, also Q8_0), or
            `both` (a third more time; the update is no LoRA, so it can be folded but not exported).
        k_quants: how qa-lora adapts Q4_K and Q5_K: `promote` to Q4_1 and Q5_1 first (float16 offsets; the file grows
            by half a bit per weight), or `in-place` (same file size; offsets move in the steps the format has).
        d_initial: vera: what the vector of the inner dimension begins with.
        layers: last-layers: how many blocks, counted from the end.
    """

    method: Literal["qa-lora", "lora", "vera", "full", "last-layers", "head"] = "qa-lora"
    r: int | Literal["full"] = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("all-linear",)
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    target_parameters: tuple[str, ...] = ()
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str = "kaiming"
    target_r: int | None = None
    tinit: int | None = None
    tfinal: int | None = None
    delta_t: int | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    adapt: Literal["offset", "scale", "both"] = "offset"
    k_quants: Literal["promote", "in-place"] = "promote"
    d_initial: float = 0.1
    layers: int = 2

    def __post_init__(self) -> None:
        refuse(self._faults())

    def _faults(self) -> list[str]:
        if self.method not in METHODS:
            return [f"method is {self.method!r}; {', '.join(METHODS)} are known"]
        faults = self._foreign_options()
        if self.r == FULL and self.method != "qa-lora":
            faults.append(
                f"r = full is for --method qa-lora, which can train all offsets; give {self.method} a rank such as 8"
            )
        if self.r != FULL and (type(self.r) is not int or self.r < 1):
            faults.append(f"r is {self.r!r}; it must be a positive whole number or 'full'")
        if type(self.layers) is not int or self.layers < 1:
            faults.append(f"layers is {self.layers!r}; it must be a positive whole number")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            faults.append(f"lora_alpha is {self.lora_alpha}; it must be positive")
        if not 0 <= self.lora_dropout < 1:
            faults.append(f"lora_dropout is {self.lora_dropout}; it must lie in [0, 1)")
        for name, known in (
            ("adapt", ("offset", "scale", "both")),
            ("k_quants", ("promote", "in-place")),
            ("bias", ("none", "all", "lora_only")),
        ):
            if getattr(self, name) not in known:
                faults.append(f"{name} is {getattr(self, name)!r}; {', '.join(known[:-1])} and {known[-1]} are known")
        if not (self.target_modules or self.target_parameters):
            faults.append("target_modules is empty; all-linear adapts every linear layer but the head")
        if any(number < 0 for number in self.layers_to_transform):
            faults.append("layers_to_transform counts blocks from 0; it holds a negative number")
        return faults + self._pattern_faults() + self._initialization_faults() + self._moving_faults()

    def _foreign_options(self) -> list[str]:
        """Options that were given and mean nothing to this method."""
        every = {name for info in METHODS.values() for name in info.options} | set(_TARGETS)
        meant = {name: (*info.options, *(() if info.whole else _TARGETS)) for name, info in METHODS.items()}
        faults = []
        for f in fields(self):
            default = f.default_factory() if callable(f.default_factory) else f.default
            if f.name in every - set(meant[self.method]) and getattr(self, f.name) != default:
                takers = " or ".join(name for name, options in meant.items() if f.name in options)
                faults.append(f"{f.name} means nothing to {self.method}; leave it out, or use --method {takers}")
        return faults

    def _pattern_faults(self) -> list[str]:
        faults = []
        for name in ("rank_pattern", "alpha_pattern"):
            pattern: Mapping[str, Any] = getattr(self, name)
            kinds = (int,) if name == "rank_pattern" else (int, float)
            faults += [f"{name}: {key!r} is no regular expression" for key in pattern if not _is_regex(key)]
            faults += [
                f"{name}: {key!r} has {value!r}; it must be a positive {'whole ' * (kinds == (int,))}number"
                for key, value in pattern.items()
                if type(value) not in kinds or value <= 0
            ]
        if self.r == FULL and (self.rank_pattern or self.alpha_pattern):
            faults.append("r = full has no rank, so rank_pattern and alpha_pattern mean nothing")
        return faults

    def _initialization_faults(self) -> list[str]:
        start = self.init_lora_weights
        if start not in INITIALIZATIONS and not re.fullmatch(r"pissa_niter_[1-9]\d*", str(start)):
            return [f"init_lora_weights is {start!r}; {', '.join(INITIALIZATIONS)} are known"]
        if start == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values()) if isinstance(r, int)):
            return ["init_lora_weights orthogonal splits the rank in halves; give an even r"]
        return []

    def _moving_faults(self) -> list[str]:
        """What is wrong with ranks that move."""
        if self.target_r is None:
            given = [name for name in MOVING if getattr(self, name) != AdapterSpec.__dataclass_fields__[name].default]
            return [f"{name} is about ranks that move; give target_r as well" for name in given]
        faults = [
            f"{name} is {value!r}; it must be a whole number of at least {least}"
            for name, least in (("target_r", 1), ("tinit", 0), ("tfinal", 0), ("delta_t", 1))
            if (value := getattr(self, name)) is not None and (type(value) is not int or value < least)
        ]
        faults += [
            f"{name} is {getattr(self, name)}; it must lie between 0 and 1"
            for name in ("beta1", "beta2")
            if not 0 < getattr(self, name) < 1
        ]
        if not faults and isinstance(self.r, int) and self.target_r >= self.r and not self.rank_pattern:
            faults.append(f"target_r is {self.target_r} and r is {self.r}: ranks fall from r, so give a larger r")
        why = {
            "use_dora": (self.use_dora, "a layer without ranks would keep its learned lengths, and could not be left"),
            "target_parameters": (self.target_parameters, "experts share one rank, and none of them can lose its own"),
            "init_lora_weights eva": (self.init_lora_weights == "eva", "it shares out the ranks itself, beforehand"),
        }
        if self.init_lora_weights not in ("kaiming", "gaussian", "eva"):
            reason = "its ranks are nothing only together, so taking one away would change the model"
            why[f"init_lora_weights {self.init_lora_weights}"] = (True, reason)
        faults += [f"target_r does not go with {name}: {reason}" for name, (on, reason) in why.items() if on]
        return faults

    @property
    def begun(self) -> AdapterSpec:
        """The spec with which a run whose ranks move begins."""
        return replace(self, **{name: AdapterSpec.__dataclass_fields__[name].default for name in MOVING})

    @property
    def alpha(self) -> float:
        """lora_alpha, or its default."""
        return self.lora_alpha if self.lora_alpha is not None else 2.0 * (self.r if isinstance(self.r, int) else 1)

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with use_rslora; 1 where there is no rank."""
        if not isinstance(self.r, int) or self.method == "vera":
            return 1.0
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def for_layer(self, path: str) -> AdapterSpec:
        """The spec with `rank_pattern` and `alpha_pattern` applied to one layer."""
        rank, alpha = _from_pattern(self.rank_pattern, path), _from_pattern(self.alpha_pattern, path)
        if rank is None and alpha is None:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {"r": rank or self.r, "lora_alpha": alpha or self.alpha}
        return AdapterSpec(**values)

    @property
    def label(self) -> str:
        """Short name for tables, such as `qa-lora r=8`."""
        if METHODS[self.method].whole:
            return f"last {self.layers} layers" if self.method == "last-layers" else self.method
        what = {"offset": "", "scale": " scales", "both": " offsets and scales"}[self.adapt]
        start = "" if self.init_lora_weights == "kaiming" else f" {self.init_lora_weights}"
        rank = f"r={self.r}" if self.target_r is None else f"r={self.r} to {self.target_r}"
        return f"{'dora' if self.use_dora else self.method} {rank}{what}{start}"

    @property
    def default_learning_rate(self) -> float:
        """The learning rate used when none is given."""
        return DEFAULT_LEARNING_RATE[f"{self.method} full" if self.r == FULL else self.method]


def _from_pattern(pattern: Mapping[str, Any], path: str) -> Any:
    """The first value whose expression matches a layer's name or its end, as PEFT reads patterns."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", path)), None)


def _is_regex(text: Any) -> bool:
    try:
        re.compile(text)
    except (re.error, TypeError):
        return False
    return True
