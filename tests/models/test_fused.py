"""The fused passes of a block on a CPU against transformers' modules, judged by the same modules in float32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from lorafold.kernels import attention as tiled
from lorafold.kernels import block, tiles
from lorafold.models import attention, fused_attention
from lorafold.models.fused_attention import replace_attention
from lorafold.models.gated import replace_gated

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
}


def _angles(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 100 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


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
@pytest.mark.parametrize("segments", [[1], [5], [3, 1, 8], [16, 16]])
@pytest.mark.parametrize("width", [2, 16, 64])
def test_rotation(segments: list[int], width: int, dtype: torch.dtype) -> None:
    tokens, heads, wide = sum(segments), 3, dtype == torch.float32
    x = torch.randn(tokens, heads * width).to(dtype)
    cos, sin = (a.to(dtype) for a in _angles(torch.cat([torch.arange(n) for n in segments]), width))
    by_head = x.float().view(1, tokens, heads, width).transpose(1, 2)
    rotated, _ = apply_rotary_pos_emb(by_head, by_head, cos.float()[None], sin.float()[None])
    expected = torch.cat([part[0].reshape(-1, width) for part in rotated.split(segments, 2)])
    ours = block.rotate(x, cos, sin, segments)
    torch.testing.assert_close(ours.float(), expected, rtol=ROUNDED[dtype], atol=ROUNDED[dtype])
    # the gradient is the transpose: <rotate x, y> = <x, rotate_back y>
    y = torch.randn_like(ours)
    back = block.rotate_back(y, cos, sin, segments)
    torch.testing.assert_close(
        (expected * y.float()).sum(), (x.float() * back.float()).sum(), rtol=0.02, atol=1e-3 if wide else 0.5
    )
    inverse = block.rotate_back(ours, cos, sin, segments)  # a rotation, so its transpose undoes it
    torch.testing.assert_close(inverse.float(), x.float(), rtol=0.05, atol=1e-5 if wide else 0.05)


@dtypes
@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("older", [0, 4])
@pytest.mark.parametrize("tokens", [1, 2, 9])
def test_causal_softmax(tokens: int, older: int, window: int, dtype: torch.dtype) -> None:
    scores = (4 * torch.randn(5, tokens, older + tokens)).to(dtype)
    exact = scores.double().requires_grad_()
    distance = torch.arange(older, older + tokens)[:, None] - torch.arange(older + tokens)
    visible = (distance >= 0) & (distance < window)
    weights = (exact * 0.3).masked_fill(~visible, -torch.inf).softmax(-1)
    ours = scores.clone()
    block.causal_softmax_(ours, tokens, 0.3, window)
    torch.testing.assert_close(ours.double(), weights.detach(), rtol=ROUNDED[dtype], atol=1e-6)
    assert not ours[:, ~visible].any()
    dy = torch.randn(5, tokens, older + tokens).to(dtype)
    weights.backward(dy.double())
    d = dy.clone()
    block.causal_softmax_backward_(weights.detach().to(dtype), tokens, 0.3, window, d)
    assert exact.grad is not None
    torch.testing.assert_close(d.double(), exact.grad, rtol=2 * ROUNDED[dtype], atol=ROUNDED[dtype])
    assert not d[:, ~visible].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 2])
def test_undefined_scores_are_seen(value: float, place: int) -> None:
    """Rows that see such a score are not numbers, as in torch; rows before it are."""
    scores = torch.randn(1, 4, 4).bfloat16()
    scores[0, place:, place] = value
    block.causal_softmax_(scores, 4, 0.5, 9)
    seen = torch.arange(4) >= place
    assert scores[0, seen].isnan().any(-1).all()
    assert not scores[0, ~seen].isnan().any()


def _modules(hidden: int = 96) -> dict[str, tuple[nn.Module, int | None]]:
    sizes = SIZES | {"hidden_size": hidden}
    mixed = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=2)
    return {
        "llama": (LlamaAttention(LlamaConfig(**sizes), 0), None),
        "llama, biases": (LlamaAttention(LlamaConfig(**sizes, attention_bias=True), 0), None),
        "mistral, window": (MistralAttention(MistralConfig(**sizes, sliding_window=5), 0), 5),
        "qwen2, full layer": (Qwen2Attention(mixed, 0), None),
        "qwen2, window": (Qwen2Attention(mixed, 1), 4),
    }


Segments = tuple[list[int], list[int]]


def _run(module: nn.Module, x: Tensor, tree: Segments, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and gradient of the input, for segments with parents."""
    segments, parents = tree
    ends: list[int] = []
    for n, parent in zip(segments, parents, strict=True):
        ends.append(n + (ends[parent] if parent >= 0 else 0))
    places = [torch.arange(end - n, end) for n, end in zip(segments, ends, strict=True)]
    cos, sin = _angles(torch.cat(places), x.shape[-1] // SIZES["num_attention_heads"])
    x = x.clone().requires_grad_()
    rotation = (cos[None].to(x.dtype), sin[None].to(x.dtype))
    out, _ = module(x, position_embeddings=rotation, attention_mask=None, segments=segments, parents=parents)
    out.backward(dy.to(x.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


def _pair(module: nn.Module, tree: Segments, hidden: int) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A module in bfloat16 and in float32, with transformers' forward pass, its input and its output's gradient."""
    module.config._attn_implementation = attention.NAME  # type: ignore[union-attr]
    narrow = copy.deepcopy(module.requires_grad_(False)).bfloat16()
    x, dy = (torch.randn(1, sum(tree[0]), hidden).bfloat16() for _ in range(2))
    return narrow, copy.deepcopy(narrow).float(), x, dy


TREES = [
    ([9], [-1]),
    ([1, 6, 2], [-1, -1, -1]),
    ([4, 4, 4], [-1, -1, -1]),
    ([5, 3, 4], [-1, 0, 0]),
    ([3, 2, 4, 1, 2, 6], [-1, 0, 1, 1, 0, -1]),
    ([12, 9, 7], [-1, 0, 0]),
]


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", list(_modules()))
def test_attention(kind: str, tree: Segments, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one and a half times as far from the float32 result as the same module in bfloat16 before."""
    torch.manual_seed(0)
    module, window = _modules()[kind]
    narrow, wide, x, dy = _pair(module, tree, 96)
    exact, before = _run(wide, x.float(), tree, dy), _run(narrow, x, tree, dy)
    replace_attention(narrow)
    seen: list[int] = []
    real = block.causal_softmax_
    monkeypatch.setattr(block, "causal_softmax_", lambda s, n, scale, w: (seen.append(w), real(s, n, scale, w)))
    after = _run(narrow, x, tree, dy)
    assert seen == [window or fused_attention.KEPT_TOKENS] * len(tree[0]) * 2  # weights are computed again
    for ours, theirs, truth in zip(after, before, exact, strict=True):
        assert _error(ours, truth) < 1.5 * _error(theirs, truth) + 1e-4
    other = copy.deepcopy(wide).half()
    expected = _run(other, x.half(), tree, dy)[0]
    for module in (wide, other):
        replace_attention(module)
    seen.clear()
    for ours, truth in zip(_run(wide, x.float(), tree, dy), exact, strict=True):
        assert _error(ours, truth) < 2e-6
    assert len(seen) == (2 * len(tree[0]) if sum(tree[0]) >= 16 else 0)
    # other types, or rows too long for it, go the old way
    assert torch.equal(_run(other, x.half(), tree, dy)[0], expected)
    monkeypatch.setattr(fused_attention, "KEPT_TOKENS", fused_attention.longest(*tree) - 1)
    assert torch.equal(_run(narrow, x, tree, dy)[0], before[0])


TILED = [
    ([9], [-1]),
    ([1, 70, 33], [-1, -1, -1]),
    ([32, 50, 16], [-1, 0, 0]),
    ([3, 40, 4, 1, 64, 6], [-1, 0, 1, 1, 0, -1]),
    ([1000, 30], [-1, 0]),
]
needs_tiles = pytest.mark.skipif(not tiles.supported(), reason="a processor with matrix tiles")


@needs_tiles
@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("tree", TILED)
@pytest.mark.parametrize("kind", list(_modules()))
def test_tiled_attention(kind: str, tree: Segments, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No farther from the float32 result than the same module in bfloat16, with a tenth for chance."""
    torch.manual_seed(0)
    module, window = _modules(6 * width)[kind]
    narrow, wide, x, dy = _pair(module, tree, 6 * width)
    exact, before = _run(wide, x.float(), tree, dy), _run(narrow, x, tree, dy)
    replace_attention(narrow)
    seen: list[int] = []
    real = tiled.forward
    monkeypatch.setattr(tiled, "forward", lambda *given: (seen.append(given[-1]), real(*given))[1])
    after = _run(narrow, x, tree, dy)
    assert seen == [window or tiled.most_tokens(3)]
    for ours, theirs, truth in zip(after, before, exact, strict=True):
        assert _error(ours, truth) < 1.1 * _error(theirs, truth) + 1e-4


def test_tiles_are_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "supported", lambda: True)
    assert tiled.usable(torch.empty(0, 32, dtype=torch.bfloat16), 32)
    assert not tiled.usable(torch.empty(0, 32), 32)


@needs_tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_keys_are_seen(value: float) -> None:
    """Whoever sees a key that is not finite is not a number, and nobody else."""
    qkv = torch.randn(40, 8 * 32).bfloat16()  # 4 query heads, 2 of keys, 2 of values
    qkv[7, 4 * 32 + 5] = value
    cos, sin = _angles(torch.arange(40), 32)
    out, _ = tiled.forward(qkv, cos, sin, tiled.Layout([40], [[0]], 2), 0.2, 99)
    assert out[7:, :64].isnan().all()
    assert out[:7].isfinite().all()
    assert out[:, 64:].isfinite().all()  # the other key head


@needs_tiles
def test_sums_of_ancestors_do_not_depend_on_threads() -> None:
    """The same bits from one thread and from two."""
    tree = ([20, 30, 40, 10], [-1, 0, 0, 1])
    qkv, dy = (torch.randn(100, n * 64).bfloat16() for n in (10, 6))
    cos, sin = _angles(torch.arange(100), 64)
    layout = tiled.Layout(tree[0], attention.paths(tree[1]), 2)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            _, found = tiled.forward(qkv, cos, sin, layout, 0.1, 99)
            results.append(tiled.backward(qkv, found, cos, sin, layout, 0.1, 99, dy))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


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
