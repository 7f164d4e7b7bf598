"""What a file of GGUF or MLX holds as plain numbers: merged matrices, and parameters that were trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorafold.adapters.adapted import carriers
from lorafold.adapters.fold import base_weight, kept_fraction, merged_weight
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.tied import taken_apart, updated_layers
from lorafold.errors import FoldError, bullet_list
from lorafold.models.load import LoadedModel, binding_of_parameter
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.runs.fold_folder import before_and_after
from lorafold.runs.fold_report import DENSE_TYPES

Update = tuple[str, Tensor, Tensor]  # name of a parameter, its numbers without adapters and with them, in float32
Entry = tuple[str, np.ndarray]  # type name and bytes of a tensor of a GGUF file
T = TypeVar("T")


@dataclass
class Numbers(Generic[T]):
    """Tensors of a file, and how well they hold what was trained.

    Attributes:
        tensors: name in the file -> what stands there.
        kept: the share of each update that is left after rounding.
        exact: nothing was rounded.
    """

    tensors: dict[str, T] = field(default_factory=dict)
    kept: list[float] = field(default_factory=list)
    exact: bool = True

    def add(self, name: str, tensor: T, stored: Tensor, before: Tensor, wanted: Tensor) -> None:
        """Add a tensor, and compare the numbers read back with those before and after training."""
        self.tensors[name] = tensor
        self.kept.append(kept_fraction(stored - before, wanted - before))
        self.exact &= torch.equal(stored, wanted)


@torch.no_grad()
def whole_updates(loaded: LoadedModel) -> Iterator[Update]:
    """Parameters that were trained beside adapted layers, or without any: norms, biases, whole modules."""
    for name, carrier in carriers(loaded.model):
        if isinstance(carrier, AdaptedParameter) and carrier.active:
            before, wanted = before_and_after(loaded.model, name, carrier)
            yield name, before.cpu(), wanted.cpu()


@torch.no_grad()
def merged_updates(loaded: LoadedModel, packed: bool = True) -> Iterator[Update]:
    """Matrices of adapted layers.

    Args:
        packed: also of those that the base holds in quantized blocks.
    """
    for path, layer in updated_layers(loaded.model):
        if packed or not isinstance(layer.base, QuantLinear | QuantEmbedding):
            yield f"{path}.weight", base_weight(layer.base), merged_weight(layer)


@torch.no_grad()
def gguf_numbers(loaded: LoadedModel, updates: Iterable[Update], to: str | None) -> Numbers[Entry]:
    """Tensors of a GGUF file, in the order of its rows.

    Args:
        to: a type of `DENSE_TYPES` for matrices; None keeps each tensor's own, as vectors do always.

    Raises:
        FoldError: numbers are beyond their type; all parameters concerned are named.
    """
    assert loaded.gguf is not None
    numbers, faults = Numbers[Entry](), []
    for name, before, wanted in updates:
        place = binding_of_parameter(loaded, name)
        tensor = loaded.gguf.tensors.get(place.tensor) or loaded.gguf.tensors[_table(loaded)]
        kind = to.upper() if to and wanted.dim() > 1 else tensor.type
        stored = (wanted + place.shift).to(DENSE_TYPES[kind.lower()])
        faults += _faults(name, stored)
        data = stored if place.row_order is None else stored[place.row_order.argsort()]
        entry = (kind, data.contiguous().view(torch.uint8).numpy())
        numbers.add(place.tensor, entry, stored.float() - place.shift, before, wanted)
    _refuse(faults)
    return numbers


@torch.no_grad()
def mlx_numbers(loaded: LoadedModel, updates: Iterable[Update]) -> Numbers[Tensor]:
    """The same of an MLX folder, each tensor in its own type."""
    assert loaded.mlx is not None
    numbers, faults = Numbers[Tensor](), []
    apart = taken_apart(loaded.model)
    for name, before, wanted in updates:
        own_head = apart is not None and name == f"{apart[1]}.weight"
        stored = wanted.to(loaded.mlx.stored_dtype(f"{apart[0]}.weight" if apart and own_head else name))
        faults += _faults(name, stored)
        numbers.add(name, stored, stored.float(), before, wanted)
    _refuse(faults)
    return numbers


def _table(loaded: LoadedModel) -> str:
    """The embedding's tensor, in whose type a head is stored that had its weights."""
    apart = taken_apart(loaded.model)
    assert apart is not None
    return loaded.bindings[apart[0]].tensor


def _faults(name: str, stored: Tensor) -> list[str]:
    kind = str(stored.dtype).removeprefix("torch.")
    return [] if torch.isfinite(stored).all() else [f"{name}: a number is beyond {kind}"]


def _refuse(faults: list[str]) -> None:
    if faults:
        raise FoldError("the adapter cannot be folded:\n" + bullet_list(faults))
