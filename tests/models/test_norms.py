"""The lean RMS norm against transformers' own."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lorafold.kernels import block
from lorafold.models.norms import RMSNorm, replace_norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_transformers(dtype: torch.dtype) -> None:
    """The mean is summed in another order, which moves a last bit; of bfloat16 rarely."""
    theirs = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    theirs.weight.data.uniform_(0.5, 2).requires_grad_(False)
    ours = RMSNorm(nn.Parameter(theirs.weight.data, requires_grad=False), 1e-5)
    x = (3 * torch.randn(2, 9, 48)).to(dtype)
    assert block.usable(x)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    out_a, out_b = theirs(a), ours(b)
    if dtype == torch.float32:
        torch.testing.assert_close(out_b, out_a, rtol=1e-6, atol=0)
    else:
        assert (out_a != out_b).float().mean() < 0.01
        torch.testing.assert_close(out_b, out_a, rtol=2**-7, atol=0)
    dy = torch.randn(2, 9, 48).to(dtype)
    out_a.backward(dy)
    out_b.backward(dy)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(b.grad, a.grad, atol=tolerance, rtol=tolerance)


def test_replaces_every_norm_of_a_model() -> None:
    model = nn.Sequential(nn.Linear(4, 4), LlamaRMSNorm(4, eps=1e-3))
    replace_norms(model)
    assert isinstance(model[1], RMSNorm)
    assert model[1].variance_epsilon == 1e-3


def test_a_second_derivative_is_refused() -> None:
    """The kernels' backward passes have none; it would be zero."""
    norm = RMSNorm(nn.Parameter(torch.ones(16), requires_grad=False), 1e-5)
    x = torch.randn(16, 16, requires_grad=True)
    (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
