"""The elementwise work of a transformer block on a GPU in Triton, function by function what `block.py` has for a CPU.

torch's CUDA builds bring Triton; it needs a C compiler and Python's headers where it runs. Without any of these torch
operations do the work, which are the oracles here too.
"""

# pyright: reportInvalidTypeForm=false
# S rows of logits, V vocabulary; T tokens, N features of a token

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

triton: Any
tl: Any
try:
    import triton
    import triton.language as tl
except ImportError:  # a build of torch for CPUs, or a system that Triton does not know
    triton = tl = None

compiled: Callable[[Any], Any] = triton.jit if triton else lambda function: function
_OLDEST = (8, 0)  # compute capability that Triton supports
_TILE = 4096  # logits of a row at once


def usable(x: Tensor) -> bool:
    """Whether kernels run where this tensor lies, and take its type."""
    return x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16, torch.float32) and works(x.device)


@lru_cache
def works(device: torch.device) -> bool:
    """Whether Triton compiles for a GPU of this machine; warns where it should and does not."""
    if triton is None or torch.cuda.get_device_capability(device) < _OLDEST:
        return False
    try:
        cross_entropy_(torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device), True)
    except Exception as error:  # whatever a compiler, linker or driver says
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton does not compile here, training is slower without it: {reason}", stacklevel=2)
        return False
    return True


@compiled
def _cross_entropy(logits, targets, losses, width, CHANGES: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0)
    logits += row.to(tl.int64) * width
    target, column = tl.load(targets + row), tl.arange(0, TILE)
    chosen = tl.load(logits + target).to(tl.float32)
    largest, total = float("-inf"), 0.0
    for start in range(0, width, TILE):
        x = tl.load(logits + start + column, mask=start + column < width, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(largest, tl.max(x, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), 0)
        largest = larger
    normalizer = largest + tl.log(total)
    tl.store(losses + row, normalizer - chosen)
    if CHANGES:
        for start in range(0, width, TILE):
            inside = start + column < width
            x = tl.load(logits + start + column, mask=inside, other=0).to(tl.float32)
            p = tl.exp(x - normalizer) - tl.where(start + column == target, 1.0, 0.0)
            tl.store(logits + start + column, p.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The cross-entropy of each row of logits [S, V] with a target [S], float32 [S].

    With `gradient` the logits become its gradient, softmax less one at the target, in place.
    """
    assert logits.is_contiguous()
    losses = torch.empty(len(logits), device=logits.device)
    with torch.cuda.device_of(logits):
        tile = min(_TILE, triton.next_power_of_2(logits.shape[1]))
        _cross_entropy[(len(logits),)](logits, targets, losses, logits.shape[1], CHANGES=gradient, TILE=tile)
    return losses


@compiled
def _rms_norm(x, weight, out, rstd, width, eps, TILE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    wide = tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    normal = (wide * inverse).to(x.dtype.element_ty).to(tl.float32)
    y = tl.load(weight + column, mask=inside, other=0).to(tl.float32) * normal
    tl.store(rstd + row, inverse)
    tl.store(out + row * width + column, y.to(out.dtype.element_ty), mask=inside)


@compiled
def _rms_norm_backward(x, weight, rstd, dy, dx, width, TILE: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, TILE)
    inside = column < width
    inverse = tl.load(rstd + row)
    normal = tl.load(x + row * width + column, mask=inside, other=0).to(tl.float32) * inverse
    g = tl.load(dy + row * width + column, mask=inside, other=0).to(tl.float32)
    g *= tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    change = inverse * (g - normal * (tl.sum(g * normal, 0) / width))
    tl.store(dx + row * width + column, change.to(dx.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x) and 1 / rms(x) [...] float32, over the last dimension of x [..., N]."""
    x, rstd, width = x.contiguous(), torch.empty(x.shape[:-1], device=x.device), x.shape[-1]
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rms_norm[(rstd.numel(),)](x, weight, out, rstd, width, eps, TILE=triton.next_power_of_2(width))
    return out, rstd


def rms_norm_backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x."""
    x, dy, width = x.contiguous(), dy.contiguous(), x.shape[-1]
    dx = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rms_norm_backward[(rstd.numel(),)](x, weight, rstd, dy, dx, width, TILE=triton.next_power_of_2(width))
    return dx


@compiled
def _swiglu(gate, up, out, count, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    g = tl.load(gate + at, mask=at < count, other=0).to(tl.float32)
    y = g / (1 + tl.exp(-g)) * tl.load(up + at, mask=at < count, other=0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=at < count)


@compiled
def _swiglu_backward(gate, up, dy, d_gate, d_up, count, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = at < count
    g = tl.load(gate + at, mask=inside, other=0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0).to(tl.float32)
    sigmoid = 1 / (1 + tl.exp(-g))
    tl.store(d_up + at, (d * g * sigmoid).to(d_up.dtype.element_ty), mask=inside)
    d *= tl.load(up + at, mask=inside, other=0).to(tl.float32) * sigmoid * (1 + g * (1 - sigmoid))
    tl.store(d_gate + at, d.to(d_gate.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [..., N]."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device_of(gate):
        _swiglu[(triton.cdiv(out.numel(), 1024),)](gate, up, out, out.numel(), TILE=1024)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` with respect to gate and up."""
    gate, up, dy = (x.contiguous() for x in (gate, up, dy))
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    with torch.cuda.device_of(gate):
        launch = _swiglu_backward[(triton.cdiv(dy.numel(), 1024),)]
        launch(gate, up, dy, d_gate, d_up, dy.numel(), TILE=1024)
    return d_gate, d_up
