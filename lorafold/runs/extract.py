"""An adapter out of two checkpoints: of every linear layer the best approximation of  W_tuned - W_base."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafold.adapters.fold import base_weight
from lorafold.adapters.lowrank import Reduced, reduced_dense
from lorafold.adapters.targets import HEADS, input_width, matrix_layers
from lorafold.config import AdapterSpec, RankConfig
from lorafold.errors import AdapterError, bullet_list
from lorafold.models.adapter_updates import Place, StoredAdapter
from lorafold.models.load import LoadedModel
from lorafold.quant.linear import QuantEmbedding, QuantLinear, plain_parameters
from lorafold.runs.arithmetic import Outcome


@dataclass(frozen=True)
class Extraction:
    """What was found between two models.

    Attributes:
        outcome: the adapter, with the energy of the difference that it keeps, layer by layer.
        left_out: names of tensors that differ as well and are no linear layers of a block (head, embedding, norms).
    """

    outcome: Outcome
    left_out: list[str]

    def describe(self) -> str:
        """What was found, and what the adapter does not hold."""
        return self.outcome.describe() + _beside(self.left_out)


def _beside(left_out: list[str]) -> str:
    """What differs and is not held, after something else that was said."""
    if not left_out:
        return ""
    names = ", ".join(left_out[:3]) + (", ..." if len(left_out) > 3 else "")
    return f"; {len(left_out)} other tensors differ, which no adapter holds: {names}"


@torch.no_grad()
def extract_adapter(
    base: LoadedModel, tuned: LoadedModel, size: RankConfig, progress: Callable[..., None]
) -> Extraction:
    """A LoRA for the base that brings it as near to the tuned model as its rank allows.

    Layers that do not differ get no adapter. The head is left out, as `all-linear` does.

    Args:
        progress: called after each layer.

    Raises:
        AdapterError: the models have other layers or other shapes, or do not differ; all faults are named.
    """
    ours, theirs = (_targets(loaded) for loaded in (base, tuned))
    faults = [f"{base.path} has no {name}" for name in theirs if name not in ours]
    for name, layer in ours.items():
        if name not in theirs:
            faults.append(f"{tuned.path} has no {name}")
        elif _shape(layer) != _shape(theirs[name]):
            faults.append(f"{name} is {_shape(layer)} in {base.path} and {_shape(theirs[name])} in {tuned.path}")
    if faults:
        listing = bullet_list(faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else []))
        raise AdapterError(f"these are no two states of one model:\n{listing}")
    results: dict[Place, Reduced] = {}
    for name, layer in ours.items():
        difference = _matrix(theirs[name]) - _matrix(layer)
        if difference.any():
            results[Place(name, "lora")] = reduced_dense(difference, size)
        progress()
    others = _differing(base.model, tuned.model, set(ours))
    if not results:
        raise AdapterError(f"no linear layer differs between {base.path} and {tuned.path}{_beside(others)}")
    like = StoredAdapter(Path(tuned.path), AdapterSpec("lora"), {}, str(base.path), base.weights_hash())
    energies = {place: (result.kept, result.total) for place, result in results.items()}
    outcome = Outcome(like, {place: result.update for place, result in results.items()}, energies)
    return Extraction(outcome, others)


def target_count(loaded: LoadedModel) -> int:
    """Number of layers that are compared."""
    return len(_targets(loaded))


def _targets(loaded: LoadedModel) -> dict[str, nn.Linear | QuantLinear | Conv1D]:
    layers = matrix_layers(loaded.model)
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] not in HEADS}


def _matrix(layer: nn.Linear | QuantLinear | Conv1D) -> Tensor:
    """The weight [O, I] float32."""
    return base_weight(layer).T if isinstance(layer, Conv1D) else base_weight(layer)


def _shape(layer: nn.Linear | QuantLinear | Conv1D) -> tuple[int, int]:
    width = input_width(layer)
    return layer.weight.numel() // width if isinstance(layer, Conv1D) else layer.out_features, width


def _differing(base: nn.Module, tuned: nn.Module, targets: set[str]) -> list[str]:
    """Tensors outside the targets that differ, or that only one model has."""
    ours, theirs = (_others(model, targets) for model in (base, tuned))
    names = dict.fromkeys((*ours, *theirs))
    return [n for n in names if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])]


def _others(model: nn.Module, targets: set[str]) -> dict[str, Tensor]:
    plain = plain_parameters(model, torch.float32)
    found = {name: value for name, value in plain.items() if name.removesuffix(".weight") not in targets}
    for path, module in model.named_modules():
        if isinstance(module, QuantLinear | QuantEmbedding) and path not in targets:
            found[f"{path}.weight"] = module.packed.decode(torch.float32)
    return found
