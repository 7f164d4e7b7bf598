"""`load` against transformers' own models: same weights, same logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lorafold.errors import FormatError
from lorafold.evals.loss import evaluate
from lorafold.models import attention
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import compute_dtype, load, resolve
from lorafold.models.probe import rows_mix
from lorafold.models.tokenizer import load_tokenizer
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from tests.ggml_quantizer import GGML_ONLY
from tests.practice import row_losses, token_rows
from tests.tiny import ARCHITECTURES, TYPES, VOCABULARY, tiny_gguf, tiny_ids, tiny_model

ATOL = 1e-4  # logits reach about 6; float32 sums in another order differ by some 5e-6
MIXED = {"token_embd": "Q8_0", "attn_v": "F16", "ffn_down": "Q5_1", "attn_k": "Q4_0", "": "Q4_1"}


def same_logits(ours: torch.nn.Module, theirs: torch.nn.Module, tokens: int = 40) -> None:
    ids = tiny_ids(tokens)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=ATOL, rtol=0)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("types", ["F32", "Q4_1", "Q5_0"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_equal_transformers(tiny_file: Callable[..., Path], architecture: str, types: str, tied: bool) -> None:
    loaded = load(tiny_file(architecture, types, tied=tied))
    same_logits(loaded.model, tiny_model(architecture, types, tied=tied))


@pytest.mark.parametrize("types", TYPES)
def test_every_tensor_type_gives_the_same_logits(tiny_file: Callable[..., Path], types: str) -> None:
    loaded = load(tiny_file("llama", types))
    packed = [m for m in loaded.model.modules() if isinstance(m, QuantLinear | QuantEmbedding)]
    assert len(packed) == (0 if types not in CODECS else 3 * 7 + 2)
    same_logits(loaded.model, tiny_model("llama", types))


@pytest.mark.parametrize("types", GGML_ONLY)
def test_k_quants_give_the_same_logits(tmp_path: Path, types: str) -> None:
    """The embedding too, of which single rows are decoded."""
    path = tiny_gguf(tmp_path, "llama", types, wide=True)
    assert {info.type for info in GGUFFile(path).tensors.values()} == {types, "F32"}
    same_logits(load(path).model, tiny_model("llama", types, wide=True))


FOLDER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def other_folder(path: Path, kind: str, **options: object) -> Path:
    """A tiny model of an architecture that no table of ours names."""
    sizes = FOLDER | {
        "vocab_size": VOCABULARY,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | options)).save_pretrained(path)
    load_tokenizer(GGUFFile(tiny_gguf(path / "gguf", "llama"))).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", ["mistral", "phi3", "gpt_neox", "olmo2"])
def test_other_architectures_are_taken_if_rows_do_not_mix(tmp_path: Path, kind: str) -> None:
    """The loss over packed rows is that of each row in transformers' own way."""
    loaded = load(other_folder(tmp_path, kind, bos_token_id=0, eos_token_id=0))
    rows = token_rows(6)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path)
    count = sum(sum(row.supervised) for row in rows)
    assert evaluate(loaded, rows) == pytest.approx(float(row_losses(reference, rows).detach()) / count, rel=1e-5)


EXPERTS = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "granitemoe"])
def test_experts_round_by_how_many_tokens_they_have(
    tmp_path: Path, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is no leak: the first row changes as well when the second one does."""
    seen: list[str | None] = []
    monkeypatch.setattr("lorafold.models.load.rows_mix", lambda *given: seen.append(rows_mix(*given)) or seen[-1])
    options = EXPERTS | {"head_dim": 16, "num_local_experts": 8, "bos_token_id": 0, "eos_token_id": 0}
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # with one, products of few rows may round alike
    try:
        loaded = load(other_folder(tmp_path, kind, **options), dtype)
    finally:
        torch.set_num_threads(before)
    assert seen == [None]
    if dtype == torch.float32:
        rows, reference = token_rows(6), AutoModelForCausalLM.from_pretrained(tmp_path)
        count = sum(sum(row.supervised) for row in rows)
        assert evaluate(loaded, rows) == pytest.approx(float(row_losses(reference, rows).detach()) / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["phi3", "olmo2", "gpt_neox"])
def test_they_are_tried_as_they_are_trained(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the attention kernel where it takes their heads."""
    calls, real = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *given: (calls.append(given), real(*given))[1])
    path = other_folder(tmp_path, kind, bos_token_id=0, eos_token_id=0, num_attention_heads=2)
    loaded = load(path)
    assert len(calls) == 3 * loaded.model.config.num_hidden_layers


