"""Everything a run can be told, as frozen dataclasses; the command line and YAML files are made from them.

Names that PEFT, transformers and TRL users know keep their meaning. Each field is documented where it
is declared, checked in `__post_init__`, and written resolved into a run's `config.yaml`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from lorafold.errors import ConfigError, bullet_list, nearest
from lorafold.files import parse_bytes

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
        _raise(faults)

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


@dataclass(frozen=True)
class RowsConfig:
    """Rows, and how they become tokens.

    Attributes:
        data: JSONL, JSON, CSV, TSV or Parquet file, or a folder of them.
        prompt: template that makes the prompt from columns, such as "Describe {name}.".
        completion: template that makes the completion from columns.
        template: `chat` (the model's own), `alpaca`, `plain`, or `auto`: chat where the model has one.
        max_length: tokens kept of a row; longer rows are cut on the right and counted.
        supervise: `completion` (completions or assistant turns) or `all` tokens.
        limit: use the first N rows of data only.
    """

    data: Path
    prompt: str | None = None
    completion: str | None = None
    template: str = "auto"
    max_length: int = 1024
    supervise: Literal["completion", "all"] = "completion"
    limit: int | None = None

    def __post_init__(self) -> None:
        _raise(self.faults())

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        faults = []
        if (self.prompt is None) != (self.completion is None):
            faults.append("prompt and completion templates go together; one of them is missing")
        if self.supervise not in ("completion", "all"):
            faults.append(f"supervise is {self.supervise!r}; completion and all are known")
        return faults + _not_positive(self, "max_length", "limit")


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """What is learned from, and what is held out.

    Attributes:
        eval_data: held-out rows; without it a validation or test split of a data folder, or else a part of the data.
        eval_fraction: the part held out when there are no other held-out rows.
        eval_limit: use the first N held-out rows only.
    """

    eval_data: Path | None = None
    eval_fraction: float = 0.1
    eval_limit: int | None = None

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        faults = super().faults()
        if not 0 < self.eval_fraction < 1:
            faults.append(f"eval_fraction is {self.eval_fraction}; it must lie between 0 and 1")
        return faults + _not_positive(self, "eval_limit")


@dataclass(frozen=True)
class QuantizeConfig:
    """How a model is quantized.

    Attributes:
        format: `affine` (scale and offset for each group: what QA-LoRA trains), or what bitsandbytes makes, for QLoRA:
            `nf4` (4 bits in blocks of 64) or `int8` (a scale for each row), in a folder that transformers reads; these
            two quantize nothing but the blocks, and know of the options below only use_double_quant and stored.
        use_double_quant: nf4: quantize the scales as well (4.13 bits a weight for 4.5).
        bits: of a code; 2, 3, 4, 5, 6 or 8 in an MLX folder, 4 or 5 in a GGUF file (Q4_1, Q5_1).
        group_size: weights that share a scale and an offset; 32, 64 or 128 in an MLX folder, 32 in a GGUF file.
        method: `rtn` (round to nearest), `search` (the scale and offset of least squared error), or `gptq`
            (least error of each layer's output on the rows of --data). Default: gptq with --data, otherwise search.
        embedding_bits: of the embedding and the head; 16 leaves them as they are.
        stored: type of what is not quantized, and in an MLX folder of scales and offsets. Default: float16 in an MLX
            folder (bfloat16 offsets are coarse), for nf4 and int8 that of the model.
    """

    format: Literal["affine", "nf4", "int8"] = "affine"
    use_double_quant: bool = True
    bits: Literal[2, 3, 4, 5, 6, 8] = 4
    group_size: Literal[32, 64, 128] = 32
    method: Literal["rtn", "search", "gptq"] | None = None
    embedding_bits: Literal[2, 3, 4, 5, 6, 8, 16] = 8
    stored: Literal["float16", "bfloat16"] | None = None

    def __post_init__(self) -> None:
        faults = []
        if self.format != "affine":
            plain = {"bits": 4, "group_size": 32, "method": None, "embedding_bits": 8}
            given = [name for name, default in plain.items() if getattr(self, name) != default]
            faults += [f"{name} means nothing to {self.format}, whose values are fixed" for name in given]
        _raise(faults)


@dataclass(frozen=True)
class TrainingConfig:
    """How it is learned.

    Attributes:
        per_device_train_batch_size: rows of a forward and backward pass (split further by micro_batch_tokens).
        gradient_accumulation_steps: passes before an optimizer step; the loss is averaged over all their tokens.
        learning_rate: of AdamW; the default depends on the method.
        num_train_epochs: passes over the data.
        max_steps: optimizer steps, instead of epochs.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        lr_scheduler_type: `linear` or `cosine` decay to 0, or `constant`.
        weight_decay: AdamW's decoupled decay.
        max_grad_norm: gradients are scaled down to this norm; 0 turns that off.
        eval_steps: evaluate every N steps as well as before and after.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        micro_batch_tokens: most tokens computed at once, 1,024 if not given; changes speed and memory, not the result.
        memory: what the process (or GPU) may take, such as `2GB`; micro-batches and checkpointing are chosen to fit.
        shared_prefix_tokens: rows of a step that begin with so many equal tokens or more compute these once, which
            changes no result; 0 never. With dropout nothing is shared.
        dtype: of activations: `auto` is bfloat16 where the processor has it, else float32.
        device: `cpu`, `cuda`, or `auto`.
        seed: of initialization, order and dropout.
        sample_rows: held-out rows whose completions are generated before and after training.
        sample_tokens: longest generated sample, in tokens.
    """

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.05
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int | None = None
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    memory: str | None = None
    shared_prefix_tokens: int = 24
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 42
    sample_rows: int = 3
    sample_tokens: int = 128

    def __post_init__(self) -> None:
        faults = _not_positive(
            self,
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "num_train_epochs",
            "max_steps",
            "eval_steps",
            "micro_batch_tokens",
            "sample_tokens",
        )
        if self.memory is not None and self.memory_bytes is None:
            faults.append(f"memory is {self.memory!r}; write a number and a unit, such as 2GB, 1.5GiB or 900MB")
        if not 0 <= self.warmup_ratio < 1:
            faults.append(f"warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1)")
        if self.lr_scheduler_type not in ("linear", "cosine", "constant"):
            faults.append(f"lr_scheduler_type is {self.lr_scheduler_type!r}; linear, cosine and constant are known")
        faults += [
            f"{name} is {getattr(self, name)}; it must be 0 or positive"
            for name in ("weight_decay", "max_grad_norm", "sample_rows", "seed", "shared_prefix_tokens")
            if not 0 <= getattr(self, name) < math.inf
        ]
        if self.seed >= 1 << 63:
            faults.append(f"seed is {self.seed}; it must be below 2^63")
        if self.dtype not in ("auto", "float32", "bfloat16"):
            faults.append(f"dtype is {self.dtype!r}; auto, float32 and bfloat16 are known")
        if self.device not in ("auto", "cpu", "cuda"):
            faults.append(f"device is {self.device!r}; auto, cpu and cuda are known")
        _raise(faults)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None where it is not given, or is no positive number with a unit."""
        return parse_bytes(str(self.memory or ""))


@dataclass(frozen=True)
class RunConfig:
    """A whole run: what `config.yaml` in a run folder holds, flat.

    Attributes:
        model: `.gguf` file, transformers folder, hub id, or `smollm2`.
        output_dir: the run folder.
        data, adapter, training: the three groups of options.
    """

    model: str
    output_dir: Path
    data: DataConfig
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def resolved(self) -> RunConfig:
        """The same run with every default that depends on something else written out, and paths that hold anywhere."""
        data = replace(
            self.data,
            data=self.data.data.absolute(),
            eval_data=self.data.eval_data.absolute() if self.data.eval_data else None,
        )
        model = str(Path(self.model).absolute()) if Path(self.model).exists() else self.model
        adapter = replace(self.adapter, lora_alpha=self.adapter.alpha)
        rate = self.training.learning_rate or self.adapter.default_learning_rate
        return replace(
            self, model=model, data=data, adapter=adapter, training=replace(self.training, learning_rate=rate)
        )

    def to_dict(self) -> dict[str, Any]:
        """Flat mapping of plain values, ready for YAML."""
        flat: dict[str, Any] = {"model": self.model, "output_dir": str(self.output_dir)}
        for group in (self.adapter, self.data, self.training):
            flat |= asdict(group)
        return {key: _plain(value) for key, value in flat.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: unknown keys, each with the nearest known one, or values that are not allowed.
        """
        known = option_names()
        unknown = [f"unknown key {key!r}{nearest(key, known)}" for key in values if key not in known]
        _raise(unknown + [f"{key} is missing" for key in ("model", "output_dir", "data") if key not in values])
        values = {**values, "output_dir": Path(values["output_dir"]), "data": Path(values["data"])}
        if values.get("eval_data"):
            values["eval_data"] = Path(values["eval_data"])
        for key in ("target_modules", "exclude_modules"):
            if key in values:
                values[key] = (values[key],) if isinstance(values[key], str) else tuple(values[key])
        with gather_faults():
            groups = {
                name: kind(**{f.name: values[f.name] for f in fields(kind) if f.name in values})
                for name, kind in _GROUPS.items()
            }
        return cls(values["model"], values["output_dir"], **groups)


_GROUPS: dict[str, Any] = {"adapter": AdapterSpec, "data": DataConfig, "training": TrainingConfig}


def option_names() -> list[str]:
    """Every key a configuration file may hold."""
    return ["model", "output_dir", *(f.name for kind in _GROUPS.values() for f in fields(kind))]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _not_positive(config: Any, *names: str) -> list[str]:
    values = {name: getattr(config, name) for name in names}
    return [
        f"{name} is {value}; it must be positive"
        for name, value in values.items()
        if value is not None and not 0 < value < math.inf
    ]


def check_positive(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: naming all of them.
    """
    _raise([f"{name} is {count}; it must be positive" for name, count in counts.items() if count < 1])


_gathered: ContextVar[list[str] | None] = ContextVar("_gathered", default=None)


@contextmanager
def gather_faults() -> Iterator[None]:
    """Let several configurations be made inside, and raise at the end what is wrong with any of them.

    Raises:
        ConfigError: naming every fault of all of them.
    """
    faults: list[str] = []
    token = _gathered.set(faults)
    try:
        yield
    finally:
        _gathered.reset(token)
    _raise(faults)


def _raise(faults: list[str]) -> None:
    gathered = _gathered.get()
    if gathered is not None:
        gathered += faults
    elif faults:
        raise ConfigError(faults[0] if len(faults) == 1 else "several options are wrong:\n" + bullet_list(faults))
