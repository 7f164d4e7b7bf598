"""Layers whose weights stay packed: decoded when they are needed and forgotten at once.

Forward:   Y = X W^T,  W = decode(blocks, offset)
Backward:  dX = dY W (decoded a second time), and for affine formats with a trained offset
           dOffset = dY^T pooled(X),  pooled(X)[t, g] = sum of X[t, j] over j in group g,
so of the input only the pooled sums are kept, 1/32 of it, and no dense weight survives a layer. A trained scale needs
           dScale[o, g] = sum over j in g of dW[o, j] (code[o, j] - zero),  dW = dY^T X,
the whole input and a third matrix product.
"""

# T tokens (all leading dimensions flattened), I input features, O output features, G groups in a row

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafold.kernels import block, products
from lorafold.kernels.compiled import empty
from lorafold.quant.again import once_differentiable, to_keep
from lorafold.quant.weight import QuantizedWeight, StackedWeight

_GRADIENT_ENTRIES = 1 << 22  # weights whose dense gradient is held at once
MOST_KEPT = 1 << 29  # weights that `decoded_once` keeps: 1 GiB in bfloat16


class _Room(threading.local):
    """Memory of a thread for one decoded weight: what is freed and asked for again would lie about in pieces."""

    numbers = torch.empty(0)


_room = _Room()


