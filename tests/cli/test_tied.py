"""Folding updates of embedding and head that have one weight: exact or merged, shared, or with a head of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lorafold.adapters.inject import adapter_state
from lorafold.adapters.tied import tied_pair
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.models.adapter_files import load_adapter, read_spec, save_adapter
from lorafold.models.load import LoadedModel, load
from tests.cli.conftest import needs_llama_cpp, quick
from tests.practice import command, random_adapter, same_logits, tensors_of, tiny_folder
from tests.tiny import tiny_ids
from tests.tiny_mlx import tiny_mlx

CASES = {"shared": ("embed_tokens", True), "embedding": ("embed_tokens", False), "head": ("lm_head", False)}
by_case = pytest.mark.parametrize("case", CASES)
Files = Callable[..., Path]


def adapter_of(base: Path, case: str, folder: Path, method: str = "qa-lora", **options: Any) -> Path:
    """An adapter of random numbers on q_proj and an end of the model."""
    name, shared = CASES[case]
    options = {"method": method, "r": 4, "target_modules": ("q_proj", name), "ensure_weight_tying": shared} | options
    return random_adapter(folder / "adapter", base, 3, 0.15, **options)


def adapted(base: Path, adapter: Path) -> LoadedModel:
    loaded = load(base)
    load_adapter(loaded, adapter)
    return loaded


@by_case
@pytest.mark.parametrize("kind", ["llama Q4_1", "gemma3 Q5_1", "qwen2 Q4_0"])
def test_offsets_fold_exactly(kind: str, case: str, tiny_file: Files, tmp_path: Path, capsys: Any) -> None:
    base, out = tiny_file(*kind.split()), tmp_path / "tuned.gguf"
    adapter = adapter_of(base, case, tmp_path)
    assert command("fold", adapter, "-o", out) == 0
    folded = load(out)
    same_logits(folded.model, adapted(base, adapter).model, 0.0)
    with pytest.raises(AssertionError):
        same_logits(folded.model, load(base).model, 0.1)
    before, after = tensors_of(base), tensors_of(out)
    assert after.keys() - before.keys() == (set() if case == "shared" else {"output.weight"})
    assert (tied_pair(folded.model) is not None) == (case == "shared")
    still = {"embedding": "output.weight", "head": "token_embd.weight"}.get(case)
    assert still is None or np.array_equal(after[still].data, before["token_embd.weight"].data)
    capsys.readouterr()
    assert command("verify", out, "--run", adapter, "--no-runtime") == 0
    printed = capsys.readouterr().out
    assert "largest difference 0 over" in printed
    assert ("head with a tensor of its own" in printed) == (case != "shared")
    assert command("verify", base, "--run", adapter, "--no-runtime") == 1


@needs_llama_cpp
@by_case
def test_llama_cpp_computes_what_was_folded(case: str, tiny_file: Files, tmp_path: Path) -> None:
    """Root mean squares as for bare models in tests/evals/test_llama_cpp.py."""
    base, out, ids = tiny_file("llama", "Q4_1"), tmp_path / "tuned.gguf", tiny_ids(40)
    adapter = adapter_of(base, case, tmp_path)
    assert command("fold", adapter, "-o", out) == 0
    with torch.no_grad():
        ours = adapted(base, adapter).model(ids).logits[0].numpy()
        plain = load(base).model(ids).logits[0].numpy()
    with LlamaCpp(out, n_ctx=256) as runtime:
        theirs = np.concatenate([part for _, part in runtime.logits(ids[0].tolist())])
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.08
    assert np.sqrt(np.mean((ours - plain) ** 2)) > 0.2


@by_case
@pytest.mark.parametrize("to", ["f32", "q8_0"])
def test_lora_is_merged_into_a_gguf_file(to: str, case: str, tiny_file: Files, tmp_path: Path) -> None:
    base, out = tiny_file("llama", "Q4_1"), tmp_path / "tuned.gguf"
    adapter = adapter_of(base, case, tmp_path, "lora")
    assert command("fold", adapter, "-o", out, "--to", to, "--lossy") == 0
    same_logits(
        load(out).model, adapted(base, adapter).model, 1e-4 if to == "f32" else 0.5
    )  # 8 bits of 7 by 64 weights
    assert ("output.weight" in tensors_of(out)) == (case != "shared")


@by_case
def test_lora_is_merged_into_a_transformers_folder(case: str, tmp_path: Path) -> None:
    base, out = tiny_folder(tmp_path / "base"), tmp_path / "tuned"
    adapter = adapter_of(base, case, tmp_path, "lora")
    assert command("fold", adapter, "-o", out) == 0
    tuned = AutoModelForCausalLM.from_pretrained(out)
    same_logits(tuned, adapted(base, adapter).model, 1e-4)  # (W + BA) x and W x + BA x, logits of about 6
    assert tuned.config.tie_word_embeddings == (case == "shared")


@by_case
@pytest.mark.parametrize("head_first", [True, False])
def test_a_folder_may_store_the_one_weight_twice_in_two_files(head_first: bool, case: str, tmp_path: Path) -> None:
    base, out, head = tiny_folder(tmp_path / "base"), tmp_path / "tuned", "lm_head.weight"
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts = [{head: tensors["model.embed_tokens.weight"].clone()}, tensors]
    files = [f"model-0000{number}-of-00002.safetensors" for number in ((1, 2) if head_first else (2, 1))]
    for file, part in zip(files, parts, strict=True):
        save_file(part, base / file, {"format": "pt"})
    index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    adapter = adapter_of(base, case, tmp_path, "lora")
    assert command("fold", adapter, "-o", out) == 0
    tuned = AutoModelForCausalLM.from_pretrained(out)
    same_logits(tuned, adapted(base, adapter).model, 1e-4)
    written = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    assert torch.equal(written[head], written["model.embed_tokens.weight"]) == (case == "shared")


@by_case
def test_a_module_trained_whole_is_put_into_a_transformers_folder_of_shards(case: str, tmp_path: Path) -> None:
    base, out = tiny_folder(tmp_path / "base"), tmp_path / "tuned"
    (base / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path / "one")).save_pretrained(base, max_shard_size="100KB")
    name, shared = CASES[case]
    options = {"method": "lora", "target_modules": ("q_proj",), "modules_to_save": (name,)}
    adapter = random_adapter(tmp_path / "adapter", base, 3, 0.1, ensure_weight_tying=shared, **options)
    loaded = adapted(base, adapter)
    with torch.no_grad():
        for key, value in adapter_state(loaded.model).items():
            if key.endswith(".change"):
                value.copy_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    save_adapter(adapter, loaded, read_spec(adapter)[0])
    assert command("fold", adapter, "-o", out) == 0
    tuned = AutoModelForCausalLM.from_pretrained(out)
    same_logits(tuned, loaded.model, 1e-4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) == (case != "shared")


@by_case
@pytest.mark.parametrize("method", ["qa-lora", "lora"])
def test_mlx_lm_computes_what_was_folded(method: str, case: str, tmp_path: Path, capsys: Any) -> None:
    mlx = pytest.importorskip("lorafold.evals.mlx_lm")
    pytest.importorskip("mlx_lm")
    base, out, ids = tiny_mlx(tmp_path / "base", dtype="float32", bits=8), tmp_path / "tuned", tiny_ids(40)
    adapter = adapter_of(base, case, tmp_path, method)
    assert command("fold", adapter, "-o", out, *(["--lossy"] if method == "lora" else [])) == 0
    trained, folded = adapted(base, adapter).model, load(out).model
    same_logits(folded, trained, 0.0 if method == "qa-lora" else 0.5)  # 8 bits again
    with mlx.MlxLm(out) as runtime, torch.no_grad():
        ((_, theirs),) = runtime.logits(ids[0].tolist())
        assert np.sqrt(np.mean((folded(ids).logits[0].numpy() - theirs) ** 2)) < 1e-5
    if method == "qa-lora":
        assert command("verify", out, "--run", adapter, "--no-runtime") == 0
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
        assert command("verify", out, "--run", adapter, "--no-runtime") == 1
        assert command("verify", base, "--run", adapter, "--no-runtime") == 1


@by_case
@pytest.mark.parametrize("method", ["qa-lora", "lora"])
def test_what_no_runtime_can_apply_is_not_exported(
    method: str, case: str, tiny_file: Files, tmp_path: Path, capsys: Any
) -> None:
    """Of a tied embedding llama.cpp's adapter would be looked up for the head as well; mlx-lm has no head there."""
    adapter = adapter_of(tiny_file("llama", "Q4_1"), case, tmp_path, method)
    assert command("export", adapter, "--to", "gguf-adapter", "-o", tmp_path / "adapter.gguf") == 2
    assert (
        "model.embed_tokens: QuantEmbedding" if case != "head" else "no layer of that name"
    ) in capsys.readouterr().err
    assert not (tmp_path / "adapter.gguf").exists()


