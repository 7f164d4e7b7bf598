"""Muon: a matrix moves by what is nearest to orthogonal in its mean gradient, all else as AdamW moves it.

Sources: Keller Jordan and others, https://kellerjordan.github.io/posts/muon/ (2024); arXiv 2502.16982. AdamW divides
each number's gradient by its own size; here all directions of a matrix are made equally large. torch's own Muon takes
matrices alone, and computes in bfloat16, which many processors emulate.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_MOMENTUM = 0.9  # AdamW's first, which suits runs of few steps
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_SMALLEST = 1e-7  # of a gradient's norm; what is smaller counts as rounding


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V^T [O, I] float32, nearly, of a matrix U S V^T: singular values between 0.6 and 1.3, but for the smallest.

    Five steps of a Newton-Schulz iteration of fifth order. Of a matrix whose norm is below 1e-7 less comes out, and of
    zero nothing.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.t() if tall else matrix).float()
    x = x / x.norm().clamp_min(_SMALLEST)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if tall else x


class Muon(torch.optim.AdamW):
    """AdamW, but for groups that say `matrices`.

    An element of these moves by the learning rate in root mean square, as in a first step of AdamW. (The paper and
    torch move it by a fifth of that, as AdamW does in the long run.) Weight decay is decoupled. A matrix without a
    gradient stays.

    Args:
        groups: of parameters, each with `matrices`: whether they are matrices that are moved as such.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float):
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step; gradients stay."""
        moved = [(p, p.grad, g) for g in self.param_groups if g["matrices"] for p in g["params"] if p.grad is not None]
        for p, grad, group in moved:
            self._move(p, grad, group["lr"], group["weight_decay"])
            p.grad = None  # nothing of it is left for AdamW
        super().step()
        for p, grad, _ in moved:
            p.grad = grad

    def _move(self, p: Tensor, grad: Tensor, lr: float, weight_decay: float) -> None:
        state = self.state[p]
        if not state:
            state |= {"step": torch.tensor(0.0, device=p.device), "exp_avg": torch.zeros_like(p)}
        state["step"] += 1
        mean: Tensor = state["exp_avg"]
        mean.lerp_(grad.to(mean.dtype), 1 - _MOMENTUM)
        direction = orthogonalized(grad.lerp(mean.to(grad.dtype), _MOMENTUM)) * grad.any()  # Nesterov's
        p.mul_(1 - lr * weight_decay)
        p.add_(direction.to(p.dtype), alpha=-lr * math.sqrt(max(p.shape)))
