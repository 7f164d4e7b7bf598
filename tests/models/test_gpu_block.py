"""The elementwise Triton kernels against float64, and a training step that takes all of them against torch's."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.evals.loss import pack_loss
from lorafold.kernels import block, gpu
from lorafold.models.load import load
from lorafold.quant import gpu as quant_gpu
from tests.gpu import INTERPRETED, bfloat16_rounded, devices  # noqa: F401 (a fixture)
from tests.practice import lora_like, token_rows

pytestmark = [
    pytest.mark.usefixtures("bfloat16_rounded"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # the interpreter's numpy, of infinities
]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8 * 1.01, torch.float16: 2**-11 * 1.01}


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype, atol: float = 1e-6) -> None:
    """Rounded once: half a unit in the last place (with float32 in between)."""
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double().cpu(), exact.detach(), rtol=ROUNDING[dtype], atol=atol)


@devices
@dtypes
@pytest.mark.parametrize("vocabulary", [2, 48, 1000, 9001])
def test_cross_entropy(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """9,001 logits are more than are looked at at once."""
    logits, targets = (6 * torch.randn(9, vocabulary)).to(dtype), torch.randint(vocabulary, (9,))
    targets[:2] = torch.tensor([0, vocabulary - 1])
    exact = logits.double().requires_grad_()
    losses = F.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    assert exact.grad is not None
    ours, there = logits.to(device, copy=True), targets.to(device)
    close(gpu.cross_entropy_(ours, there, False), losses, torch.float32, 1e-5)
    assert torch.equal(ours.cpu(), logits)
    close(gpu.cross_entropy_(ours, there, True), losses, torch.float32, 1e-5)
    close(ours, exact.grad, dtype)


@devices
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_cross_entropy_of_undefined_logits(value: float, device: str) -> None:
    logits = torch.zeros(2, 16, device=device)
    logits[1, 4] = value
    losses = gpu.cross_entropy_(logits, torch.tensor([3, 3], device=device), True)
    assert losses[0].isfinite()
    assert not losses[1].isfinite()
    assert logits[1].isnan().any()


@devices
@dtypes
@pytest.mark.parametrize("width", [1, 48, 576])
def test_rms_norm(width: int, dtype: torch.dtype, device: str) -> None:
    """The normalized numbers are rounded before they are weighted, as transformers does: twice, in all."""
    x, dy = (3 * torch.randn(2, 5, width)).to(dtype), torch.randn(2, 5, width).to(dtype)
    weight = (torch.rand(width) + 0.5).to(dtype)
    exact = x.double().requires_grad_()
    expected = weight.double() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + 1e-5)
    expected.backward(dy.double())
    assert exact.grad is not None
    out, rstd = gpu.rms_norm(x.to(device), weight.to(device), 1e-5)
    assert rstd.shape == (2, 5)
    torch.testing.assert_close(out.double().cpu(), expected.detach(), rtol=2.1 * ROUNDING[dtype], atol=1e-6)
    dx = gpu.rms_norm_backward(x.to(device), weight.to(device), rstd, dy.to(device))
    close(dx, exact.grad, dtype, 1e-5)


@devices
@dtypes
def test_swiglu(dtype: torch.dtype, device: str) -> None:
    """More numbers than one program takes, and the columns of a wider matrix, which are not contiguous."""
    gate, up, dy = ((4 * torch.randn(7, 400)).to(dtype)[:, 3:303] for _ in range(3))
    g, u = gate.double().requires_grad_(), up.double().requires_grad_()
    exact = F.silu(g) * u
    exact.backward(dy.double())
    assert g.grad is not None
    assert u.grad is not None
    there = [x.to(device) for x in (gate, up, dy)]
    d_gate, d_up = gpu.swiglu_backward(*there)
    for ours, theirs in ((gpu.swiglu(*there[:2]), exact), (d_gate, g.grad), (d_up, u.grad)):
        close(ours, theirs, dtype, 1e-5)


@devices
@pytest.mark.parametrize(("method", "types"), [("lora", "Q4_K"), ("qa-lora", "Q4_1")])
def test_a_step_on_these_kernels_is_a_step_on_torch(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, types: str, device: str
) -> None:
    """Loss and gradients of a pack, float32: decoding, norms, gated activation and cross-entropy through Triton."""

    def gradients(device: str) -> tuple[Tensor, dict[str, Tensor]]:
        loaded = load(tiny_file("llama", types, wide=types == "Q4_K"), device=device)
        inject(loaded.model, AdapterSpec(method=method, r=4))
        lora_like(loaded.model)
        loss = pack_loss(loaded, pack(token_rows(4)).to(device))
        loss.backward()
        state = adapter_state(loaded.model).items()
        return loss.detach().cpu(), {name: p.grad.cpu() for name, p in state if p.grad is not None}

    expected, wanted = gradients("cpu")
    called = set()
    for module in (gpu, quant_gpu):
        if INTERPRETED:
            monkeypatch.setattr(module, "usable", lambda *_: True)
            monkeypatch.setattr(block, "usable", lambda _: False)
        for name in ("decode", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "cross_entropy_"):
            if real := vars(module).get(name):
                monkeypatch.setattr(module, name, lambda *a, real=real, name=name: called.add(name) or real(*a))
    loss, found = gradients(device)
    assert called == {"decode", "rms_norm", "rms_norm_backward", "swiglu", "swiglu_backward", "cross_entropy_"}
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-4 * gradient.abs().max().item())


@pytest.mark.skipif(not INTERPRETED, reason="Triton compiles here")
def test_a_gpu_without_a_compiler_goes_on_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton may be there and fail when it first compiles: one warning with the reason."""

    def fails(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify it")

    device = torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    gpu.works.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gpu.works(device)
    gpu.works.cache_clear()
    monkeypatch.setattr(gpu, "cross_entropy_", fails)
    with pytest.warns(UserWarning, match="slower without it: Failed to find C compiler"):
        assert not gpu.works(device)
    gpu.works.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not gpu.works(device)
    gpu.works.cache_clear()


def test_without_triton_torch_does_the_work() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import torch; from lorafold.quant.weight import encode;"
        "from lorafold.models import load, norms; from lorafold.kernels import gpu;"
        "from lorafold.kernels.choice import kernels_for;"
        "assert gpu.triton is None and not gpu.works(torch.device('cuda'));"
        "assert kernels_for(torch.zeros(1, 16).half()) is None;"
        "assert encode(torch.zeros(2, 64), 'Q4_1').decode(torch.bfloat16).sum() == 0"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
