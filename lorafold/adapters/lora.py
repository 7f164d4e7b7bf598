"""LoRA (arXiv 2106.09685):  y = W0 x + s B A x,  with W0 frozen, A [r, in], B [out, r], s = alpha / r."""

# r rank, I input features, O output features

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorafold.quant.linear import QuantLinear, frozen_weight, multiply


class _LoRALinear(torch.autograd.Function):
    """Base and branch in one: both add to one output, and to one gradient of the input, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, scaling: float, weight: Callable[[], Tensor]) -> Tensor:
        rows = x.flatten(0, -2)
        hidden = F.linear(rows, a.to(x.dtype))
        y = multiply(rows, weight(), True)
        y.addmm_(hidden, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(x, hidden, a, b)
        ctx.scaling, ctx.weight = scaling, weight
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None, None]:
        x, hidden, a, b = ctx.saved_tensors
        dy = grads[0].flatten(0, -2)
        d_hidden = (dy @ b.to(dy.dtype)) * ctx.scaling
        d_a, d_b = d_hidden.t() @ x.flatten(0, -2), (dy.t() @ hidden).float() * ctx.scaling
        dx = None
        if ctx.needs_input_grad[0]:
            dx = multiply(dy, ctx.weight(), False).addmm_(d_hidden, a.to(dy.dtype)).view_as(x)
        return dx, d_a.float(), d_b, None, None


class LoRA(nn.Module):
    """The low-rank branch of one linear layer; of the base it wants the dense weight, however that is stored.

    A starts as PEFT's (Kaiming uniform with a = sqrt 5), B as zero, so the first output is the base's.

    Args:
        in_features, out_features: I and O of the layer.
        r: rank.
        scaling: s.
        dropout: probability of zeroing an input feature while training.
    """

    def __init__(self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor, base: nn.Linear | QuantLinear) -> Tensor:
        """base(x) + s B A x for x [..., I] -> [..., O], computed in the type of x; one pass over the output."""
        bias = base.bias
        if not (self.training and self.dropout) and (weight := frozen_weight(base, x.dtype)):
            y: Tensor = _LoRALinear.apply(x, self.lora_A, self.lora_B, self.scaling, weight)  # type: ignore[assignment]
            return y if bias is None else y + bias.to(y.dtype)
        y = base(x)
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        out = torch.addmm(y.flatten(0, -2), hidden, self.lora_B.to(x.dtype).t(), alpha=self.scaling)
        return out.view_as(y)

    def delta(self) -> Tensor:
        """The update of the weight, s B A [O, I]."""
        return self.scaling * (self.lora_B @ self.lora_A)
