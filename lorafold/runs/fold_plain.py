"""What a file of GGUF or MLX holds as plain numbers: merged matrices, and parameters that were trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
def gguf_numbers(
    loaded: LoadedModel, updates: Iterable[Update], to: str | None
) -> tuple[dict[str, Entry], list[float]]:
    """Tensors of a GGUF file, in the order of its rows, and the share of each update that they hold.

    Args:
        to: a type of `DENSE_TYPES` for matrices; None keeps each tensor's own, as vectors do always.

    Raises:
        FoldError: numbers are beyond their type; all parameters concerned are named.
    """
    assert loaded.gguf is not None
    entries, kept, faults = {}, [], []
    for name, before, wanted in updates:
        place = binding_of_parameter(loaded, name)
        tensor = loaded.gguf.tensors.get(place.tensor) or loaded.gguf.tensors[_table(loaded)]
        kind = to.upper() if to and wanted.dim() > 1 else tensor.type
        stored = (wanted + place.shift).to(DENSE_TYPES[kind.lower()])
        kept.append(kept_fraction(stored.float() - place.shift - before, wanted - before))
        faults += _faults(name, stored)
        data = stored if place.row_order is None else stored[place.row_order.argsort()]
        entries[place.tensor] = (kind, data.contiguous().view(torch.uint8).numpy())
    _refuse(faults)
    return entries, kept


@torch.no_grad()
def mlx_numbers(loaded: LoadedModel, updates: Iterable[Update]) -> tuple[dict[str, Tensor], list[float]]:
    """The same of an MLX folder, each tensor in its own type."""
    assert loaded.mlx is not None
    plain, kept, faults = {}, [], []
    apart = taken_apart(loaded.model)
    for name, before, wanted in updates:
        own_head = apart is not None and name == f"{apart[1]}.weight"
        plain[name] = wanted.to(loaded.mlx.stored_dtype(f"{apart[0]}.weight" if apart and own_head else name))
        kept.append(kept_fraction(plain[name].float() - before, wanted - before))
        faults += _faults(name, plain[name])
    _refuse(faults)
    return plain, kept


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