@by_case
def test_lora_on_4_bits_is_merged_into_a_folder(case: str, tmp_path: Path) -> None:
    """Embedding and head of such a folder are plain numbers; its rows divide into blocks of 64."""
    source, base, out = tiny_folder(tmp_path / "source", wide=True), tmp_path / "base", tmp_path / "tuned"
    assert command("quantize", source, "-o", base, "--format", "nf4") == 0
    adapter = adapter_of(base, case, tmp_path, "lora")
    assert command("fold", adapter, "-o", out, "--to", "f32") == 0
    tuned = AutoModelForCausalLM.from_pretrained(out)
    same_logits(tuned, adapted(base, adapter).model, 1e-4)
    assert tuned.config.tie_word_embeddings == (case == "shared")


@by_case
@pytest.mark.parametrize("method", ["qa-lora", "lora"])
def test_a_run_trains_what_is_named(method: str, case: str, tiny_file: Files, data: Path, tmp_path: Path) -> None:
    name, shared = CASES[case]
    line = ["--target-modules", name, "--method", method, *(["--ensure-weight-tying"] if shared else [])]
    run = tmp_path / "run"
    assert command("train", tiny_file("llama", "Q4_1"), "--data", data, "--output-dir", run, *quick(*line)) == 0
    figures = json.loads((run / "summary.json").read_text())
    assert figures["eval_loss_after"] < figures["eval_loss_before"]
    assert read_spec(run / "adapter")[0].ensure_weight_tying == shared
