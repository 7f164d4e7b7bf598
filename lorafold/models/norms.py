"""RMS normalization that keeps its 16-bit input and one number a row for the backward pass.

transformers' module computes in float32 step by step and so keeps two float32 copies of its input; in a small model
these are a quarter of all activation memory. The arithmetic here is the same, and its gradient (weights frozen) is

    dX = rstd (G - Xhat mean(G Xhat)),   G = dY weight,   Xhat = X rstd.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafold.kernels.choice import kernels_for
from lorafold.quant.again import once_differentiable, remember

# classes that compute weight * (x rstd) in this order; Gemma's is another
REPLACED = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, rstd = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        if kernels := kernels_for(x):
            return kernels.rms_norm_backward(x, weight, rstd, grads[0]), None, None
        normal = x.float() * rstd
        g = (grads[0] * weight).float()
        return (rstd * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype), None, None


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x), and 1 / rms(x) [..., 1] or [...]."""
    if kernels := kernels_for(x):
        return kernels.rms_norm(x, weight, eps)
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * (wide * rstd).to(x.dtype), rstd


class RMSNorm(nn.Module):
    """RMS normalization over the last dimension (arXiv 1910.07467); fast with a frozen weight [width]."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """weight * x / rms(x), of the shape and type of x."""
        weight, eps = self.weight, self.variance_epsilon
        if weight.requires_grad and torch.is_grad_enabled():
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
        out: Tensor = _RMSNormFunction.apply(x, weight, eps)  # type: ignore[assignment]
        return remember(out, lambda x, weight: _normalize(x, weight, eps)[0], x, weight)


def replace_norms(model: nn.Module) -> None:
    """Put `RMSNorm` in the place of every module of transformers that computes the same."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in REPLACED:
            weight, eps = module.get_parameter("weight"), getattr(module, "variance_epsilon")  # noqa: B009
            model.set_submodule(name, RMSNorm(weight, eps))
