"""The fused passes of a block on a CPU against transformers' modules, judged by the same modules in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from lorafold.kernels import block
from lorafold.models.gated import replace_gated

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
}


def _error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).norm() / exact.double().norm())


dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
ROUNDED = {torch.bfloat16: 2**-8, torch.float32: 4e-6}  # a last place, and of float32 what a few operations add up to


@dtypes
def test_swiglu_and_its_gradient(dtype: torch.dtype) -> None:
    """Rounded once, so at most half a unit in the last place (2^-9) off, and gradients likewise."""
    gate, up, dy = (4 * torch.randn(7, 48).to(dtype) for _ in range(3))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = F.silu(g) * u
    exact.backward(dy.double())
    d_gate, d_up = block.swiglu_backward(gate, up, dy)
    assert g.grad is not None
    assert u.grad is not None
    for ours, theirs in ((block.swiglu(gate, up), exact), (d_gate, g.grad), (d_up, u.grad)):
        torch.testing.assert_close(
            ours.double(), theirs.detach(), rtol=ROUNDED[dtype] * 1.01, atol=1e-30 if dtype == torch.bfloat16 else 1e-6
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 1e30, 0.0])
def test_swiglu_of_extreme_gates(value: float) -> None:
    """As torch computes it; 0 * infinity and NaN stay NaN."""
    gate, up = torch.ones(1, 16).bfloat16(), torch.full((1, 16), 2.0).bfloat16()
    gate[0, 3] = value
    torch.testing.assert_close(block.swiglu(gate, up), F.silu(gate) * up, equal_nan=True)


@dtypes
@pytest.mark.parametrize("vocabulary", [16, 48, 1008])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype) -> None:
    """Losses to float32's precision, gradients rounded once."""
    logits, targets = (6 * torch.randn(9, vocabulary)).to(dtype), torch.randint(vocabulary, (9,))
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    ours = logits.clone()
    torch.testing.assert_close(
        block.cross_entropy_(ours, targets, False).double(), losses.detach(), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(ours, logits)
    block.cross_entropy_(ours, targets, True)
    assert exact.grad is not None
    torch.testing.assert_close(ours.double(), exact.grad, rtol=ROUNDED[dtype], atol=1e-6)


@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cross_entropy_of_undefined_logits(value: float, dtype: torch.dtype) -> None:
    logits = torch.zeros(2, 16, dtype=dtype)
    logits[1, 4] = value
    losses = block.cross_entropy_(logits, torch.tensor([3, 3]), True)
    assert losses[0].isfinite()
    assert not losses[1].isfinite()
    assert logits[1].isnan().any()


@dtypes
@pytest.mark.parametrize("group", [16, 32, 64])
def test_pool(group: int, dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, 192).to(dtype)
    exact = x.double().unflatten(-1, (-1, group)).sum(-1)
    torch.testing.assert_close(block.pool(x, group).double(), exact, rtol=ROUNDED[dtype], atol=1e-5)


def test_gated_block() -> None:
    torch.manual_seed(0)
    narrow = LlamaMLP(LlamaConfig(**SIZES)).bfloat16().requires_grad_(False)
    wide = copy.deepcopy(narrow).float()
    x, dy = torch.randn(1, 17, 96).bfloat16(), torch.randn(1, 17, 96).bfloat16()

    def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = module(x)
        out.backward(dy.to(x.dtype))
        assert x.grad is not None
        return out.detach(), x.grad

    exact, before = run(wide, x.float()), run(narrow, x)
    other = copy.deepcopy(wide).double()
    expected = run(other, x.double())
    for module in (narrow, wide, other):
        replace_gated(module)
    after = run(narrow, x)
    assert not torch.equal(after[0], before[0])
    for ours, theirs, truth in zip(after, before, exact, strict=True):
        assert _error(ours, truth) < 1.2 * _error(theirs, truth)
    again = run(wide, x.float())
    assert not torch.equal(again[0], exact[0])
    for ours, truth in zip(again, exact, strict=True):
        assert _error(ours, truth) < 1e-6
    assert torch.equal(run(other, x.double())[0], expected[0])


def test_other_activations_are_left_alone() -> None:
    block = LlamaMLP(LlamaConfig(**SIZES, hidden_act="gelu")).bfloat16().requires_grad_(False)
    x = torch.randn(1, 3, 96).bfloat16()
    expected = block(x)
    replace_gated(block)
    assert torch.equal(block(x), expected)
