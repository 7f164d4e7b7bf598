"""Adapters on any torch module, in three lines:

adaptation = lorafold.adapt(model, lorafold.AdapterSpec("lora", r=8, target_modules=("q_proj", "v_proj")))
print(adaptation.table())
...                               # train whatever requires a gradient
lorafold.unload(model, merge=True)  # the plain module again, with the adapter in its weights
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorafold.adapters.adapted import (
    AdaptedLayer,
    AdaptedParameter,
    Carrier,
    adapter_names,
    carrier_uses,
    carriers,
    delete_adapter,
    plain_parameter,
    set_active,
    uses,
)
from lorafold.adapters.fold import merged_weight
from lorafold.adapters.inject import inject
from lorafold.adapters.tied import source_of, tied_pair
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.quant.linear import QuantEmbedding, QuantLinear

Row = tuple[str, str, tuple[int, ...], int]
Use = tuple[nn.Module, str]  # a module and the name of its parameter


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
    before = [(carrier, carrier.wanted) for _, carrier in carriers(model)]
    set_active(model, None)
    try:
        yield
    finally:
        for carrier, wanted in before:
            carrier.wanted = wanted


@contextlib.contextmanager
def merged(model: nn.Module) -> Iterator[None]:
    """Inside, the active adapters are in the weights, so that the forward pass costs what it cost before.

    The weights are restored, bit for bit. For inference; nothing is trained inside.

    Raises:
        AdapterError: a layer is packed, where only `lorafold fold` can put an update.
    """
    before = [(carrier, carrier.wanted) for _, carrier in carriers(model)]
    undo: list[Callable[[], object]] = []
    _refuse_packed(model)
    try:
        with torch.no_grad():
            for weight, new, alone in _merges(model):
                if alone:
                    undo += [partial(_put, module, name, weight) for module, name in alone]
                else:
                    undo.append(partial(weight.copy_, weight.clone()))
                _merge(weight, new, alone)
        set_active(model, None)
        yield
    finally:
        with torch.no_grad():
            for step in undo:
                step()
        for carrier, wanted in before:
            carrier.wanted = wanted


def _refuse_packed(model: nn.Module) -> None:
    packed = [path for path, c in carriers(model) if c.active and isinstance(c, AdaptedLayer) and _is_packed(c.base)]
    if packed:
        raise AdapterError(
            f"{len(packed)} layers are packed ({packed[0]} ...), so an update cannot be put into their weights here; "
            "use lorafold fold"
        )


def _merges(model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor, list[Use]]]:
    """(weight, the weight with its active adapters, its uses that are meant) of whatever has some.

    There are no uses where all are meant: then the weight may change where it lies.
    """
    counts = Counter(value.data_ptr() for _, _, value in uses(model))
    found: dict[tuple[int, ...], tuple[nn.Parameter, Carrier, list[Use]]] = {}
    for path, carrier in carriers(model):
        if not carrier.active:
            continue
        if isinstance(carrier, AdaptedParameter):
            weight, own = plain_parameter(model, path), carrier_uses(model, carrier)
        else:
            weight, own = carrier.base.weight, [(carrier.base, "weight")]
        assert isinstance(weight, nn.Parameter)
        update = (id(source_of(carrier.adapters[name])) for name in carrier.active)
        found.setdefault((weight.data_ptr(), *update), (weight, carrier, []))[2].extend(own)
    for weight, carrier, own in found.values():
        new = carrier(weight) if isinstance(carrier, AdaptedParameter) else merged_weight(carrier)
        yield weight, new.to(weight.dtype), [] if len(own) == counts[weight.data_ptr()] else own


def _merge(weight: nn.Parameter, new: Tensor, alone: list[Use]) -> None:
    """Put merged numbers in the weight, or give some of its uses a weight of their own."""
    if not alone:
        weight.copy_(new)
        return
    own = nn.Parameter(new, requires_grad=weight.requires_grad)
    for module, name in alone:
        _put(module, name, own)


def _put(module: nn.Module, name: str, weight: nn.Parameter) -> None:
    if parametrize.is_parametrized(module, name):
        module.parametrizations[name].original = weight  # type: ignore[index, union-attr]
    else:
        setattr(module, name, weight)


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """Take all adapters off, with `merge` after putting the active ones into the weights.

    Where a weight has several uses and an adapter is on some of them, these get a weight of their own. Of embedding and
    head the model's config says so afterwards, and the caller is warned.

    Raises:
        AdapterError: as `merged`; nothing is changed then.
    """
    if merge:
        pair = tied_pair(model)
        _refuse_packed(model)
        with torch.no_grad():
            for merged_one in _merges(model):
                _merge(*merged_one)
        if pair is not None and tied_pair(model) is None:
            model.config.tie_word_embeddings = False  # type: ignore[union-attr]
            warnings.warn(f"{pair[0]} and {pair[1]} have weights of their own now", stacklevel=2)
    set_active(model, None)
    for name in adapter_names(model):
        delete_adapter(model, name)
    return model
