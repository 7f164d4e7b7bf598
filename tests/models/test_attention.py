"""Packed attention: a pack of rows equals the rows one by one, on every path, with gradients and with a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.data.packs import pack as pack_rows
from lorafold.models import attention
from lorafold.models.attention import packed_attention
from lorafold.models.load import load
from tests.practice import related_rows
from tests.tiny import ARCHITECTURES, tiny_ids, tiny_model

ATOL = 1e-5  # float32; logits reach 6, hidden states 10
LENGTHS = [5, 1, 23, 8, 9, 40]  # Gemma's window is 8: rows shorter, as long and longer

PATHS = pytest.mark.parametrize("path", ["kernel", "plain", "sdpa"])


def _force(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "KEPT_TOKENS", 0 if path == "sdpa" else 10**9)
    if path != "kernel":
        monkeypatch.setattr(attention, "kernel_for", lambda _rows, _width: None)


@pytest.fixture
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces the plain products or torch's kernel, whatever the length, or the one call of a GPU for a pack.

    Ours is for heads of 32, which only Qwen3 has here.
    """
    _force(request.param, monkeypatch)
    monkeypatch.setattr(attention, "_in_one_call", lambda _: request.param == "pack")
    return request.param


@pytest.fixture(autouse=True)
def _no_masks_from_other_tests() -> Iterator[None]:
    attention._corner.cache_clear()
    yield
    attention._corner.cache_clear()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tiny_file: Callable[..., Path]) -> PreTrainedModel:
    return load(tiny_file(request.param, "Q4_1")).model