def decoded(
    weight: QuantizedWeight | StackedWeight,
    dtype: torch.dtype,
    offset: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The dense weight [O, I], good until the next one is decoded."""
    count = weight.shape[0] * weight.shape[1]
    if isinstance(weight, QuantizedWeight) and weight.blocks.device.type != "cpu":
        return weight.decode(dtype, offset, scale)
    if _room.numbers.dtype != dtype or len(_room.numbers) < count:
        with torch.inference_mode(False):  # it will be written to in training as well
            _room.numbers = torch.empty(count, dtype=dtype)
    return weight.decode(dtype, offset, scale, _room.numbers)


def multiply(x: Tensor, weight: Tensor, transposed: bool, branch: tuple[Tensor, Tensor, float] | None = None) -> Tensor:
    """X W^T (`transposed`; weight [N, K]) or X W (weight [K, N]) for X [..., K] -> [..., N], nothing differentiated.

    Args:
        branch: for X [M, K]: E [M, R], F [N, R] (`transposed`) or [R, N] of any type, and s; s E F^T or s E F is added.
    """
    usable = products.usable(x, weight)
    if branch is None:
        return products.multiply(x, weight, transposed) if usable else _product(x, weight, transposed)
    e, f, s = branch
    if usable:
        return products.multiply(x, weight, transposed, (e, (s * f).to(e.dtype)))
    return _product(x, weight, transposed).addmm_(e, (f.t() if transposed else f).to(e.dtype), alpha=s)


def _product(x: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """By torch, on a CPU into memory that glibc finds again (see `empty`)."""
    w = weight.t() if transposed else weight
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return x @ w
    y = empty(*x.shape[:-1], w.shape[1], dtype=x.dtype)
    torch.mm(x.reshape(-1, x.shape[-1]), w, out=y.view(-1, w.shape[1]))
    return y


def multiply_into(x: Tensor, weight: Tensor, room: Tensor) -> Tensor:
    """X W^T for X [M, K] and weight [N, K], put into a room [M, N]; M is a multiple of 32."""
    if products.usable(x, weight):
        return products.multiply(x, weight, True, room=room)
    return torch.mm(x, weight.T, out=room)


def cross(p: Tensor, d: Tensor) -> Tensor:
    """P^T D float32 [G, N] for P [T, G] and D [T, N], nothing differentiated."""
    return products.cross(p, d) if products.crosses(p, d) else (p.t() @ d).float()


def pooled(x: Tensor, size: int) -> Tensor:
    """The sum of X [..., I] over each group of `size` inputs, [..., I / size]; nothing is differentiated."""
    return block.pool(x, size) if block.usable(x) else x.unflatten(-1, (-1, size)).sum(-1)


class _PackedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offset: Tensor | None, scale: Tensor | None, weight: QuantizedWeight) -> Tensor:
        ctx.weight, ctx.input = weight, None
        kept: tuple[Tensor, ...] = ()
        if scale is not None and scale.requires_grad:
            ctx.input, kept = to_keep(x)
        elif offset is not None and offset.requires_grad:
            kept = (pooled(x, weight.format.group_size),)
        ctx.save_for_backward(offset, scale, *kept)
        return multiply(x, decoded(weight, x.dtype, offset, scale), True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (dy,) = grads
        offset, scale, *kept = ctx.saved_tensors
        dx = multiply(dy, decoded(ctx.weight, dy.dtype, offset, scale), False) if ctx.needs_input_grad[0] else None
        d_offset = d_scale = None
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[2]:
            d_offset, d_scale = _group_gradients(rows, ctx.input(*kept).reshape(-1, ctx.weight.shape[1]), ctx.weight)
        elif ctx.needs_input_grad[1]:
            d_offset = cross(kept[0].reshape(-1, kept[0].shape[-1]), rows).t()
        return dx, d_offset if ctx.needs_input_grad[1] else None, d_scale, None


def multiply_packed(x: Tensor, weight: StackedWeight, offset: Tensor | None = None) -> Tensor:
    """X W^T [..., O] for X [..., I]; `offset` [O, G] stands in for the stored ones."""
    y: Tensor = _PackedMatmul.apply(x, offset, None, weight)  # type: ignore[assignment]
    return y


class _PackedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, offset: Tensor | None, scale: Tensor | None, weight: QuantizedWeight, ids: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.weight, ctx.ids = weight, ids
        own = [None if values is None else values[ids] for values in (offset, scale)]
        return weight.rows(ids).decode(dtype, *own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        codec, dy = ctx.weight.format, grads[0].float()
        empty = dy.new_zeros(ctx.weight.shape[0], ctx.weight.shape[1] // codec.group_size)
        d_offset = d_scale = None
        if ctx.needs_input_grad[0]:
            d_offset = empty.index_add(0, ctx.ids, dy.unflatten(1, (-1, codec.group_size)).sum(-1))
        if ctx.needs_input_grad[1]:
            moved = dy.unflatten(1, (-1, codec.group_size)) * codec.levels(ctx.weight.rows(ctx.ids).blocks)
            d_scale = empty.index_add(0, ctx.ids, moved.sum(-1))
        return d_offset, d_scale, None, None, None


def _group_gradients(dy: Tensor, x: Tensor, weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """dOffset and dScale [O, G] from dY [T, O] and X [T, I], some output rows at a time."""
    codec, (out, width) = weight.format, weight.shape
    step = max(1, _GRADIENT_ENTRIES // width)
    d_offset = dy.new_empty(out, width // codec.group_size, dtype=torch.float32)
    d_scale = torch.empty_like(d_offset)
    for at in range(0, out, step):
        rows = slice(at, at + step)
        dense = (dy[:, rows].T @ x).float().unflatten(1, (-1, codec.group_size))
        d_offset[rows] = dense.sum(-1)
        d_scale[rows] = (dense * codec.levels(weight.blocks[rows])).sum(-1)
    return d_offset, d_scale


class _Packed(nn.Module):
    """A module around one packed matrix; `.to(device)` moves its blocks, casts leave them alone."""

    blocks: Tensor
    extra: Tensor | None

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.codec = weight.codec
        self.shape = weight.shape
        self.register_buffer("blocks", weight.blocks, persistent=False)
        self.register_buffer("extra", weight.extra, persistent=False)

    @property
    def packed(self) -> QuantizedWeight:
        """The matrix as stored."""
        return QuantizedWeight(self.codec, self.shape, self.blocks, self.extra)

    @packed.setter
    def packed(self, weight: QuantizedWeight) -> None:
        self.codec, self.shape, self.blocks, self.extra = weight.codec, weight.shape, weight.blocks, weight.extra


class QuantLinear(_Packed):
    """A linear layer [in -> out] on a packed weight; the bias, if any, is an ordinary frozen tensor."""

    bias: Tensor | None

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None = None):
        super().__init__(weight)
        self.register_buffer("bias", bias, persistent=False)
        self._keep_dense = False
        self._dense: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.shape[1]

    def forward(self, x: Tensor, offset: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Y [..., out] for X [..., in]; `offset` and `scale` [out, groups] stand in for the stored ones."""
        if self._keep_dense:
            if self._dense is None:
                self._dense = self.packed.decode(x.dtype, offset, scale)
            y = F.linear(x, self._dense)
        else:
            y = _PackedMatmul.apply(x, offset, scale, self.packed)  # type: ignore[assignment]
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.in_features} -> {self.out_features}, {self.codec}"


