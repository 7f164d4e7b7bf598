"""How it is learned."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lorafold.config.checks import not_positive, refuse
from lorafold.files import parse_bytes


@dataclass(frozen=True)
class TrainingConfig:
    """How it is learned.

    Attributes:
        per_device_train_batch_size: rows of a forward and backward pass (split further by micro_batch_tokens).
        gradient_accumulation_steps: passes before an optimizer step; the loss is averaged over all their tokens.
        learning_rate: the default depends on the method.
        loraplus_lr_ratio: LoRA+ (arXiv 2402.12354): B learns so many times faster than A.
        num_train_epochs: passes over the data.
        max_steps: optimizer steps, instead of epochs.
        warmup_ratio: share of the steps in which the learning rate rises from 0.
        lr_scheduler_type: `linear` or `cosine` decay to 0, or `constant`.
        weight_decay: decoupled decay (arXiv 1711.05101).
        max_grad_norm: gradients are scaled down to this norm; 0 turns that off.
        eval_steps: evaluate every N steps as well as before and after.
        save_steps: write a checkpoint every N steps, from which `--resume` goes on.
        save_total_limit: checkpoints kept; the oldest are deleted.
        gradient_checkpointing: recompute activations in the backward pass: less memory, a third more time.
        micro_batch_tokens: most tokens computed at once, if not given 1,024, or 768 in float32; changes speed and
            memory, not the result. Embeddings, whose loss needs all texts of a step, keep all batches of it unless this
            or `memory` is given and they have more tokens together; then one is kept, and each is computed twice.
        memory: what the process (or GPU) may take, such as `2GB`; micro-batches and checkpointing are chosen to fit.
            Vectors of held-out pairs are not counted.
        shared_prefix_tokens: rows of a step that begin with so many equal tokens or more compute these once, which
            changes no result; 0 never. With dropout nothing is shared.
        shard_base: with torchrun: each worker keeps a part of the base's blocks, and all gather a block to compute it;
            for bases that do not fit one GPU.
        dtype: of activations: `auto` is bfloat16 where the processor has it, else float32.
        device: `cpu`, `cuda`, or `auto`.
        seed: of initialization, order and dropout.
        sample_rows: held-out rows whose completions are generated before and after training.
        sample_tokens: longest generated sample, in tokens.
        optim: `adamw`, or `muon` (arXiv 2502.16982), which moves all directions of a matrix equally far, of a layer or
            its adapter; embeddings, heads, vectors and experts stay with AdamW. Rates are about AdamW's.
    """

    per_device_train_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float | None = None
    loraplus_lr_ratio: float | None = None
    num_train_epochs: float = 1.0
    max_steps: int | None = None
    warmup_ratio: float = 0.05
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    eval_steps: int | None = None
    save_steps: int | None = None
    save_total_limit: int | None = None
    gradient_checkpointing: bool = False
    micro_batch_tokens: int | None = None
    memory: str | None = None
    shared_prefix_tokens: int = 24
    shard_base: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: int = 42
    sample_rows: int = 3
    sample_tokens: int = 128
    optim: Literal["adamw", "muon"] = "adamw"

    def __post_init__(self) -> None:
        faults = not_positive(
            self,
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "learning_rate",
            "loraplus_lr_ratio",
            "num_train_epochs",
            "max_steps",
            "eval_steps",
            "save_steps",
            "save_total_limit",
            "micro_batch_tokens",
            "sample_tokens",
        )
        if self.save_total_limit and not self.save_steps:
            faults.append("save_total_limit limits checkpoints, and none are written; give save_steps as well")
        if self.memory is not None and self.memory_bytes is None:
            faults.append(f"memory is {self.memory!r}; write a number and a unit, such as 2GB, 1.5GiB or 900MB")
        if not 0 <= self.warmup_ratio < 1:
            faults.append(f"warmup_ratio is {self.warmup_ratio}; it must lie in [0, 1)")
        if self.optim not in ("adamw", "muon"):
            faults.append(f"optim is {self.optim!r}; adamw and muon are known")
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
        refuse(faults)

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None where it is not given, or is no positive number with a unit."""
        return parse_bytes(str(self.memory or ""))
