"""The loss against torch's own cross-entropy and autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.evals import loss
from lorafold.evals.loss import evaluate, hidden_states, pack_loss
from lorafold.models.load import LoadedModel, load
from lorafold.quant.linear import QuantLinear, decoded
from lorafold.quant.weight import QuantizedWeight, encode
from tests.practice import lora_like, related_rows, row_losses, token_rows
from tests.tiny import ARCHITECTURES, tiny_model


@pytest.mark.parametrize("positions", [1, 31, 32, 255, 256, 257, 600])
def test_frozen_head_loss_equals_autograd(positions: int) -> None:
    """Sum and gradient, around the borders of a chunk of 256; scaled as a step scales it."""
    hidden = torch.randn(positions, 16, dtype=torch.float32, requires_grad=True)
    weight, targets = torch.randn(50, 16), torch.randint(0, 50, (positions,))
    total = loss._FrozenHeadLoss.apply(hidden, loss.Head.of(weight), targets)
    (total / 7).backward()
    twin = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(twin @ weight.double().T, targets, reduction="sum")
    (expected / 7).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)  # float32
    torch.testing.assert_close(hidden.grad.double(), twin.grad, atol=1e-5, rtol=1e-5)


def test_frozen_head_loss_in_bfloat16() -> None:
    """Logits are formed in bfloat16 and everything after in float32: an error of 2^-8 a logit of about 5, which
    averages out over positions; gradients come rounded to 2^-8 of themselves."""
    hidden = torch.randn(200, 16).bfloat16().requires_grad_()
    weight, targets = torch.randn(50, 16).bfloat16(), torch.randint(0, 50, (200,))
    total = loss._FrozenHeadLoss.apply(hidden, loss.Head.of(weight), targets)
    assert total.dtype == torch.float32
    total.backward()
    assert hidden.grad.dtype == torch.bfloat16
    twin = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(twin @ weight.double().T, targets, reduction="sum")
    expected.backward()
    assert total.item() == pytest.approx(expected.item(), rel=2e-3)
    torch.testing.assert_close(hidden.grad.double(), twin.grad, atol=0.05, rtol=0.02)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    with torch.no_grad():
        total = loss._FrozenHeadLoss.apply(torch.randn(5, 16), loss.Head.of(torch.randn(9, 16)), torch.arange(5))
    assert not total.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_pack_loss_equals_transformers_row_by_row(
    tiny_file: Callable[..., Path], architecture: str, tied: bool
) -> None:
    """Of every architecture, against transformers' own model; rows are longer than Gemma's window of 8."""
    loaded = load(tiny_file(architecture, "Q4_1", tied=tied))
    rows = token_rows(5)
    with torch.no_grad():
        ours = pack_loss(loaded, pack(rows, 16))
        theirs = row_losses(tiny_model(architecture, "Q4_1", tied=tied), rows)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tree_equals_its_rows(tiny_file: Callable[..., Path], architecture: str, seed: int) -> None:
    """Loss and gradients in float32 of rows that share their beginnings, against transformers row by row, to 1e-5.

    Gemma's window of 8 reaches over several segments.
    """
    loaded, rows = load(tiny_file(architecture, "Q4_1")), related_rows(9, seed)
    batch = pack(rows, 4, shared=2)
    assert max(batch.parents) > 0
    with torch.no_grad():
        theirs = row_losses(tiny_model(architecture, "Q4_1"), rows)
        torch.testing.assert_close(pack_loss(loaded, batch), theirs, rtol=1e-5, atol=0)
    inject(loaded.model, AdapterSpec("lora", r=2))
    lora_like(loaded.model)
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    ours = torch.autograd.grad(pack_loss(loaded, batch), parameters)
    alone = torch.autograd.grad(row_losses(loaded.model, rows), parameters)
    for a, b in zip(ours, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.fixture
def adapted(tiny_file: Callable[..., Path]) -> LoadedModel:
    loaded = load(tiny_file("llama", "Q4_1"))
    inject(loaded.model, AdapterSpec("lora", r=2))
    lora_like(loaded.model)
    return loaded


@pytest.mark.parametrize("block", [7, 64, 4096])
@pytest.mark.parametrize("codec", ["Q4_1", "Q8_0"])
def test_a_head_in_blocks(
    tiny_file: Callable[..., Path], codec: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 a packed head is decoded some rows at a time; the loss and gradients are those of the whole one."""
    loaded = load(tiny_file("llama", codec, tied=False))
    inject(loaded.model, AdapterSpec("lora", r=2))
    lora_like(loaded.model)
    monkeypatch.setattr(loss, "_BLOCK", block)
    sizes = []
    monkeypatch.setattr(loss, "decoded", lambda w, dtype: sizes.append(w.shape[0]) or decoded(w, dtype))
    parameters = [p for p in loaded.model.parameters() if p.requires_grad]
    batch, head = pack(token_rows(4, longest=60)), loaded.model.lm_head
    with loss.head_once(loaded):
        assert loaded.head_weight is None
        total = pack_loss(loaded, batch)
    ours = torch.autograd.grad(total, parameters)
    with torch.no_grad():
        assert torch.equal(pack_loss(loaded, batch), total)
    assert max(sizes) == min(block, head.out_features)
    assert sum(sizes) == 3 * head.out_features  # for the logits, for their gradient, and for the logits without one
    whole = loss.Head.of(head.packed.decode(torch.float32))
    expected = loss._FrozenHeadLoss.apply(hidden_states(loaded, batch), whole, batch.targets)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))  # sums in another order


