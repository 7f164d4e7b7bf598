"""Attention over the segments of a pack on a CPU against transformers' modules in float64."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numba import njit
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lorafold.kernels import attention as plain
from lorafold.kernels import tiled_attention as tiled
from lorafold.kernels import tiles
from lorafold.kernels.floats import product
from lorafold.kernels.packs import Layout
from lorafold.models import attention, fused_attention
from lorafold.models.fused_attention import any_length, replace_attention

SIZES: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "intermediate_size": 160}
Segments = tuple[list[int], list[int]]
TREES = [
    ([9], [-1]),
    ([1, 70, 33], [-1, -1, -1]),
    ([32, 50, 16], [-1, 0, 0]),
    ([3, 40, 4, 1, 64, 6], [-1, 0, 1, 1, 0, -1]),
    ([1000, 30], [-1, 0]),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
needs_tiles = pytest.mark.skipif(not tiles.supported(), reason="a processor with matrix tiles")
kernels = pytest.mark.parametrize("kernel", [plain, pytest.param(tiled, marks=needs_tiles)], ids=["plain", "tiled"])


def _angles(positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 100 ** (-torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _error(a: Tensor, exact: Tensor) -> float:
    return float((a.double() - exact.double()).norm() / exact.double().norm())


def _modules(hidden: int) -> dict[str, tuple[nn.Module, int | None]]:
    sizes = SIZES | {"hidden_size": hidden}
    mixed = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1, num_hidden_layers=2)
    return {
        "llama": (LlamaAttention(LlamaConfig(**sizes), 0), None),
        "llama, biases": (LlamaAttention(LlamaConfig(**sizes, attention_bias=True), 0), None),
        "mistral, window": (MistralAttention(MistralConfig(**sizes, sliding_window=5), 0), 5),
        "mistral, wide window": (MistralAttention(MistralConfig(**sizes, sliding_window=70), 0), 70),
        "qwen2, full layer": (Qwen2Attention(mixed, 0), None),
        "qwen2, window": (Qwen2Attention(mixed, 1), 4),
    }


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


def _copies(kind: str, width: int, tree: Segments) -> tuple[dict[torch.dtype, nn.Module], int | None, Tensor, Tensor]:
    """A module in several types with transformers' forward pass, its window, an input and its output's gradient."""
    torch.manual_seed(0)
    hidden = width * SIZES["num_attention_heads"]
    module, window = _modules(hidden)[kind]
    module.config._attn_implementation = attention.NAME  # type: ignore[union-attr]
    narrow = copy.deepcopy(module.requires_grad_(False)).bfloat16()
    types = torch.bfloat16, torch.float16, torch.float32, torch.float64
    copies = {dtype: copy.deepcopy(narrow).to(dtype) for dtype in types}
    x, dy = (torch.randn(1, sum(tree[0]), hidden).bfloat16() for _ in range(2))
    return copies, window, x, dy


def _watch(kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The windows that a kernel is called with; no other kernel is there."""
    for other in {plain, tiled} - {kernel}:
        monkeypatch.setattr(other, "usable", lambda _dtype, _width: False)
    windows: list[int] = []
    real = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *given: (windows.append(given[-1]), real(*given))[1])
    return windows


@njit
def _product(a, a_row, a_step, m, b, b_step, b_panel, n, k, sums, more):
    product(
        a.ctypes.data, a_row, a_step, m, b.ctypes.data, b_step, b_panel, n, k, sums.ctypes.data, 4 * sums.shape[1], more
    )


