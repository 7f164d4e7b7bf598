"""LoRA (arXiv 2106.09685):  y = W0 x + s B A x,  with W0 frozen, A [r, I], B [O, r], s = alpha / r.

What A and B are shaped like on other layers than linear ones stands in `sites.py`, how they begin in `start.py`. With
DoRA (arXiv 2402.09353) each output's weight has a learned length m and the direction of W0 + s B A:

    y = (m / |W0 + s B A|) (W0 + s B A) x,    the norm taken over inputs and not differentiated (its section 4.3).
"""

# r rank, I input features, O output features

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafold.adapters.sites import LinearSite
from lorafold.quant.again import once_differentiable, to_keep
from lorafold.quant.linear import QuantLinear, cross, decoded, frozen_weight, multiply
from lorafold.quant.weight import StackedWeight


class _LoRALinear(torch.autograd.Function):
    """Base and branch in one: both add to one output, and to one gradient of the input, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, weight: Callable[[], Tensor]) -> Tensor:
        rows = x.flatten(0, -2)
        hidden = F.linear(rows, a.to(x.dtype))
        y = multiply(rows, weight(), True, (hidden, b, scaling))
        ctx.input, kept = to_keep(x)
        ctx.save_for_backward(hidden, a, b, *kept)
        ctx.scaling, ctx.weight = scaling, weight
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        hidden, a, b, *kept = ctx.saved_tensors
        x, dy = ctx.input(*kept), grads[0].flatten(0, -2)
        d_hidden = (dy @ b.to(dy.dtype)) * ctx.scaling
        d_a, d_b = (d_hidden.t() @ x.flatten(0, -2)).float(), cross(hidden, dy).t() * ctx.scaling
        dx = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy, ctx.weight(), False, (d_hidden, a, 1.0)).view_as(x)
        return dx, d_a, d_b, None, None


def lora_linear(x: Tensor, a: Tensor, b: Tensor, weight: StackedWeight) -> Tensor:
    """W x + B A x [..., O] for x [..., I], A [r, I] and B [O, r]; W is frozen."""
    dtype = x.dtype  # x itself would be kept alive
    y: Tensor = _LoRALinear.apply(x, a, b, 1.0, lambda: decoded(weight, dtype))  # type: ignore[assignment]
    return y


def _computes_plainly(base: nn.Module) -> TypeGuard[nn.Linear | QuantLinear]:
    """Whether a layer does nothing but W x + b, and nobody watches it."""
    plain = isinstance(base, QuantLinear) or type(base).forward is nn.Linear.forward
    return plain and not (base._forward_hooks or base._forward_pre_hooks)


class LoRA(nn.Module):
    """The low-rank branch of one layer; of the base it wants the dense weight, however that is stored.

    Args:
        site: the frozen layer, and how LoRA sits on its kind.
        r: rank.
        scaling: s.
        dropout: probability of zeroing an input feature while training.
        dora: learn lengths as well.
    """

    lora_magnitude_vector: nn.Parameter
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, site: LinearSite, r: int, scaling: float, dropout: float = 0.0, dora: bool = False):
        super().__init__()
        self.site = site
        self.scaling = scaling
        self.dropout = dropout if site.linear else 0.0
        self.dora = dora
        a, b = site.shapes(r)
        self.register_parameter(site.names[0], nn.Parameter(torch.empty(a)))
        self.register_parameter(site.names[1], nn.Parameter(torch.zeros(b)))
        if dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(b[0]))
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)
        self.kept_norm: Tensor | None = None  # while the weights stand still, see `parameters_once`

    def learned(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        a, b = self.site.names
        return getattr(self, a), getattr(self, b)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the whole update: with a start that is no zero, minus B0 A0, so the rank is 2 r then."""
        a, b = self.learned()
        if self.start_A is None or self.start_B is None:
            return a, b
        return torch.cat([a, self.start_A]), torch.cat([b, -self.start_B], 1)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """|W0 + s B A| of each output, [O] float32."""
        if self.kept_norm is not None:
            return self.kept_norm
        return torch.linalg.vector_norm(self.site.matrix() + self._product(), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """The adapted layer's output for its input x, in the base's output type."""
        base = self.site.base
        fused = _computes_plainly(base) and not (self.training and self.dropout)
        weight = frozen_weight(base, x.dtype) if fused and not torch.is_autocast_enabled(x.device.type) else None
        if weight is None:
            y = base(x)
            return y + self.extra(x, y)
        y: Tensor = _LoRALinear.apply(x, *self.factors(), self.scaling, weight)  # type: ignore[no-redef, assignment]
        if self.dora:
            y = y * (self.lora_magnitude_vector / self.norm()).to(y.dtype)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def extra(self, x: Tensor, y: Tensor) -> Tensor:
        """What the adapter adds to the base's output y for the input x."""
        dropping = self.training and self.dropout > 0
        seen = F.dropout(x, self.dropout, True) if dropping else x
        added = self._branch(seen, self.factors(), y.dtype)
        lost = 0.0  # what the start takes from the base sees all of x, as PEFT's base does, which has lost it for good
        if dropping and self.start_A is not None and self.start_B is not None:
            start = self.start_A, self.start_B
            lost = self._branch(x, start, y.dtype) - self._branch(seen, start, y.dtype)
        if not self.dora:
            return added - lost
        shape = [1] * y.dim()
        shape[self.site.channel] = -1
        length = (self.lora_magnitude_vector / self.norm()).to(y.dtype).view(shape)
        plain, bias = self.site.base(seen) if dropping else y, getattr(self.site.base, "bias", None)
        if bias is not None:
            plain = plain - bias.to(y.dtype).view(shape)
        return (length - 1) * plain + length * added - lost

    def _branch(self, x: Tensor, factors: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
        return self.scaling * self.site.branch(x, factors[0].to(dtype), factors[1].to(dtype))

    def _product(self) -> Tensor:
        a, b = self.factors()
        return self.scaling * self.site.product(a.float(), b.float())

    def delta(self) -> Tensor:
        """The update of the weight, in its shape, float32: s B A, with DoRA what lengths change as well."""
        update = self._product()
        if self.dora:
            weight = self.site.matrix()
            update = (self.lora_magnitude_vector / self.norm())[:, None] * (weight + update) - weight
        return self.site.stored(update)


class VeRA(LoRA):
    """LoRA with  A = diag(d) R_A,  B = diag(b) R_B  and random R_A [r, >= I], R_B [>= O, r] that all layers share.

    Source: arXiv 2310.11454. b begins as zero; the matrices are cut to the layer's size, as in PEFT.
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, site: LinearSite, r: int, shared: tuple[Tensor, Tensor], d: float, dropout: float):
        super().__init__(site, r, 1.0, dropout)
        (_, self.width), (self.out, _) = site.shapes(r)
        del self.lora_A, self.lora_B
        self.register_buffer("vera_A", shared[0], persistent=False)
        self.register_buffer("vera_B", shared[1], persistent=False)
        self.vera_lambda_d = nn.Parameter(torch.full((r,), d))
        self.vera_lambda_b = nn.Parameter(torch.zeros(self.out))

    def learned(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        a, b = self.vera_A[:, : self.width], self.vera_B[: self.out]
        return self.vera_lambda_d[:, None] * a, self.vera_lambda_b[:, None] * b
