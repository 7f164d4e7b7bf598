"""One batch, another adapter for each row."""

# r rank, I input features, O output features, n adapters

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.adapted import AdaptedLayer, adapted_layers, carriers, refuse_unknown
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.sites import LinearSite
from lorafold.errors import AdapterError
from lorafold.quant.linear import QuantEmbedding, pooled


class _Rows:
    """Where the rows of a batch lie: one after the other in the first dimension, or end to end in a pack [1, T, ...].

    Args:
        count: number of rows.
        lengths: of the rows of a pack, in tokens.
    """

    def __init__(self, count: int, lengths: Sequence[int] | None):
        self.lengths = None if lengths is None or len(set(lengths)) == 1 else lengths
        self.count, self.packed, self.total = count, lengths is not None, sum(lengths or [])
        if self.lengths:
            starts = torch.tensor(self.lengths).cumsum(0) - torch.tensor(self.lengths)
            longest = max(self.lengths)
            self.padded = (starts[:, None] + torch.arange(longest)).clamp_max(sum(self.lengths) - 1).flatten()
            self.own = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(self.lengths)])

    def apart(self, x: Tensor) -> Tensor:
        """The rows [count, longest, N]; what stands after the end of a shorter one means nothing.

        Raises:
            AdapterError: there are not as many rows as adapters were named.
        """
        there = x.shape[1] if self.packed else len(x)
        if there != self.total if self.packed else there != self.count:
            what = f"{self.total} tokens" if self.packed else f"{self.count} rows"
            raise AdapterError(f"adapters were named for {what}, and a layer is given {there}")
        if self.lengths:
            return x[0].index_select(0, self.padded).unflatten(0, (self.count, -1))
        return x[0].unflatten(0, (self.count, -1)) if self.packed else x

    def together(self, rows: Tensor, like: Tensor) -> Tensor:
        """The inverse of `apart`."""
        if self.lengths:
            return rows.flatten(0, 1).index_select(0, self.own)[None]
        return rows.reshape(like.shape)


class _RowAdapters:
    """What the rows of a batch have of one layer's adapters.

    Low-rank factors of all adapters are stacked, A [n, r, I] and B [n, O, r] (lower ranks filled up with zeros); a
    group adapter is the change of the offsets that the file would hold, on inputs summed over groups. Whatever is
    neither goes adapter by adapter.
    """

    def __init__(self, layer: AdaptedLayer, names: Sequence[str | None], rows: _Rows, dtype: torch.dtype):
        known = [name for name in dict.fromkeys(names) if name is not None and name in layer.adapters]
        self.base: Any = layer.base
        self.rows = rows
        self.adapters: list[Any] = [layer.adapters[name] for name in known]
        index = torch.tensor([known.index(name) if name in known else len(known) for name in names])
        self.which = [(index == i).nonzero()[:, 0] for i in range(len(known))]
        self.group = 1
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        if isinstance(self.base, QuantEmbedding) and any(isinstance(a, GroupAdapter) for a in self.adapters):
            raise AdapterError("the offsets of an embedding cannot differ from row to row; those of other layers can")
        if all(isinstance(a, LoRA) and type(a.site) is LinearSite and not a.dora for a in self.adapters):
            stacked_a, stacked_b = _stacked([(*a.factors(), a.scaling) for a in self.adapters], dtype)
            self.a, self.b = stacked_a[index], stacked_b[index]
        elif all(isinstance(a, GroupAdapter) and not a.learns_scale for a in self.adapters):
            packed = self.base.packed
            self.group, stored = packed.format.group_size, packed.format.offset(packed.blocks)
            moved = [packed.format.move_offset(stored, a.offset_update()) - stored for a in self.adapters]
            self.b = torch.stack([*moved, torch.zeros_like(stored)]).to(dtype)[index]
        elif any(isinstance(a, GroupAdapter) for a in self.adapters):
            raise AdapterError("rows of one batch can have adapters of offsets or LoRA, not both, and none of scales")

    def __call__(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.b is None:
            seen, plain = self.rows.apart(x), self.rows.apart(y)
            added = torch.zeros_like(plain)
            for adapter, which in zip(self.adapters, self.which, strict=True):
                added[which] = adapter.extra(seen[which], plain[which])
            return y + self.rows.together(added, y)
        seen = self.rows.apart(pooled(x, self.group) if self.group > 1 else x)
        seen = seen.reshape(len(seen), -1, seen.shape[-1])
        hidden = seen if self.a is None else seen @ self.a.to(x.dtype).mT
        b = self.b.to(x.dtype).mT
        if self.rows.lengths:
            return y + self.rows.together(hidden @ b, y)
        y.view(len(seen), -1, y.shape[-1]).baddbmm_(hidden, b)  # in place: one pass less over the output
        return y


def _stacked(factors: list[tuple[Tensor, Tensor, float]], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A [n + 1, r, I] and s B [n + 1, O, r]; the last is zero, for rows without an adapter."""
    rank = max(a.shape[0] for a, _, _ in factors)
    first = factors[0]
    all_a = first[0].new_zeros(len(factors) + 1, rank, first[0].shape[1], dtype=dtype)
    all_b = first[1].new_zeros(len(factors) + 1, first[1].shape[0], rank, dtype=dtype)
    for i, (a, b, scaling) in enumerate(factors):
        all_a[i, : len(a)] = a
        all_b[i, :, : len(a)] = scaling * b
    return all_a, all_b


@contextlib.contextmanager
@torch.no_grad()
def adapters_by_row(
    model: nn.Module,
    rows: Sequence[str | None],
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Iterator[None]:
    """Inside, row i of a batch is computed with the adapter rows[i], or with the bare base for None.

    For inference. Updates of offsets are those that the file would hold.

    Args:
        rows: an adapter's name for each row.
        lengths: tokens of each row, where they lie end to end in one pack [1, T], given whole to every layer;
            otherwise they are the first dimension of every layer's input.
        dtype: of the activations.

    Raises:
        AdapterError: the model carries no adapter of such a name, or kinds that cannot be mixed.
    """
    refuse_unknown(model, sorted({name for name in rows if name is not None}))
    held = [c for _, c in carriers(model) if isinstance(c, AdaptedParameter) and set(c.adapters) & set(rows)]
    if held:
        raise AdapterError("adapters of parameters (experts, nn.MultiheadAttention) cannot differ from row to row")
    found = [carrier for _, carrier in carriers(model)]
    layers = [layer for _, layer in adapted_layers(model) if set(layer.adapters) & set(rows)]
    before, place = [carrier.wanted for carrier in found], _Rows(len(rows), lengths)
    try:
        for carrier in found:
            carrier.wanted = ()
        for layer in layers:
            layer.by_row = _RowAdapters(layer, rows, place, dtype)
        yield
    finally:
        for carrier, wanted in zip(found, before, strict=True):
            carrier.wanted = wanted
        for layer in layers:
            layer.by_row = None