@pytest.mark.parametrize("gradients", [True, False])
def test_a_head_is_decoded_once(
    tiny_file: Callable[..., Path], gradients: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all packs, where it is not decoded in blocks: in bfloat16."""
    loaded, batch, shapes = load(tiny_file("llama", "Q4_1"), torch.bfloat16), pack(token_rows(2), 16), []
    decode = QuantizedWeight.decode
    monkeypatch.setattr(QuantizedWeight, "decode", lambda w, *a, **k: shapes.append(w.shape) or decode(w, *a, **k))
    with torch.set_grad_enabled(gradients), loss.head_once(loaded):
        for _ in range(2):
            pack_loss(loaded, batch)
    assert shapes.count(loaded.model.get_output_embeddings().shape) == 1
    assert loaded.head_weight is None


def test_a_head_with_scales_of_scales_is_not_cut(tiny_file: Callable[..., Path]) -> None:
    loaded, wide = load(tiny_file("llama", "Q4_1")), torch.randn(64, 64)
    assert loss._in_blocks(loaded, QuantLinear(encode(wide, "Q4_1")))
    assert not loss._in_blocks(loaded, QuantLinear(encode(wide, "NF4-DQ")))


@pytest.mark.parametrize(("dtype", "whole"), [(torch.float32, 16), (torch.bfloat16, 64)])
def test_packs_are_filled_up(tiny_file: Callable[..., Path], dtype: torch.dtype, whole: int) -> None:
    """By few tokens where no library compiles something for each size of a product."""
    loaded, rows = load(tiny_file("llama", "Q4_1"), dtype), token_rows(3)
    tokens = sum(-(-len(row) // loaded.row_align) * loaded.row_align for row in rows)
    assert len(loss.packed(loaded, rows).ids) == -(-tokens // whole) * whole


@pytest.mark.parametrize(
    "changes",
    [{}, {"final_logit_softcapping": 3.0}, {"logit_scale": 0.5}, {"logits_scaling": 4.0}],
    ids=["plain", "softcapping", "scale", "scaling"],
)
def test_heads_that_change_their_logits(adapted: LoadedModel, changes: dict[str, float]) -> None:
    """Gemma 2 caps logits, Cohere multiplies and Granite divides them: loss and gradient as autograd has them."""
    for key, value in changes.items():
        setattr(adapted.model.config, key, value)
    parameters = [p for p in adapted.model.parameters() if p.requires_grad]
    batch = pack(token_rows(4, longest=60))
    total = pack_loss(adapted, batch)
    ours = torch.autograd.grad(total, parameters)
    logits = adapted.model.lm_head(hidden_states(adapted, batch))
    if "final_logit_softcapping" in changes:
        logits = 3 * torch.tanh(logits / 3)
    logits = logits * changes.get("logit_scale", 1) / changes.get("logits_scaling", 1)
    expected = F.cross_entropy(logits, batch.targets, reduction="sum")
    theirs = torch.autograd.grad(expected, parameters)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)  # gradients of some 10


def test_an_adapted_head_is_trained_too(tiny_file: Callable[..., Path]) -> None:
    """With lm_head a target the logits are those of the adapted head, and it has a gradient."""
    loaded = load(tiny_file("llama", "Q4_1", tied=False))
    inject(loaded.model, AdapterSpec("lora", r=2, target_modules=("lm_head", "q_proj")))
    lora_like(loaded.model)
    rows = token_rows(3)
    total = pack_loss(loaded, pack(rows, 16))
    torch.testing.assert_close(total, row_losses(loaded.model, rows), rtol=1e-5, atol=0)
    total.backward()
    head = loaded.model.lm_head.adapters["default"]
    ours = [p.grad.clone() for p in head.parameters()]
    loaded.model.zero_grad()
    row_losses(loaded.model, rows).backward()
    for gradient, parameter in zip(ours, head.parameters(), strict=True):
        assert gradient.abs().max() > 0.1
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("max_tokens", [1, 50, 10_000])
def test_evaluate_is_the_mean_over_supervised_tokens(adapted: LoadedModel, max_tokens: int) -> None:
    """Of all rows together, however they are grouped; long rows count by their tokens."""
    rows = token_rows(7, longest=50)
    done: list[int] = []
    with torch.no_grad():
        expected = row_losses(adapted.model, rows) / sum(sum(row.supervised) for row in rows)
    assert evaluate(adapted, rows, max_tokens, done.append) == pytest.approx(float(expected), rel=1e-5)
    assert sum(done) == 7