def untouched(module: nn.Module) -> bool:
    """Whether nobody watches a module or has replaced what it computes."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(own) and "forward" not in vars(module)


def stacked(layers: Sequence[nn.Module], x: Tensor) -> StackedWeight | None:
    """The weights of layers for one input; None unless all are packed, on a CPU, and `untouched`."""
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    parts = []
    for layer in layers:
        if not isinstance(layer, QuantLinear) or layer._keep_dense or not untouched(layer):
            return None
        parts.append(layer.packed)
    return StackedWeight(tuple(parts))


class QuantEmbedding(_Packed):
    """A lookup table [vocabulary, width] of which only the rows asked for are decoded.

    Args:
        weight: the packed table.
        dtype: of the vectors returned.
        scale: multiplied with every vector (Gemma: sqrt(width)).
    """

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, scale: float = 1.0):
        super().__init__(weight)
        self.dtype = dtype
        self.scale = scale

    def forward(self, ids: Tensor, offset: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Vectors [..., width] of the token ids; `offset` and `scale` [vocabulary, groups] replace the stored ones."""
        if ids.device.type == "cpu" and ids.numel() and int(ids.min()) < 0:  # a GPU would have to be waited for
            raise IndexError("a token id is negative")
        rows: Tensor = _PackedRows.apply(offset, scale, self.packed, ids.flatten(), self.dtype)  # type: ignore[assignment]
        rows = rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype)
        return rows.view(*ids.shape, self.shape[1])

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        return f"{self.shape[0]} x {self.shape[1]}, {self.codec}"


def frozen_weight(layer: nn.Linear | QuantLinear, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """What gives the weight [out, in] in a type each time it is needed; None where it is trained or kept decoded."""
    if isinstance(layer, QuantLinear):
        packed = layer.packed
        return None if layer._keep_dense else lambda: decoded(packed, dtype)
    weight = layer.weight
    return None if weight.requires_grad or weight.dtype != dtype else lambda: weight


def plain_parameters(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter that is stored as plain numbers, in `dtype`, the biases of packed layers among them.

    Raises:
        ValueError: one of them is too large for that type.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        bias = {"bias": module.bias} if isinstance(module, QuantLinear) and module.bias is not None else {}
        found |= {f"{path}.{key}": value.detach().to(dtype).contiguous() for key, value in (own | bias).items()}
    wrong = [name for name, value in found.items() if not torch.isfinite(value).all()]
    if wrong:
        raise ValueError(f"{', '.join(wrong[:3])}: a number is not finite in {dtype}")
    return found


@contextlib.contextmanager
def decoded_once(model: nn.Module) -> Iterator[None]:
    """Inside, packed layers decode at their first use and keep the dense weight: for generation, token by token.

    Parameters and the active adapter must not change inside, and nothing is differentiated. Layers are kept until
    their weights have `MOST_KEPT` entries in all, so that a large model does not unfold in memory.
    """
    layers, kept = [], 0
    for module in model.modules():
        if isinstance(module, QuantLinear):
            kept += module.in_features * module.out_features
            if kept <= MOST_KEPT:
                layers.append(module)
    for layer in layers:
        layer._keep_dense = True
    try:
        yield
    finally:
        for layer in layers:
            layer._keep_dense, layer._dense = False, None