def pack(rows: list[Tensor]) -> dict[str, Any]:
    """The keyword arguments of a forward pass over rows [1, T] laid end to end."""
    lengths = [row.shape[1] for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": torch.cat(rows, 1), "position_ids": positions, "segments": lengths, "use_cache": False}


@pytest.mark.parametrize("path", ["kernel", "plain", "sdpa", "pack"], indirect=True)
@torch.no_grad()
def test_a_pack_equals_its_rows(model: PreTrainedModel, path: str) -> None:
    rows = [tiny_ids(n, seed=n) for n in LENGTHS]
    packed = model(**pack(rows)).logits.split(LENGTHS, dim=1)
    for row, logits in zip(rows, packed, strict=True):
        torch.testing.assert_close(logits, model(row).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("path", ["kernel", "plain", "sdpa"], indirect=True)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_row_equals_transformers_eager_attention(
    tiny_file: Callable[..., Path], path: str, architecture: str
) -> None:
    ours, theirs = load(tiny_file(architecture, "F32")).model, tiny_model(architecture, "F32")
    assert theirs.config._attn_implementation == "eager"
    for n in (1, 7, 8, 9, 33):
        ids = tiny_ids(n, seed=n)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=3e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_pack_do_not_see_each_other(model: PreTrainedModel) -> None:
    rows = [tiny_ids(n, seed=n) for n in (6, 12, 6)]
    before = model(**pack(rows)).logits.split([6, 12, 6], dim=1)
    rows[1] = tiny_ids(12, seed=99)
    after = model(**pack(rows)).logits.split([6, 12, 6], dim=1)
    torch.testing.assert_close(before[0], after[0], atol=0, rtol=0)
    torch.testing.assert_close(before[2], after[2], atol=0, rtol=0)
    assert not torch.equal(before[1], after[1])


@pytest.mark.parametrize("path", ["kernel", "plain", "sdpa"], indirect=True)
@torch.no_grad()
def test_tokens_do_not_see_what_follows(model: PreTrainedModel, path: str) -> None:
    ids, other = tiny_ids(30), tiny_ids(30, seed=5)
    other[:, :20] = ids[:, :20]
    torch.testing.assert_close(model(ids).logits[:, :20], model(other).logits[:, :20], atol=ATOL, rtol=0)


def embedding_gradient(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Of a sum of squared logits, with respect to the embedded tokens."""
    vectors = model.model.embed_tokens(inputs.pop("input_ids")).detach().requires_grad_(True)
    (model(inputs_embeds=vectors, **inputs).logits ** 2).mean(-1).sum().backward()
    assert vectors.grad is not None
    return vectors.grad


@pytest.mark.parametrize("path", ["kernel", "plain", "sdpa", "pack"], indirect=True)
def test_gradients_of_a_pack_equal_those_of_its_rows(model: PreTrainedModel, path: str) -> None:
    rows = [tiny_ids(n, seed=n) for n in LENGTHS]
    packed = embedding_gradient(model, **pack(rows)).split(LENGTHS, dim=1)
    for row, gradient in zip(rows, packed, strict=True):
        alone = embedding_gradient(model, input_ids=row, use_cache=False)
        torch.testing.assert_close(gradient, alone, atol=1e-4 * alone.abs().max().item(), rtol=0)


def test_gradients_of_all_paths_and_of_transformers_agree(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tiny_ids(33)
    found = []
    for path in ("kernel", "plain", "sdpa"):
        _force(path, monkeypatch)
        found.append(embedding_gradient(model, input_ids=ids, use_cache=False))
    model.set_attn_implementation("eager")
    try:
        eager = embedding_gradient(model, input_ids=ids, use_cache=False)
    finally:
        model.set_attn_implementation(attention.NAME)
    atol = 1e-4 * eager.abs().max().item()
    for ours in found:
        torch.testing.assert_close(ours, eager, atol=atol, rtol=0)


@pytest.mark.parametrize("path", ["kernel", "plain", "sdpa"], indirect=True)
@torch.no_grad()
def test_a_cache_changes_nothing(model: PreTrainedModel, path: str) -> None:
    """In steps of one and of several tokens, beyond Gemma's window of 8."""
    ids = tiny_ids(30)
    whole = model(ids).logits
    parts, cache, at = [], None, 0
    for step in (5, 1, 1, 4, 9, 1, 1, 8):
        out = model(ids[:, at : at + step], past_key_values=cache, use_cache=True)
        cache, at = out.past_key_values, at + step
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=ATOL, rtol=0)


@torch.no_grad()
def test_generation_takes_the_most_likely_token_of_the_full_forward_pass(model: PreTrainedModel) -> None:
    ids = tiny_ids(11)
    out = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    logits = model(out).logits[0, 10:-1]
    chosen = logits.gather(1, out[0, 11:, None])[:, 0]
    assert out.shape == (1, 31)
    torch.testing.assert_close(chosen, logits.amax(-1), atol=ATOL, rtol=0)  # a tie may fall either way


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("heads", [2, 4])
@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_one_call_for_a_tree_equals_one_for_each_segment(heads: int, window: int | None, rows: int, seed: int) -> None:
    """Random trees of rows that begin alike, output and gradients; and the kernel, where there are 16 tokens."""
    batch = pack_rows(related_rows(rows, seed), 1, 2)
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dy = (torch.randn(1, n, len(batch.ids), 32, generator=generator) for n in (heads, 2, 2, heads))
    found = []
    for path, one_call in (("kernel", False), ("plain", False), ("plain", True)):
        with pytest.MonkeyPatch.context() as patch:
            _force(path, patch)
            patch.setattr(attention, "_in_one_call", lambda _, one_call=one_call: one_call)
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            tree = {"segments": batch.segments, "parents": batch.parents, "sliding_window": window}
            out, _ = packed_attention(nn.Module(), *inputs, None, 0.25, **tree)
            found.append((out, *torch.autograd.grad(out, inputs, dy.transpose(1, 2))))
    for kernel, several, one in zip(*found, strict=True):
        torch.testing.assert_close(kernel, several, atol=ATOL, rtol=0)
        torch.testing.assert_close(one, several, atol=ATOL, rtol=0)


def test_a_long_pack_on_a_gpu_is_one_call_for_each_segment() -> None:
    """Its mask would be larger than what it saves."""
    assert attention._in_one_call(torch.empty(1, 2, 4096, 8, device="meta"))
    assert not attention._in_one_call(torch.empty(1, 2, 4097, 8, device="meta"))
    assert not attention._in_one_call(torch.empty(1, 2, 4, 8))


# the function by itself, against a dense mask

DENSE_CASES = [
    # heads, key heads, tokens, seen, window
    (4, 4, 6, 6, None),
    (4, 4, 26, 26, None),
    (4, 2, 6, 6, None),
    (4, 2, 16, 16, None),
    (6, 1, 17, 17, None),
    (4, 2, 1, 9, None),
    (4, 2, 3, 9, None),
    (4, 2, 17, 17, 5),
    (4, 2, 5, 5, 5),
    (4, 2, 4, 4, 5),
    (4, 2, 3, 17, 5),
    (4, 2, 1, 17, 5),
    (4, 2, 9, 9, 1),
    (4, 2, 19, 19, 1),
    (4, 1, 150, 150, 60),
]


@PATHS
@pytest.mark.parametrize(("heads", "kv_heads", "tokens", "seen", "window"), DENSE_CASES)
def test_equals_a_dense_computation_in_float64(
    monkeypatch: pytest.MonkeyPatch, path: str, heads: int, kv_heads: int, tokens: int, seen: int, window: int | None
) -> None:
    _force(path, monkeypatch)
    calls, real = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given: (calls.append(given), real(*given))[1])
    q, k, v = torch.randn(heads, tokens, 32), torch.randn(kv_heads, seen, 32), torch.randn(kv_heads, seen, 32)
    at = torch.arange(seen - tokens, seen)[:, None]
    hidden = (torch.arange(seen) > at) | (torch.arange(seen) <= at - (window or seen + 1))
    keys, values = (t.double().repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    scores = (q.double() @ keys.mT * 0.3).masked_fill(hidden, float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(0, 1)
    out, weights = packed_attention(nn.Module(), q[None], k[None], v[None], None, 0.3, sliding_window=window)
    assert weights is None
    assert out.shape == (1, tokens, heads, 32)
    assert len(calls) == (path == "kernel" and tokens == seen >= 16)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=0)


def test_a_batch_is_refused() -> None:
    """Rows lie end to end in one row; of a batch, all but the first would be lost in silence."""
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    with pytest.raises((ValueError, AssertionError)):
        packed_attention(nn.Module(), q, k, k, None, 0.25)


def test_segments_that_are_not_the_whole_pack_are_refused() -> None:
    q, k = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    for segments in ([3, 2], [3, 4], [5]):
        with pytest.raises((RuntimeError, ValueError, AssertionError)):
            packed_attention(nn.Module(), q, k, k, None, 0.25, segments=segments)


@PATHS
def test_training_after_inference_mode(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """A mask cached in inference mode must not be one that backward refuses."""
    _force(path, monkeypatch)
    q, k = torch.randn(1, 4, 19, 32), torch.randn(1, 2, 19, 32)
    with torch.inference_mode():
        packed_attention(nn.Module(), q, k, k, None, 0.25, sliding_window=4)
    q.requires_grad_(True)
    out, _ = packed_attention(nn.Module(), q, k, k, None, 0.25, sliding_window=4)
    out.sum().backward()
    assert q.grad is not None


@PATHS
def test_bfloat16(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    _force(path, monkeypatch)
    q, k, v = torch.randn(1, 4, 40, 32), torch.randn(1, 2, 40, 32), torch.randn(1, 2, 40, 32)
    full, _ = packed_attention(nn.Module(), q, k, v, None, 0.25, segments=[17, 23], sliding_window=8)
    half, _ = packed_attention(
        nn.Module(), q.bfloat16(), k.bfloat16(), v.bfloat16(), None, 0.25, segments=[17, 23], sliding_window=8
    )
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.03, rtol=0)  # 8 bits of values up to 3


def test_the_plain_path_ends_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack of one row below and one above the limit takes both paths and equals either."""
    q, k, v = torch.randn(1, 4, 30, 16), torch.randn(1, 2, 30, 16), torch.randn(1, 2, 30, 16)
    outs = []
    for limit in (0, 10, 30):
        monkeypatch.setattr(attention, "KEPT_TOKENS", limit)
        outs.append(packed_attention(nn.Module(), q, k, v, None, 0.25, segments=[10, 20])[0])
    torch.testing.assert_close(outs[0], outs[1], atol=ATOL, rtol=0)
    torch.testing.assert_close(outs[0], outs[2], atol=ATOL, rtol=0)
