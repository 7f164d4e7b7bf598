"""What an exact fold changes and what not, on tiny files of every architecture.

It is computed here from the bytes of the base and the numbers of the adapter alone.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafold.adapters.adapted import adapted_layers, set_active
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import FILES, SCALED, Folded, copy_run, every_file, quick
from tests.practice import command, same_logits, tensors_of
from tests.tiny import _permute, tiny_gguf

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]

SAME_TYPE = [name for name in FILES if "Q4_0" not in name and "mixed" not in name]
NAMES = {  # module -> tensor, for the check that is independent of the source
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def updates(run: Path) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(tensor, module path, update of the offsets [out, groups] in transformers' row order) from the two files of
    an adapter folder: s / sqrt(group) B A."""
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    state = load_file(run / "adapter" / "adapter_model.safetensors")
    prefix = "base_model.model."
    for layer in sorted({re.sub(r"\.(lora_[AB]\.weight|offset_delta)$", "", key) for key in state}):
        _, _, number, module = layer.removeprefix(prefix).split(".", 3)
        if config["r"] == "full":
            update = state[f"{layer}.offset_delta"]
        else:
            scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])
            b_a = state[f"{layer}.lora_B.weight"] @ state[f"{layer}.lora_A.weight"]
            update = (scaling / math.sqrt(32)) * b_a
        yield f"blk.{number}.{NAMES[module]}.weight", layer.removeprefix(prefix), update


def expected_blocks(base: gguf.ReaderTensor, update: np.ndarray) -> np.ndarray:
    """Bytes [out, groups, block] of the folded Q4_1 or Q5_1 tensor: only the float16 offsets move."""
    blocks = np.array(base.data).reshape(*update.shape, -1).copy()
    stored = blocks[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float32)
    moved = np.where(update == 0, stored, stored + update).astype(np.float16)
    blocks[..., 2:4] = moved[..., None].view(np.uint8)
    return blocks


@pytest.mark.parametrize("name", SAME_TYPE)
def test_only_offsets_of_adapted_blocks_change(folded: Folded, name: str) -> None:
    """And they are what base and adapter say: every byte of the file is accounted for."""
    base, run, out = folded(name)
    before, after = np.fromfile(base, np.uint8), np.fromfile(out, np.uint8)
    assert before.shape == after.shape
    tensors, expected, changed = tensors_of(base), before.copy(), 0
    heads = {"attn_q": 4, "attn_k": 2} if FILES[name][0].startswith("llama") else {}
    for tensor, _, update in updates(run):
        info, kind = tensors[tensor], tensor.split(".")[2]
        moved = _permute(update.numpy(), heads[kind]) if kind in heads else update.numpy()
        blocks = expected_blocks(info, moved)
        changed += int((blocks.reshape(-1) != before[info.data_offset :][: info.n_bytes]).sum())
        expected[info.data_offset :][: info.n_bytes] = blocks.reshape(-1)
        assert (blocks[..., 2:4] != np.array(info.data).reshape(blocks.shape)[..., 2:4]).any(), tensor
    np.testing.assert_array_equal(after, expected)
    assert 0 < changed < len(before) / 10


@every_file
def test_folded_file_holds_the_training_weights(folded: Folded, name: str) -> None:
    """gguf-py decodes the file to the numbers that the training forward pass computed with."""
    _, run, out = folded(name)
    trained, tensors = load_trained(read_run(run)), tensors_of(out)
    count = 0
    for path, layer in adapted_layers(trained.model):
        packed = layer.base.packed
        with torch.no_grad():
            ours = packed.decode(torch.float32, layer.offset(), layer.scale()).numpy()
        binding = trained.bindings[path]
        stored = dequantize(tensors[binding.tensor].data, tensors[binding.tensor].tensor_type)
        order = slice(None) if binding.row_order is None else binding.row_order.numpy()
        np.testing.assert_array_equal(stored[order], ours)
        assert (ours != packed.decode().numpy()).any(), path
        count += 1
    assert count == (9 if "some targets" in name else 42 if "gemma3" in name else 21)


