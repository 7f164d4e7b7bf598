"""llama.cpp reads the tiny files and computes what LoraFold computes of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lorafold.errors import FormatError
from lorafold.evals.llama_cpp import LlamaCpp, available
from lorafold.models.load import load
from tests.tiny import ARCHITECTURES, VOCABULARY, tiny_gguf, tiny_ids

pytestmark = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")

# Logits spread with a standard deviation of about 1.3. llama.cpp keeps keys and values in float16, and multiplies
# quantized weights with inputs rounded to 8 bits; measured root mean squares are 0.002 and 0.04.
RMS = {"F32": 0.005, "Q8_0": 0.08, "Q4_1": 0.08}
CERTAIN = 0.5  # a lead of the first token over the second that such rounding does not overturn


@pytest.fixture(autouse=True)
def _one_llama_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's threads spin at their barriers: beside other processes two are far slower than one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def logits_of(path: Path, ids: torch.Tensor) -> np.ndarray:
    with LlamaCpp(path, n_ctx=256) as runtime:
        parts = list(runtime.logits(ids[0].tolist()))
    assert [start for start, _ in parts] == [0]
    return parts[0][1]


@pytest.mark.parametrize("types", sorted(RMS))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_agree(tiny_file: Callable[..., Path], architecture: str, types: str) -> None:
    """Over 120 tokens: beyond Gemma's window of 8, and where Llama 3's factors matter."""
    path, ids = tiny_file(architecture, types), tiny_ids(120)
    with torch.no_grad():
        ours = load(path).model(ids).logits[0].numpy()
    theirs = logits_of(path, ids)
    assert theirs.shape == (120, VOCABULARY)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < RMS[types]
    second, first = np.sort(ours, -1)[:, -2:].T
    certain = first - second > CERTAIN
    assert certain.sum() > 10
    np.testing.assert_array_equal(ours.argmax(-1)[certain], theirs.argmax(-1)[certain])


@pytest.mark.parametrize("tied", [True, False])
def test_mixed_types_and_biases_agree(tmp_path: Path, tied: bool) -> None:
    types = {"token_embd": "F16", "attn_": "BF16", "ffn_": "F32", "": "F32"}
    path, ids = tiny_gguf(tmp_path, "llama", types, tied=tied, bias=True), tiny_ids(40)
    with torch.no_grad():
        ours = load(path).model(ids).logits[0].numpy()
    # products of float16 and bfloat16 weights round their inputs to that type
    assert np.sqrt(np.mean((ours - logits_of(path, ids)) ** 2)) < 0.03


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_generation_agrees(tiny_file: Callable[..., Path], architecture: str) -> None:
    path, ids = tiny_file(architecture, "F32"), tiny_ids(20)
    model = load(path).model
    with LlamaCpp(path, n_ctx=256) as runtime:
        theirs = runtime.generate(ids[0].tolist(), 24)
    with torch.no_grad():
        logits = model(torch.cat([ids, torch.tensor([theirs], dtype=torch.long)], 1)).logits[0, 19:]
    assert 0 < len(theirs) <= 24
    for i, token in enumerate(theirs):  # a near tie may fall either way, and both ways are right
        assert logits[i].max() - logits[i, token] < 0.02
    if len(theirs) < 24:
        assert logits[len(theirs)].argmax() >= VOCABULARY - 4  # stopped at an end token


def test_generation_starts_afresh_each_time(tiny_file: Callable[..., Path]) -> None:
    first, second = tiny_ids(10)[0].tolist(), tiny_ids(10, seed=1)[0].tolist()
    with LlamaCpp(tiny_file("llama", "F32"), n_ctx=256) as runtime:
        once = runtime.generate(first, 5)
        runtime.generate(second, 5)
        assert runtime.generate(first, 5) == once
        assert runtime.generate(first, 0) == []
        ((_, again),) = runtime.logits(first)
        ((_, same),) = runtime.logits(first)
    np.testing.assert_array_equal(again, same)


def test_long_sequences_come_in_parts_and_stay_one_sequence(tiny_file: Callable[..., Path]) -> None:
    """Positions beyond the first 512 see those before."""
    path, ids = tiny_file("llama", "F32"), tiny_ids(600)
    with LlamaCpp(path, n_ctx=768) as runtime:
        parts = list(runtime.logits(ids[0].tolist()))
    assert [(start, len(rows)) for start, rows in parts] == [(0, 512), (512, 88)]
    with torch.no_grad():
        ours = load(path).model(ids).logits[0].numpy()
    theirs = np.concatenate([rows for _, rows in parts])
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < RMS["F32"]


def test_an_adapter_of_zeros_changes_nothing_and_another_does(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    """W + (alpha / r) B A on one matrix, against the same sum in torch."""
    path, ids = tiny_file("qwen2", "F32"), tiny_ids(30)
    a, b = 0.3 * torch.randn(2, 64), 0.3 * torch.randn(96, 2)

    def adapter(name: str, b: torch.Tensor) -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "qwen2")
        writer.add_string("general.type", "adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 6.0)
        writer.add_tensor("blk.1.ffn_up.weight.lora_a", a.numpy())
        writer.add_tensor("blk.1.ffn_up.weight.lora_b", b.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    results = []
    for file in (None, adapter("zero.gguf", torch.zeros_like(b)), adapter("lora.gguf", b)):
        with LlamaCpp(path, adapter=file, n_ctx=256) as runtime:
            results.append(np.concatenate([rows for _, rows in runtime.logits(ids[0].tolist())]))
    np.testing.assert_allclose(results[1], results[0], atol=1e-5)
    model = load(path).model
    model.model.layers[1].mlp.up_proj.weight.data += 6.0 / 2 * b @ a
    with torch.no_grad():
        expected = model(ids).logits[0].numpy()
    assert np.abs(expected - results[0]).max() > 0.5
    assert np.sqrt(np.mean((expected - results[2]) ** 2)) < RMS["F32"]


# refusals


@pytest.mark.parametrize("content", [b"", b"junk" * 100, b"GGUF" + b"\xff" * 100])
def test_a_junk_file_is_refused_in_llama_cpps_words(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "junk.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"llama\.cpp does not load .*junk\.gguf: .*(magic|load|gguf)"):
        LlamaCpp(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.gguf"):
        LlamaCpp(tmp_path / "none.gguf")


def test_a_truncated_file_is_refused(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_file().read_bytes()[:-5000])
    with pytest.raises(FormatError, match=r"cut\.gguf"):
        LlamaCpp(path)


def test_a_junk_adapter_is_refused(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    path = tmp_path / "junk.gguf"
    path.write_bytes(b"junk" * 100)
    with pytest.raises(FormatError, match=r"does not load the adapter .*junk\.gguf: .+"):
        LlamaCpp(tiny_file(), adapter=path)
    with pytest.raises(FormatError, match="does not load the adapter"):
        LlamaCpp(tiny_file(), adapter=tiny_file("qwen2"))  # a model is no adapter


def test_too_many_tokens_are_refused(tiny_file: Callable[..., Path]) -> None:
    with LlamaCpp(tiny_file(), n_ctx=64) as runtime:
        with pytest.raises(FormatError, match="65 tokens do not fit the context of 64"):
            list(runtime.logits(tiny_ids(65)[0].tolist()))
        with pytest.raises(FormatError, match="70 tokens do not fit"):
            runtime.generate(tiny_ids(60)[0].tolist(), 10)
        assert len(list(runtime.logits(tiny_ids(64)[0].tolist()))) == 1


@pytest.mark.parametrize("ids", [[VOCABULARY], [-1], [2**31 - 1]])
def test_tokens_outside_the_vocabulary_are_refused(tiny_file: Callable[..., Path], ids: list[int]) -> None:
    with LlamaCpp(tiny_file(), n_ctx=64) as runtime, pytest.raises(FormatError):
        list(runtime.logits(ids))


def test_nothing_to_continue(tiny_file: Callable[..., Path]) -> None:
    with LlamaCpp(tiny_file(), n_ctx=64) as runtime:
        assert list(runtime.logits([])) == []
        with pytest.raises(FormatError):
            runtime.generate([], 5)


def test_closing_twice_is_harmless(tiny_file: Callable[..., Path]) -> None:
    runtime = LlamaCpp(tiny_file(), n_ctx=64)
    runtime.close()
    runtime.close()