@pytest.mark.parametrize(
    ("kind", "options", "why"),
    [
        ("gemma2", {"head_dim": 16}, "capped scores"),
        ("mamba", {}, "do not come out as each does alone"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "do not come out as each does alone"),
        ("bloom", {}, "do not come out as each does alone"),
        ("lfm2_moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 0}, "do not come out"),
    ],
)
def test_architectures_in_which_rows_mix_are_refused(tmp_path: Path, kind: str, options: dict, why: str) -> None:
    folder = other_folder(tmp_path, kind, **options)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(FormatError, match=f"the architecture {kind} cannot be trained here yet: .*{why}"):
            load(folder, dtype)


def test_types_may_be_mixed(tmp_path: Path) -> None:
    same_logits(load(tiny_gguf(tmp_path, "qwen3", MIXED, tied=False)).model, tiny_model("qwen3", MIXED, tied=False))


@pytest.mark.parametrize("types", ["F32", "Q4_1"])
def test_attention_biases_are_permuted_as_the_weights(tmp_path: Path, types: str) -> None:
    same_logits(load(tiny_gguf(tmp_path, "llama", types, bias=True)).model, tiny_model("llama", types, bias=True))


def test_tensor_order_in_the_file_does_not_matter(tmp_path: Path) -> None:
    """A bias may come before or after the packed weight it belongs to."""

    def reverse(_: dict, tensors: dict) -> None:
        for name in reversed(list(tensors)):
            tensors[name] = tensors.pop(name)

    same_logits(load(tiny_gguf(tmp_path, "qwen2", "Q4_1", edit=reverse)).model, tiny_model("qwen2", "Q4_1"))


@pytest.mark.parametrize("types", ["F32", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_equal_transformers_own_gguf_loader(
    tiny_file: Callable[..., Path], architecture: str, types: str
) -> None:
    """Not for the others: transformers 5.23 ignores Llama 3's factors, and takes Qwen 3's and Gemma 3's head width
    from its defaults instead of the file."""
    path = tiny_file(architecture, types)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    same_logits(load(path).model, theirs)


def test_llama3_factors_are_applied(tiny_file: Callable[..., Path]) -> None:
    """Llama and Llama 3 share weights here, so the factors alone must tell them apart."""
    ids = tiny_ids(40)
    with torch.no_grad():
        plain, scaled = (load(tiny_file(name, "Q4_1")).model(ids).logits for name in ("llama", "llama3"))
    assert (plain - scaled).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_is_close_to_float32(tiny_file: Callable[..., Path], architecture: str) -> None:
    path, ids = tiny_file(architecture, "Q4_1"), tiny_ids(40)
    with torch.no_grad():
        half = load(path, dtype=torch.bfloat16).model(ids).logits
        full = load(path).model(ids).logits
    assert half.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 3 to 6 layers of width 64 add up to a few percent of the logits' spread
    assert ((half.float() - full).square().mean() / full.square().mean()).sqrt() < 0.05


def test_everything_is_frozen_and_in_evaluation_mode(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not any(t.is_meta for t in (*loaded.model.parameters(), *loaded.model.buffers()))
    assert loaded.device == torch.device("cpu")


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_bindings_lead_back_to_the_file(tiny_file: Callable[..., Path], architecture: str) -> None:
    loaded = load(tiny_file(architecture, "Q4_1", tied=False))
    assert loaded.gguf is not None
    assert len(loaded.bindings) == 3 * 7 + 2
    for name, binding in loaded.bindings.items():
        module, stored = loaded.model.get_submodule(name), loaded.gguf.blocks(binding.tensor)
        assert isinstance(module, QuantLinear | QuantEmbedding)
        rows = stored if binding.row_order is None else stored[binding.row_order.numpy()]
        np.testing.assert_array_equal(module.blocks.numpy(), rows)
        assert (binding.row_order is not None) == (
            architecture == "llama" and binding.tensor.split(".")[-2] in ("attn_q", "attn_k")
        )


def test_a_tied_head_shares_the_embeddings_bytes(tiny_file: Callable[..., Path]) -> None:
    model = load(tiny_file("llama", "Q4_1")).model
    assert model.lm_head.blocks.data_ptr() == model.model.embed_tokens.blocks.data_ptr()
    model = load(tiny_file("llama", "F16")).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_tied_head_shares_them_on_another_device(tiny_file: Callable[..., Path]) -> None:
    """Moved one by one they would be there twice; rows need no padding there either."""
    loaded = load(tiny_file("llama", "Q4_1"), device="meta")
    assert loaded.device.type == loaded.model.lm_head.blocks.device.type == "meta"
    assert loaded.model.lm_head.blocks is loaded.model.model.embed_tokens.blocks
    assert loaded.row_align == 1


def test_weights_hash_tells_weights_apart_and_nothing_else(tmp_path: Path) -> None:
    def rename(metadata: dict, _: dict) -> None:
        metadata["general.name"] = "another name of another length"

    base = load(tiny_gguf(tmp_path / "a")).weights_hash()
    assert load(tiny_gguf(tmp_path / "b", edit=rename)).weights_hash() == base
    assert load(tiny_gguf(tmp_path / "c", seed=1)).weights_hash() != base
    assert load(tiny_gguf(tmp_path / "d", types="Q4_0")).weights_hash() != base


# folders in transformers format


@pytest.fixture
def folder(tmp_path: Path, tiny_file: Callable[..., Path]) -> Path:
    path = tmp_path / "model"
    tiny_model("llama", "F32", tied=False).save_pretrained(path)
    load(tiny_file("llama", "F32", tied=False)).tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_folder_gives_the_same_logits(
    tmp_path: Path, tiny_file: Callable[..., Path], architecture: str
) -> None:
    model = tiny_model(architecture, "F32")
    model.save_pretrained(tmp_path)
    from_gguf = load(tiny_file(architecture, "F32"))
    from_gguf.tokenizer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    same_logits(loaded.model, model)
    text = "<|im_start|>the cat is 123<|im_end|>"
    assert loaded.tokenizer(text).input_ids == from_gguf.tokenizer(text).input_ids
    chat = [{"role": "user", "content": "hello"}]
    assert loaded.tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>user\nhello<|im_end|>\n"
    assert loaded.gguf is None
    assert loaded.bindings == {}


def test_folder_hash_is_of_its_weights(folder: Path) -> None:
    base = load(folder).weights_hash()
    (folder / "note.txt").write_text("not a weight")
    assert load(folder).weights_hash() == base
    tiny_model("llama", "F32", tied=False, seed=1).save_pretrained(folder)
    assert load(folder).weights_hash() != base


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "config.json"),
        ("model.safetensors", "safetensors"),
        ("tokenizer.json", "transformers cannot load"),
    ],
)
def test_a_folder_lacking_a_file_is_refused(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(FormatError, match=message):
        load(folder)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"model_type": "no-such-type"}', b"\xff\xfe\x00"])
def test_a_folder_with_a_damaged_config_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(FormatError):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("hidden_size", "64"), ("hidden_size", 96), ("hidden_act", "none such")],
)
def test_a_folder_with_impossible_values_in_its_config_is_refused(folder: Path, key: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(FormatError):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -8])
def test_a_folder_with_damaged_weights_is_refused(folder: Path, keep: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(FormatError):
        load(folder)


def test_a_folder_lacking_a_weight_is_refused(folder: Path) -> None:
    """transformers would fill it with random numbers and print a warning."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FormatError, match="up_proj"):
        load(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(FormatError, match="unpickled"):
        load(folder)


# names of models


@pytest.mark.parametrize("name", ["missing.gguf", "./missing", "a/b/c", "/nowhere/at/all", "single", "", ".."])
def test_a_name_of_nothing_is_refused_without_asking_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FormatError):
        load(name)


def test_a_hub_id_that_cannot_be_fetched_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(FormatError, match="owner/model"):
        load("owner/model")


def test_resolve_accepts_what_exists(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    assert resolve(tiny_file()) == tiny_file()
    assert resolve(str(tmp_path)) == tmp_path


def test_compute_dtype() -> None:
    assert compute_dtype("float32") == torch.float32
    assert compute_dtype("bfloat16") == torch.bfloat16
    assert compute_dtype("auto") in (torch.float32, torch.bfloat16)
