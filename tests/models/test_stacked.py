"""A packed model, its projections computed together, against the same layers one by one."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.adapters import lora
from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.data.tokens import Tokens
from lorafold.evals.loss import pack_loss
from lorafold.kernels import block
from lorafold.models import fused_attention, gated
from lorafold.models.gated import gated_forward
from lorafold.models.load import LoadedModel, load
from lorafold.models.norms import RMSNorm
from lorafold.quant import linear
from lorafold.quant.again import to_keep
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import encode
from lorafold.train.budget import _bytes_kept, checkpointed, pass_over

ROWS = [Tokens(list(range(2, 2 + n)), [False] + [True] * (n - 1), i) for i, n in enumerate([20, 90, 50, 30])]
MODULES = (gated, fused_attention)


def adapted(path: Path, method: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> LoadedModel:
    loaded = load(path, dtype)
    torch.manual_seed(0)
    inject(loaded.model, AdapterSpec(method, r=4, **options))
    loaded.model.train()  # without which nothing is checkpointed
    with torch.no_grad():
        for parameter in adapter_state(loaded.model).values():
            parameter += 0.05 * torch.randn(parameter.shape)
    return loaded


def gradients(loaded: LoadedModel) -> tuple[float, Tensor]:
    loss = pack_loss(loaded, pack(ROWS, loaded.row_align, None))
    loss.backward()
    found = [p.grad for p in loaded.model.parameters() if p.grad is not None]
    loaded.model.zero_grad(set_to_none=True)
    return loss.item(), torch.cat([grad.flatten() for grad in found])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("method", ["lora", "qa-lora"])
def test_the_model_learns_the_same(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, again: bool, dtype: torch.dtype
) -> None:
    """Losses and gradients but for roundings, which stand at other places."""
    loaded, calls = adapted(tiny_file("llama", "Q4_1", wide=True), method, dtype), []
    real = gated.together
    for module in MODULES:
        monkeypatch.setattr(module, "together", lambda *given: calls.append(real(*given)) or calls[-1])
    with checkpointed(loaded, again):
        loss, ours = gradients(loaded)
        assert len(calls) == (1 + again) * 2 * loaded.model.config.num_hidden_layers
        assert all(y is not None for y in calls)
        for module in MODULES:
            monkeypatch.setattr(module, "together", lambda *_: None)
        expected, theirs = gradients(loaded)
    wide = dtype == torch.float32
    assert loss == pytest.approx(expected, rel=1e-6 if wide else 0.01)
    assert (ours - theirs).norm() < (1e-5 if wide else 0.05) * theirs.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{"method": "lora"}, {"method": "qa-lora", "adapt": "both"}], ids=["lora", "scales"]
)
def test_inputs_are_computed_again(
    tiny_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, options: dict[str, str], dtype: torch.dtype
) -> None:
    """The same gradients, bit for bit, as with all inputs kept, from less."""
    loaded = adapted(tiny_file("llama", "Q4_1", wide=True), dtype=dtype, **options)
    kept, ours = _bytes_kept(loaded, pass_over(loaded, ROWS))[0], gradients(loaded)[1]
    for module in (lora, linear):
        monkeypatch.setattr(module, "to_keep", lambda x: (lambda same: same, (x,)))
    assert torch.equal(gradients(loaded)[1], ours)
    config, tokens = loaded.model.config, sum(map(len, ROWS))
    inputs = 2 * config.hidden_size + config.intermediate_size
    saved = _bytes_kept(loaded, pass_over(loaded, ROWS))[0] - kept
    assert saved >= inputs * tokens * (config.num_hidden_layers - 1) * dtype.itemsize  # the last block has few tokens


def test_an_input_that_was_changed_is_kept() -> None:
    norm = RMSNorm(nn.Parameter(torch.ones(64), requires_grad=False), 1e-5)
    x = torch.randn(30, 64, requires_grad=True)
    for changed in (norm.weight, (y := x * 1)):
        made = norm(y)
        with torch.no_grad():
            changed.add_(1)
        assert to_keep(made)[1][0] is made
    made = norm(x)
    how, of = to_keep(made)
    assert of[0] is x
    assert torch.equal(how(*of), made)
    changed = made.mul_(2)
    assert to_keep(changed)[1][0] is changed
    with torch.no_grad():
        assert to_keep(norm(x))[1][0] is not x


@pytest.mark.parametrize("method", ["lora", "qa-lora"])
def test_no_input_outlives_its_backward_pass(tiny_file: Callable[..., Path], method: str) -> None:
    """Only saved tensors hold it, and they go with the backward pass, or are none where blocks are computed again."""
    loaded = adapted(tiny_file("llama", "Q4_1", wide=True), method)
    seen: list[weakref.ref[Tensor]] = []
    for module in loaded.model.modules():
        if isinstance(module, RMSNorm):
            module.register_forward_hook(lambda _, given, out: seen.extend(map(weakref.ref, (given[0], out))))
    loss = pack_loss(loaded, pack(ROWS, loaded.row_align, None))
    loss.backward()
    gc.collect()
    assert len(seen) == 4 * loaded.model.config.num_hidden_layers + 2
    assert all(ref() is None for ref in seen[:-2])


def test_inference_before_training(tiny_file: Callable[..., Path]) -> None:
    loaded = adapted(tiny_file("llama", "Q4_1", wide=True), "lora")
    _, expected = gradients(loaded)
    with torch.inference_mode():
        pack_loss(loaded, pack(ROWS, loaded.row_align, None))
    _, found = gradients(loaded)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("width", [160, 96, 80, 40])
def test_gated_blocks_of_any_width(width: int) -> None:
    """A width that the kernel does not cover is computed by torch."""
    torch.manual_seed(0)
    module = nn.Module()
    module.gate_proj, module.up_proj = (QuantLinear(encode(torch.randn(width, 64), "Q4_1")) for _ in range(2))
    module.down_proj, module.act_fn = nn.Identity(), nn.SiLU()
    x = torch.randn(1, 7, 64).bfloat16().requires_grad_()
    wide = x.detach().double().requires_grad_()
    gate, up = (wide @ layer.packed.decode().double().t() for layer in (module.gate_proj, module.up_proj))
    y, exact = gated_forward(module, x), nn.functional.silu(gate) * up
    dy = torch.randn(exact.shape)
    y.backward(dy.bfloat16())
    exact.backward(dy.double())
    assert x.grad is not None
    assert wide.grad is not None
    for ours, theirs in ((y, exact), (x.grad, wide.grad)):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_gates_that_do_not_lie_in_rows() -> None:
    """A transposed dimension of one, and halves of one tensor."""
    gate, up, dy = (torch.randn(1, 5, 64).bfloat16() for _ in range(3))
    wanted = [block.swiglu(gate, up), *block.swiglu_backward(gate, up, dy)]
    turned = [x.transpose(0, 1) for x in (gate, up, dy)]
    halves = torch.cat([gate, up], -1).chunk(2, -1)
    for g, u, d in (turned, (*halves, dy)):
        for ours, theirs in zip((block.swiglu(g, u), *block.swiglu_backward(g, u, d)), wanted, strict=True):
            assert torch.equal(ours.reshape(theirs.shape), theirs)


def test_outputs_may_be_changed_in_place() -> None:
    norm = RMSNorm(nn.Parameter(torch.ones(64), requires_grad=False), 1e-5)
    x = torch.randn(3, 64).bfloat16().requires_grad_()
    norm(x).mul_(2).sum().backward()
    assert x.grad is not None
