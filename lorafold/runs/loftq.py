"""LoftQ (arXiv 2310.08659): a LoRA that begins with the largest part of what quantization loses.

For a weight W two things are done in turn, its algorithm 1:

    Q = quantize(W - B A),    B A = the best approximation of  W - decode(Q)  of rank r

with the quantizer of the format itself, so that training begins nearer to W than the packed file alone is. The error
|W - decode(Q) - B A| need not fall in every step; the step of the smallest is kept, the first of which is never worse
than Q alone.
"""

# r rank, I input features, O output features

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import inject
from lorafold.adapters.lora import LoRA
from lorafold.adapters.lowrank import LowRank, reduced_dense
from lorafold.config import AdapterSpec, RankConfig
from lorafold.models.adapter_files import save_adapter
from lorafold.models.load import load
from lorafold.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Fitted:
    """A quantized matrix, and with LoftQ what a LoRA gives back of what that lost.

    Attributes:
        weight: Q.
        update: B A, s being 1; None where there is no LoRA.
    """

    weight: QuantizedWeight
    update: LowRank | None = None

    def residual(self, dense: Tensor) -> Tensor:
        """What both lack of a matrix [O, I]."""
        lost = dense - self.weight.decode()
        return lost if self.update is None else lost - self.update.dense()


@torch.no_grad()
def alternate(dense: Tensor, quantized: Callable[[Tensor], QuantizedWeight], r: int, steps: int) -> Fitted:
    """A matrix [O, I] as Q + B A, by the step with the smallest error.

    Args:
        dense: W, float32.
        quantized: how a matrix is quantized.
        r: rank; at most min(O, I).
        steps: how often both things are done.
    """
    found: list[tuple[float, Fitted]] = []
    goal = dense
    for _ in range(steps):
        weight = quantized(goal)
        update = reduced_dense(dense - weight.decode(), RankConfig(r=r)).update
        fitted = Fitted(weight, update)
        found.append((float(fitted.residual(dense).double().square().sum()), fitted))
        goal = dense - update.dense()
    return min(found, key=lambda pair: pair[0])[1]


def start_folder(output: Path) -> Path:
    """Where the adapter lies that belongs to a quantized model."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}-loftq")


@torch.no_grad()
def save_start(output: Path, updates: Mapping[str, LowRank], r: int) -> Path:
    """Write the adapter beside the quantized model that it begins on, in PEFT's form; alpha is train's default.

    Args:
        output: the quantized model, which stands already: the adapter names the hash of its weights.
        updates: layer -> B A.

    Raises:
        OutputError: it cannot be written.
    """
    spec = AdapterSpec("lora", r)
    loaded = load(output)
    inject(loaded.model, replace(spec, target_modules=tuple(updates)))
    for path, layer in adapted_layers(loaded.model):
        assert isinstance(layer.adapter, LoRA)
        for parameter, value in zip(layer.adapter.learned(), (updates[path].a, updates[path].b), strict=True):
            parameter.copy_(value / math.sqrt(spec.scaling))
    save_adapter(start_folder(output), loaded, spec)
    return start_folder(output)