@every_file
def test_folded_file_computes_what_was_trained(folded: Folded, name: str) -> None:
    base, run, out = folded(name)
    trained, file = load_trained(read_run(run)), load(out)
    same_logits(file.model, trained.model, atol=0.0)
    set_active(trained.model, None)
    same_logits(load(base).model, trained.model, atol=0.0)
    with pytest.raises(AssertionError):
        same_logits(file.model, trained.model, atol=0.5)


@pytest.mark.parametrize("name", ["llama Q4_0 promoted", "llama mixed"])
def test_promotion_touches_nothing_else(folded: Folded, name: str) -> None:
    base, run, out = folded(name)
    before, after = tensors_of(base), tensors_of(out)
    adapted = {tensor for tensor, _, _ in updates(run)}
    promoted = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}
    assert list(before) == list(after)
    for tensor, info in before.items():
        kind = info.tensor_type.name
        assert after[tensor].tensor_type.name == (promoted.get(kind, kind) if tensor in adapted else kind)
        assert after[tensor].data_offset % 32 == 0
        if tensor not in adapted:
            assert hashlib.sha256(after[tensor].data).digest() == hashlib.sha256(info.data).digest()
    section = {path: raw_metadata(path) for path in (base, out)}
    assert section[base] == section[out]  # the tiny files state no general.file_type
    grown = json.loads((run / "summary.json").read_text())["added_bytes"]
    assert out.stat().st_size - base.stat().st_size == pytest.approx(grown, abs=32 * len(before))  # padding
    assert grown == sum(after[t].n_bytes - before[t].n_bytes for t in before) > 0


def raw_metadata(path: Path) -> bytes:
    """Bytes from the first key to the first tensor's name, found with gguf-py."""
    reader = gguf.GGUFReader(path)
    fields = [f for f in reader.fields.values() if not f.name.startswith("GGUF.")]
    return path.read_bytes()[fields[0].offset : reader.tensors[0].field.offset]


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0"])
def test_file_type_says_what_most_matrices_are(trained: Trained, tmp_path: Path, data: Path, kind: str) -> None:
    """general.file_type 2 is MOSTLY_Q4_0 and 3 is MOSTLY_Q4_1."""

    def add(metadata: dict, _: dict) -> None:
        metadata["general.file_type"] = {"Q4_0": 2, "Q4_1": 3}[kind]

    base = tiny_gguf(tmp_path, "llama", kind, edit=add)
    options = quick("--max-steps", 2, "--output-dir", tmp_path / "run")
    assert command("train", base, "--data", data, *options) == 0
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf") == 0
    field = gguf.GGUFReader(tmp_path / "out.gguf").get_field("general.file_type")
    assert field is not None
    assert field.contents() == 3
    assert command("verify", tmp_path / "out.gguf", "--run", tmp_path / "run", "--no-runtime") == 0


@every_file
def test_zero_adapter_gives_the_base_back(folded: Folded, tmp_path: Path, name: str) -> None:
    """Byte for byte; after promotion with the same decoded weights."""
    base, run, _ = folded(name)
    zero = copy_run(run, tmp_path / "run")
    weights = zero / "adapter" / "adapter_model.safetensors"
    state = {k: v * 0 if k.endswith(("_B.weight", "_B", "_delta")) else v for k, v in load_file(weights).items()}
    with safe_open(weights, "pt") as file:
        save_file(state, weights, file.metadata())
    assert command("fold", zero, "-o", tmp_path / "out.gguf") == 0
    if name in SAME_TYPE or name in SCALED:
        assert (tmp_path / "out.gguf").read_bytes() == base.read_bytes()
        return
    after = tensors_of(tmp_path / "out.gguf")
    for tensor, info in tensors_of(base).items():
        ours, theirs = (dequantize(t.data, t.tensor_type) for t in (info, after[tensor]))
        np.testing.assert_array_equal(ours, theirs)