@pytest.mark.parametrize(("m", "n", "k"), [(6, 16, 1), (24, 48, 7), (36, 64, 300)])
def test_small_products(m: int, n: int, k: int) -> None:
    """Rows as they lie times panels, then columns times rows, added to what is there."""
    random = np.random.default_rng(0)
    a, b, c = (random.normal(size=shape).astype(np.float32) for shape in ((m, k), (k, n), (m, n)))
    panels, sums = (
        np.ascontiguousarray(b.reshape(k, n // 16, 16).transpose(1, 0, 2)),
        np.full((m, n), np.nan, np.float32),
    )
    exact = a.astype(float) @ b
    _product(a, 4 * k, 4, m, panels, 64, 64 * k, n, k, sums, False)
    np.testing.assert_allclose(sums, exact, rtol=1e-5, atol=1e-5 * k)
    sums[:] = c
    _product(np.ascontiguousarray(a.T), 4, 4 * m, m, b, 4 * n, 64, n, k, sums, True)
    np.testing.assert_allclose(sums, exact + c, rtol=1e-5, atol=1e-5 * k)


@kernels
@pytest.mark.parametrize("width", [32, 96])
@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("kind", list(_modules(96)))
def test_attention(kind: str, tree: Segments, width: int, kernel: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """No farther from the exact result than the same module in bfloat16, with a tenth for chance; float32 to 2e-6."""
    copies, window, x, dy = _copies(kind, width, tree)
    exact, before = (_run(copies[t], x.to(t), tree, dy) for t in (torch.float64, torch.bfloat16))
    seen = _watch(kernel, monkeypatch)
    replace_attention(copies[torch.bfloat16])
    after = _run(copies[torch.bfloat16], x, tree, dy)
    assert seen == [window or attention._ENDLESS]
    for ours, theirs, truth in zip(after, before, exact, strict=True):
        assert _error(ours, truth) < 1.1 * _error(theirs, truth) + 1e-4
    replace_attention(copies[torch.float32])
    for ours, truth in zip(_run(copies[torch.float32], x.float(), tree, dy), exact, strict=True):
        assert _error(ours, truth) < 2e-6
    assert len(seen) == 1 + (kernel is plain and sum(tree[0]) >= 16)  # fewer rows of float32 are torch's


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_go_the_old_way(dtype: torch.dtype) -> None:
    copies, _, x, dy = _copies("llama", 32, TREES[2])
    expected = _run(copies[dtype], x.to(dtype), TREES[2], dy)[0]
    replace_attention(copies[dtype])
    assert torch.equal(_run(copies[dtype], x.to(dtype), TREES[2], dy)[0], expected)


@dtypes
@pytest.mark.parametrize("given", [[20], [60], []])
def test_segments_that_are_not_the_whole_pack_are_refused(given: list[int], dtype: torch.dtype) -> None:
    module = _modules(192)["llama"][0].to(dtype)
    replace_attention(module)
    cos, sin = (x[None].to(dtype) for x in _angles(torch.arange(40), 32))
    with pytest.raises(ValueError, match=r"for a pack of 40 tokens|empty"):
        module(
            torch.zeros(1, 40, 192, dtype=dtype), position_embeddings=(cos, sin), attention_mask=None, segments=given
        )


def test_heads_that_are_rotated_in_part_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _watch(plain, monkeypatch)
    module = _modules(384)["llama"][0]  # heads of 64
    replace_attention(module)
    cos, sin = (x[None] for x in _angles(torch.arange(40), 32))
    with pytest.raises(RuntimeError):  # as transformers has it
        module(torch.zeros(1, 40, 384), position_embeddings=(cos, sin), attention_mask=None, segments=[40])
    assert not seen


def test_many_tasks_are_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether query heads are a task each, or all that share a key head."""
    torch.manual_seed(0)
    segments, parents = [70, 9, 30, 12, 40], [-1, 0, 0, 1, -1]
    qkv, dy = torch.randn(sum(segments), 10 * 32), torch.randn(sum(segments), 6 * 32)
    cos, sin = _angles(torch.arange(sum(segments)), 32)
    layout, found = Layout(segments, attention.paths(parents), 2), []
    for many in (1, 1000):
        monkeypatch.setattr(plain, "_MANY_TASKS", many)
        out, kept = plain.forward(qkv, cos, sin, layout, 0.2, 1000)
        found.append((out, plain.backward(qkv, kept, cos, sin, layout, 0.2, 1000, dy)))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_gradients_are_summed_by_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever segments share their sums: some see each other, some the same beginning, one has no tokens."""
    torch.manual_seed(0)
    segments, parents = [70, 9, 30, 0, 12, 40, 5], [-1, 0, 0, 2, 1, -1, 5]
    qkv, dy = torch.randn(sum(segments), 10 * 32), torch.randn(sum(segments), 6 * 32)
    cos, sin = _angles(torch.arange(sum(segments)), 32)
    found, taken = [], []
    for most in (len(segments) * 1000, parts):
        monkeypatch.setattr(plain, "_PARTS", most)
        layout = Layout(segments, attention.paths(parents), 2)
        _, kept = plain.forward(qkv, cos, sin, layout, 0.2, 1000)
        found.append(plain.backward(qkv, kept, cos, sin, layout, 0.2, 1000, dy))
        taken.append(plain._shares(layout)[2])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert sum(layout.seen) >= taken[0] >= taken[1] >= sum(segments)
    assert parts > 1 or taken[1] == sum(segments)


def test_a_common_beginning_has_few_places() -> None:
    """77 short rows after it do not each have sums of their own for it, and few rows do."""
    many = Layout([500] + 77 * [20], attention.paths([-1] + 77 * [0]), 3)
    assert 8 * 500 + 77 * 20 <= plain._shares(many)[2] <= 16 * 500 + 77 * 20
    few = Layout([500, 20, 20], attention.paths([-1, 0, 0]), 3)
    assert plain._shares(few)[2] == 3 * 500 + 2 * 20
    apart = Layout(64 * [20], attention.paths(64 * [-1]), 1)
    assert len(plain._shares(apart)[0][0]) == 65  # where nothing is seen twice each row is a part, and a task


def test_other_widths_go_the_old_way() -> None:
    copies, _, x, dy = _copies("llama", 16, TREES[2])
    expected = _run(copies[torch.float32], x.float(), TREES[2], dy)[0]
    replace_attention(copies[torch.float32])
    assert torch.equal(_run(copies[torch.float32], x.float(), TREES[2], dy)[0], expected)


def test_rows_too_long_for_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "supported", lambda: True)
    monkeypatch.setattr(tiled, "most_tokens", lambda _group: fused_attention.longest(*TREES[2]) - 1)
    copies, _, x, dy = _copies("llama", 32, TREES[2])
    expected = _run(copies[torch.bfloat16], x, TREES[2], dy)[0]
    replace_attention(copies[torch.bfloat16])
    assert torch.equal(_run(copies[torch.bfloat16], x, TREES[2], dy)[0], expected)


def test_tiles_are_for_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "supported", lambda: True)
    assert tiled.usable(torch.bfloat16, 32)
    assert not tiled.usable(torch.float32, 32)
    assert not tiled.usable(torch.bfloat16, 48)


@pytest.mark.parametrize("has_tiles", [False, True])
def test_where_rows_need_no_filling(has_tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiled, "supported", lambda: has_tiles)
    model = nn.Sequential(_modules(192)["llama"][0])
    other = nn.Sequential(Qwen3Attention(Qwen3Config(**SIZES, hidden_size=96, head_dim=32), 0))
    for dtype in (torch.bfloat16, torch.float32):
        assert any_length(model, dtype)
        assert any_length(other, dtype) == (dtype == torch.float32 or not has_tiles)
    assert not any_length(model, torch.float16)
    assert not any_length(nn.Sequential(_modules(96)["llama"][0]), torch.float32)  # heads of 16
    assert not any_length(nn.Sequential(nn.Linear(2, 2)), torch.float32)


@kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_undefined_keys_are_seen(value: float, kernel: ModuleType) -> None:
    """Whoever sees a key that is not finite is not a number, and nobody else."""
    qkv = torch.randn(40, 8 * 32).bfloat16()  # 4 query heads, 2 of keys, 2 of values
    qkv[7, 4 * 32 + 5] = value
    cos, sin = _angles(torch.arange(40), 32)
    out, _ = kernel.forward(qkv, cos, sin, Layout([40], [[0]], 2), 0.2, 99)
    assert out[7:, :64].isnan().all()
    assert out[:7].isfinite().all()
    assert out[:, 64:].isfinite().all()  # the other key head


@kernels
@dtypes
def test_sums_of_ancestors_do_not_depend_on_threads(kernel: ModuleType, dtype: torch.dtype) -> None:
    """The same bits from one thread and from two."""
    if kernel is tiled and dtype == torch.float32:
        pytest.skip("tiles are for bfloat16")
    tree = ([20, 30, 40, 10], [-1, 0, 0, 1])
    qkv, dy = (torch.randn(100, n * 64).to(dtype) for n in (10, 6))
    cos, sin = _angles(torch.arange(100), 64)
    layout = Layout(tree[0], attention.paths(tree[1]), 2)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            _, found = kernel.forward(qkv, cos, sin, layout, 0.1, 99)
            results.append(kernel.backward(qkv, found, cos, sin, layout, 0.1, 99, dy))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)
