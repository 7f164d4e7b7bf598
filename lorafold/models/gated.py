"""The gated activation of a transformer block, silu(gate) * up, that keeps its two inputs only.

transformers computes it in two steps, each of which keeps a tensor as wide as the block for the backward pass; the
gradients here are formed from gate and up alone (arXiv 2002.05202).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.together import together
from lorafold.kernels import block
from lorafold.kernels.choice import kernels_for
from lorafold.kernels.compiled import empty
from lorafold.quant.again import once_differentiable, remember

# classes whose forward is down_proj(act_fn(gate_proj(x)) * up_proj(x))
REPLACED = ("LlamaMLP", "Qwen2MLP", "Qwen3MLP", "MistralMLP")
SILU = ("SiLU", "SiLUActivation")


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return kernels_for(gate).swiglu(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return kernels_for(gate).swiglu_backward(gate, up, grads[0])


class _StackedSwiGLU(torch.autograd.Function):
    """The same for gate and up as halves of one tensor."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        return _of_halves(both)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (both,) = ctx.saved_tensors
        d_both = empty(*both.shape, dtype=both.dtype)
        gate, up = both.chunk(2, -1)
        d_gate, d_up = d_both.chunk(2, -1)
        block.swiglu_backward(gate, up, grads[0], (d_gate, d_up))
        return d_both


def _of_halves(both: Tensor) -> Tensor:
    return block.swiglu(*both.chunk(2, -1))


def gated_forward(module: Any, x: Tensor) -> Tensor:
    """The forward pass of a gated block, [..., N] -> [..., N]."""
    covered = block.usable(x) and module.gate_proj.out_features % 16 == 0
    both = together(x, (module.gate_proj, module.up_proj)) if covered else None
    if both is not None:
        gated: Tensor = _StackedSwiGLU.apply(both)  # type: ignore[assignment]
        return module.down_proj(remember(gated, _of_halves, both))
    gate, up = module.gate_proj(x), module.up_proj(x)
    if (kernels := kernels_for(gate)) is None or gate.dtype != up.dtype:
        return module.down_proj(module.act_fn(gate) * up)
    gated = _SwiGLU.apply(gate, up)  # type: ignore[assignment]
    return module.down_proj(remember(gated, kernels.swiglu, gate, up))


def replace_gated(model: nn.Module) -> None:
    """Give every gated block of transformers that uses silu this forward pass."""
    for module in model.modules():
        if type(module).__name__ in REPLACED and type(getattr(module, "act_fn")).__name__ in SILU:  # noqa: B009
            module.forward = MethodType(gated_forward, module)
