"""Rows of the table of `bits_methods`: what is trained, by which optimizer, and how it is quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafold.config import AdapterSpec


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        base: the model that is trained: "dense", "nf4", or "quantized" (with GPTQ, in the bits of the column).
        rates: learning rates to choose among; none: those of `--lora-rates`.
        after: how the merged model is quantized (dense and nf4 only).
        then: what is trained on that file, and at which rate; None where nothing is.
        epochs: over the rows.
        optim: AdamW or Muon.
    """

    base: str
    spec: AdapterSpec
    rates: tuple[float, ...]
    after: str | None = None
    then: tuple[AdapterSpec, float] | None = None
    epochs: int = 1
    optim: Literal["adamw", "muon"] = "adamw"


METHODS = {
    "LoRA r=8, merged, GPTQ": Method("dense", AdapterSpec("lora", 8), (), "gptq"),
    "LoRA r=8, merged, rounded to nearest": Method("dense", AdapterSpec("lora", 8), (), "rtn"),
    "QLoRA (NF4) r=8, merged, GPTQ": Method("nf4", AdapterSpec("lora", 8), (), "gptq"),
    "QA-LoRA r=16 on the GPTQ base": Method("quantized", AdapterSpec("qa-lora", 16), (4e-3, 8e-3)),
    "QA-LoRA, all offsets": Method("quantized", AdapterSpec("qa-lora", "full"), (5e-4, 1e-3)),
    "QA-LoRA, all offsets and scales": Method("quantized", AdapterSpec("qa-lora", "full", adapt="both"), (5e-4,)),
    "LoRA r=8, merged, GPTQ, then all offsets": Method(
        "dense", AdapterSpec("lora", 8), (), "gptq", (AdapterSpec("qa-lora", "full"), 3e-4)
    ),
    "LoRA r=8, two epochs, merged, GPTQ": Method("dense", AdapterSpec("lora", 8), (), "gptq", epochs=2),
    "LoRA r=8 by Muon, merged, GPTQ": Method("dense", AdapterSpec("lora", 8), (2e-3,), "gptq", optim="muon"),
    "QA-LoRA, all offsets by Muon": Method("quantized", AdapterSpec("qa-lora", "full"), (5e-4, 2.5e-4), optim="muon"),
    "QA-LoRA, all offsets and scales by Muon": Method(
        "quantized", AdapterSpec("qa-lora", "full", adapt="both"), (5e-4, 2.5e-4), optim="muon"
    ),
    "QA-LoRA r=16 by Muon": Method("quantized", AdapterSpec("qa-lora", 16), (2e-3,), optim="muon"),
    "QLoRA (NF4) r=8 by Muon, merged, GPTQ": Method("nf4", AdapterSpec("lora", 8), (2e-3,), "gptq", optim="muon"),
    "LoRA r=8 by Muon, merged, rounded to nearest": Method(
        "dense", AdapterSpec("lora", 8), (2e-3,), "rtn", optim="muon"
    ),
}
