"""Adapters on any torch module, in three lines:

adaptation = lorafold.adapt(model, lorafold.AdapterSpec("lora", r=8, target_modules=("q_proj", "v_proj")))
print(adaptation.table())
...                               # train whatever requires a gradient
lorafold.unload(model, merge=True)  # the plain module again, with the adapter in its weights
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lorafold.adapters.adapted import (
    AdaptedLayer,
    AdaptedParameter,
    carriers,
    delete_adapter,
    plain_modules,
    plain_parameter,
    set_active,
)
from lorafold.adapters.fold import merged_weight
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.quant.linear import QuantEmbedding, QuantLinear

Row = tuple[str, str, tuple[int, ...], int]


@dataclass(frozen=True)
class Adaptation:
    """What was adapted.

    Attributes:
        rows: (name, kind, shape of the weight, trained parameters) of every layer and parameter.
        trained, total: parameters that are trained, and all of them, the trained ones included.
    """

    rows: tuple[Row, ...]
    trained: int
    total: int

    def table(self) -> str:
        """The rows as aligned text, with the sums in the last line."""
        cells = [(name, kind, " x ".join(map(str, shape)), f"{count:,}") for name, kind, shape, count in self.rows]
        share = f"{self.trained / max(self.total, 1):.3%} of {self.total:,}"
        cells = [
            ("layer", "kind", "weight", "trained"),
            *cells,
            (f"{len(self.rows)} layers", "", share, f"{self.trained:,}"),
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(4)]
        lines = (
            f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}"
            for row in cells
        )
        return "\n".join(line.rstrip() for line in lines)


def adapt(model: nn.Module, spec: AdapterSpec, name: str = "default") -> Adaptation:
    """Freeze a module and put adapters on it; on the meta device nothing is computed, only counted.

    Raises:
        AdapterError: a target matches nothing, or goes not together with an option.
    """
    carried = {id(p) for _, carrier in carriers(model) for p in carrier.adapters.parameters()}
    frozen = [p for p in model.parameters() if id(p) not in carried]
    packed = [m for m in model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    base = sum(p.numel() for p in frozen) + sum(m.shape[0] * m.shape[1] for m in packed)
    result = inject(model, spec, name)
    for parameter in frozen:
        parameter.requires_grad_(False)
    rows = [_row(model, path, carrier, name) for path, carrier in carriers(model) if name in carrier.adapters]
    return Adaptation(tuple(rows), result.trainable, base + result.trainable)


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, QuantLinear | QuantEmbedding)


def _row(
    model: nn.Module, path: str, carrier: AdaptedLayer | AdaptedParameter, name: str
) -> tuple[str, str, tuple[int, ...], int]:
    trained = sum(p.numel() for p in carrier.adapters[name].parameters())
    if isinstance(carrier, AdaptedLayer):
        base = carrier.base
        shape = base.shape if _is_packed(base) else tuple(base.weight.shape)  # type: ignore[union-attr]
        return path, type(base).__name__, shape, trained  # type: ignore[return-value]
    parameter = plain_parameter(model, path)
    assert parameter is not None
    return path, "parameter", tuple(parameter.shape), trained


@contextlib.contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """Inside, the module computes as it did before it was adapted."""
    before = [(carrier, carrier.active) for _, carrier in carriers(model)]
    set_active(model, None)
    try:
        yield
    finally:
        for carrier, active in before:
            carrier.active = active


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, the active adapters are in the weights, so that the forward pass costs what it cost before.

    The weights are restored from copies, bit for bit. For inference; nothing is trained inside.

    Raises:
        AdapterError: a layer is packed, where only `lorafold fold` can put an update.
    """
    copies: list[tuple[Tensor, Tensor]] = []
    before = [(carrier, carrier.active) for _, carrier in carriers(model)]
    _refuse_packed(model)
    _refuse_shared(model)
    try:
        with torch.no_grad():
            for weight, new in _merges(model):
                copies.append((weight, weight.clone()))
                weight.copy_(new)
        set_active(model, None)
        yield
    finally:
        with torch.no_grad():
            for weight, copy in reversed(copies):
                weight.copy_(copy)
        for carrier, active in before:
            carrier.active = active


def _refuse_packed(model: nn.Module) -> None:
    packed = [path for path, c in carriers(model) if c.active and isinstance(c, AdaptedLayer) and _is_packed(c.base)]
    if packed:
        raise AdapterError(
            f"{len(packed)} layers are packed ({packed[0]} ...), so an update cannot be put into their weights here; "
            "use lorafold fold"
        )


def _refuse_shared(model: nn.Module) -> None:
    """Refuse weights that another module computes with as well: it would get the update too."""
    uses: dict[int, list[str]] = {}
    for path, module in plain_modules(model).items():
        for name, value in module.named_parameters(recurse=False):
            uses.setdefault(value.data_ptr(), []).append(f"{path}.{name}")
    for path, carrier in carriers(model):
        if carrier.active and isinstance(carrier, AdaptedLayer):
            others = uses.get(carrier.base.weight.data_ptr(), [])  # type: ignore[union-attr, operator]
            if len(others) > 1:
                raise AdapterError(
                    f"{path} shares its weight ({', '.join(others)}), so an update of one alone cannot be merged"
                )


def _merges(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """(weight, the weight with its active adapters) of whatever has some."""
    for path, carrier in carriers(model):
        if not carrier.active:
            continue
        if isinstance(carrier, AdaptedParameter):
            weight = plain_parameter(model, path)
            assert weight is not None
            yield weight, carrier(weight)
        else:
            weight = carrier.base.weight
            yield weight, merged_weight(carrier).to(weight.dtype)  # type: ignore[union-attr, arg-type]


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Take all adapters off, with `merge` after putting the active ones into the weights.

    Raises:
        AdapterError: as `merged`; nothing is changed then.
    """
    if merge:
        _refuse_packed(model)
        _refuse_shared(model)
        with torch.no_grad():
            for weight, new in _merges(model):
                weight.copy_(new)
    for name in {name for _, carrier in carriers(model) for name in carrier.adapters}:
        delete_adapter(model, name)
    return model
