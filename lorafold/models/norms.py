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

# classes that compute weight * (x rstd) in this order; Gemma's is another
REPLACED = ("LlamaRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "MistralRMSNorm")


class _RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if kernels := kernels_for(x):
            out, rstd = kernels.rms_norm(x, weight, eps)
            ctx.save_for_backward(x, weight, rstd)
            return out
        wide = x.float()
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        if kernels := kernels_for(x):
            return kernels.rms_norm_backward(x, weight, rstd, grads[0]), None, None
        normal = x.float() * rstd
        g = (grads[0] * weight).float()
        return (rstd * (g - normal * (g * normal).mean(-1, keepdim=True))).to(x.dtype), None, None


class RMSNorm(nn.Module):
    """RMS normalization over the last dimension (arXiv 1910.07467); fast with a frozen weight [width]."""

    def __init__(self, weight: nn.Parameter, eps: float):
        super().__init__()
        self.weight = weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """weight * x / rms(x), of the shape and type of x."""
        weight = self.weight
        if weight.requires_grad:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.variance_epsilon)).to(
                x.dtype
            )
        out: Tensor = _RMSNormFunction.apply(x, weight, self.variance_epsilon)  # type: ignore[assignment]
        return out


def replace_norms(model: nn.Module) -> None:
    """Put `RMSNorm` in the place of every module of transformers that computes the same."""
    for name, module in list(model.named_modules()):
        if type(module).__name__ in REPLACED:
            weight, eps = module.get_parameter("weight"), getattr(module, "variance_epsilon")  # noqa: B009
            model.set_submodule(name, RMSNorm(weight, eps))
