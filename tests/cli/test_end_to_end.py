"""train, fold, verify, export, eval and generate, as a user calls them, on tiny files of every architecture.

What a fold must be is computed here from the bytes of the base and the numbers of the adapter alone.
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
import yaml
from gguf.quants import dequantize
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.models.auto import AutoModelForCausalLM, AutoTokenizer

from lorafold.adapters.fold import base_weight
from lorafold.adapters.inject import adapted_layers, set_active
from lorafold.evals import llama_cpp
from lorafold.evals.compare import KL_FACTOR
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command, same_logits
from tests.tiny import ARCHITECTURES, _permute, tiny_gguf

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]

FILES = {  # name -> (architecture, types, options)
    "llama Q4_1": ("llama", "Q4_1"),
    "llama3 Q5_1 bf16": ("llama3", "Q5_1", "--dtype", "bfloat16"),
    "qwen2 Q4_1 full": ("qwen2", "Q4_1", "--r", "full"),
    "qwen3 Q4_1 some targets": ("qwen3", "Q4_1", "--target-modules", "q_proj", "k_proj", "down_proj"),
    "gemma3 Q4_1 rslora": ("gemma3", "Q4_1", "--use-rslora", "--r", 4, "--lora-alpha", 6),
    "llama Q4_0 promoted": ("llama", "Q4_0"),
    "llama mixed": ("llama", "mixed"),
}
SCALED = {
    "llama3 Q5_1 both": ("llama3", "Q5_1", "--adapt", "both"),
    "qwen3 Q8_0 scales": ("qwen3", "Q8_0", "--adapt", "scale", "--r", "full"),
}
every = pytest.mark.parametrize("name", [*FILES, *SCALED])
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
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")


@pytest.fixture(scope="module")
def folded(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """`folded(name of FILES)`: (base, run, folded file); do not write to them."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            base, run = trained(*(FILES | SCALED)[name])
            out = tmp_path_factory.mktemp("folded") / "tuned.gguf"
            assert command("fold", run, "-o", out) == 0
            made[name] = base, run, out
        return made[name]

    return make


Folded = Callable[[str], tuple[Path, Path, Path]]


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """Name -> tensor, as gguf-py reads the file."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


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


@every
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


@every
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


@every
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


def copy_run(run: Path, target: Path) -> Path:
    """A run folder that may be changed."""
    (target / "adapter").mkdir(parents=True)
    for file in run.rglob("*"):
        if file.is_file():
            (target / file.relative_to(run)).write_bytes(file.read_bytes())
    return target


@every
def test_verify_accepts_the_folded_file(folded: Folded, capsys: Output, name: str) -> None:
    _, run, out = folded(name)
    capsys.readouterr()
    assert command("verify", out, "--run", run, "--no-runtime") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["ok"] * 5
    assert "largest difference 0 over" in printed[1]


@needs_llama_cpp
@every
def test_verify_compares_in_llama_cpp(folded: Folded, capsys: Output, name: str) -> None:
    """Measured KLs are 3e-4 to 7e-4 (8-bit activations); the base in place of the folded file is off by over 0.1."""
    base, run, out = folded(name)
    code = command("verify", out, "--run", run, "--tokens", 60)
    printed = capsys.readouterr().out
    assert code == int("FAILED" in printed)
    null, file, *adapter = kls(printed)
    assert len(adapter) == (name in FILES)  # an update of scales is no LoRA
    assert null < 2e-3
    assert max([file, *adapter]) < KL_FACTOR * null
    assert command("verify", base, "--run", run, "--tokens", 60) == 1
    null, file, *adapter = kls(capsys.readouterr().out)
    assert max(adapter, default=0) < KL_FACTOR * null
    assert file > 0.1


def kls(text: str) -> list[float]:
    """Mean KL of null run, folded file and adapter."""
    return [float(figure) for figure in re.findall(r"llama\.cpp, .* KL (\S+),", text)]


def flip_code(out: bytearray, base: Path) -> str:
    info = tensors_of(base)["blk.1.ffn_up.weight"]
    out[info.data_offset + 20 * 7 + 11] ^= 0x10
    return "decoded file = training weights"


def flip_scale(out: bytearray, base: Path) -> str:
    """The scale of a block becomes not a number."""
    info = tensors_of(base)["blk.1.ffn_up.weight"]
    out[info.data_offset + 20 * 7 : info.data_offset + 20 * 7 + 2] = np.float16("nan").tobytes()
    return "decoded file = training weights"


def change_untouched(out: bytearray, base: Path) -> str:
    info = tensors_of(base)["blk.2.attn_norm.weight"]
    out[info.data_offset] ^= 1
    return "untouched tensors: same sha256"


def change_metadata(out: bytearray, base: Path) -> str:
    at = out.index(b"tiny llama")
    out[at : at + 4] = b"huge"
    return "key-value section: same sha256"


@pytest.mark.parametrize("tamper", [flip_code, flip_scale, change_untouched, change_metadata])
def test_verify_finds_a_changed_file(
    folded: Folded, tmp_path: Path, capsys: Output, tamper: Callable[[bytearray, Path], str]
) -> None:
    base, run, out = folded("llama Q4_1")
    content = bytearray(out.read_bytes())
    failing = tamper(content, base)
    (tmp_path / "out.gguf").write_bytes(content)
    capsys.readouterr()
    assert command("verify", tmp_path / "out.gguf", "--run", run, "--no-runtime") == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:39].rstrip() for line in lines if not line.startswith("ok")] == [f"FAILED  {failing}"]


def test_verify_finds_the_base_and_another_format(folded: Folded, tmp_path: Path, capsys: Output) -> None:
    base, run, _ = folded("llama Q4_1")
    assert command("verify", base, "--run", run, "--no-runtime") == 1
    assert "FAILED  decoded file = training weights" in capsys.readouterr().out
    assert command("fold", run, "-o", tmp_path / "wide.gguf", "--to", "f32") == 0
    assert command("verify", tmp_path / "wide.gguf", "--run", run, "--no-runtime") == 1
    assert "FAILED  same tensors, types and shapes" in capsys.readouterr().out


def test_run_folder_holds_what_is_needed(trained: Trained, data: Path) -> None:
    base, run = trained("llama", "Q4_1", "--eval-steps", 2)
    names = {path.name for path in run.iterdir()}
    assert names == {"config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "adapter", "report.html"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1
    for key in ("samples_per_second", "tokens_per_second", "peak_memory_bytes", "wall_seconds", "train_seconds"):
        assert summary[key] > 0
    assert summary["peak_memory_bytes"] > 50e6  # the interpreter alone; a figure in kilobytes would fail
    assert summary["wall_seconds"] >= summary["train_seconds"]
    # q and o: 2 groups to 64 rows, k and v: to 32, gate and up: to 96, down: 3 groups to 64; rank 8, 3 layers
    assert summary["trainable_parameters"] == 3 * 8 * (2 * (2 + 64) + 2 * (2 + 32) + 2 * (2 + 96) + 3 + 64)
    assert summary["data_sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert summary["base_weights_sha256"] == load(base).weights_hash()
    assert (summary["train_rows"], summary["eval_rows"], summary["steps"]) == (14, 6, 6)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics if "loss" in m] == [1, 2, 3, 4, 5, 6]
    assert [m["step"] for m in metrics if "eval_loss" in m] == [0, 2, 4, 6]
    assert metrics[-1]["eval_loss"] == summary["eval_loss_after"]
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample) == {"prompt", "reference", "before", "after"}
    assert sample["reference"].startswith("is ")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["learning_rate"], config["lora_alpha"], config["max_steps"]) == (0.01, 16.0, 6)


def test_report_stands_alone(trained: Trained) -> None:
    _, run = trained("llama", "Q4_1")
    html = (run / "report.html").read_text()
    assert "<svg" in html
    assert "held-out loss after" in html
    outside = re.findall(r"""(?:src|href|action)\s*=\s*["'](?!#)[^"']*|url\((?!\s*["']?#)[^)]*|@import[^;]*""", html)
    assert outside == []  # what is left are names of XML vocabularies, which nothing fetches


def test_same_command_gives_the_same_adapter(trained: Trained, data: Path, tmp_path: Path) -> None:
    """From the run's own config.yaml; a command-line option wins over the file."""
    _, run = trained("llama", "Q4_1")
    again = ("--config", run / "config.yaml", "--output-dir")
    assert command("train", *again, tmp_path / "same") == 0
    assert command("train", *again, tmp_path / "other", "--seed", 7) == 0
    ours, same, other = (load_file(p / "adapter" / "adapter_model.safetensors") for p in (run, *tmp_path.iterdir()))
    if (tmp_path / "same") != next(iter(tmp_path.iterdir())):
        same, other = other, same
    assert all(torch.equal(ours[key], same[key]) for key in ours)
    assert not all(torch.equal(ours[key], other[key]) for key in ours)


def test_eval_of_base_file_and_adapter(folded: Folded, data: Path, capsys: Output) -> None:
    """The folded file and the adapter on the base are the same model, so they have the same loss."""
    base, run, out = folded("llama Q4_1")
    assert command("eval", base, out, "--adapter", run, "--data", data) == 0
    table = losses(capsys.readouterr().out)
    assert len(table) == 3
    assert table[1] == table[2] < table[0] - 0.1


@needs_llama_cpp
def test_eval_in_llama_cpp_agrees(folded: Folded, data: Path, capsys: Output) -> None:
    """Within what rounding activations to 8 bits does to the loss; training moved it by far more."""
    base, run, out = folded("llama Q4_1")
    arguments = ("eval", base, out, "--adapter", run, "--data", data)
    assert command(*arguments) == 0
    ours = losses(capsys.readouterr().out)
    assert command(*arguments, "--runtime", "llama.cpp") == 0
    assert losses(capsys.readouterr().out) == pytest.approx(ours, abs=0.03)


def losses(table: str) -> list[float]:
    """The column `loss` of eval's table."""
    return [float(line.split("│")[3]) for line in table.splitlines() if re.search(r"│\s*\d+\.\d{4}", line)]


def test_generate_sets_variants_side_by_side(folded: Folded, capsys: Output) -> None:
    base, run, out = folded("llama Q4_1")
    arguments = ("generate", base, out, "--adapter", run, "--max-new-tokens", 5)
    assert command(*arguments, "--prompt", "the cat", "--prompt", "hello world") == 0
    rows = [[c.strip() for c in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [row[0] for row in rows if row[0]] == ["the cat", "hello world"]
    text = "".join("".join(row[1:2]) for row in rows)
    assert ["".join(row[2]) for row in rows] == ["".join(row[3]) for row in rows]  # folded file = adapter
    assert text != "".join("".join(row[2]) for row in rows)  # the base says something else


def test_eval_on_the_rows_that_a_run_held_out(folded: Folded, capsys: Output) -> None:
    base, run, out = folded("llama Q4_1")
    capsys.readouterr()
    assert command("eval", base, out, "--data", run) == 0
    losses = [float(x) for x in re.findall(r"torch +│ (\S+) +│", capsys.readouterr().out)]
    summary = json.loads((run / "summary.json").read_text())
    assert losses == pytest.approx([summary["eval_loss_before"], summary["eval_loss_after"]], abs=1e-4)


def test_lora_is_not_folded_in_silence(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    capsys.readouterr()
    assert command("fold", run, "-o", out) == 2
    message = capsys.readouterr().err
    assert "export" in message
    assert "--to gguf-adapter" in message
    assert "--lossy" in message
    assert command("fold", run, "-o", out, "--to", "q4_1") == 2
    assert "--to f16" in capsys.readouterr().err
    assert not out.exists()


def test_own_type_by_name_is_the_exact_fold(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1")
    assert command("fold", run, "-o", tmp_path / "plain.gguf") == 0
    assert command("fold", run, "-o", tmp_path / "named.gguf", "--to", "q4_1") == 0
    assert capsys.readouterr().out.count("exact fold of 21 layers") == 2
    assert (tmp_path / "plain.gguf").read_bytes() == (tmp_path / "named.gguf").read_bytes()


def test_lossy_fold_says_what_is_left(trained: Trained, data: Path, tmp_path: Path, capsys: Output) -> None:
    base, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    capsys.readouterr()
    assert command("fold", run, "-o", out, "--lossy") == 0
    text = capsys.readouterr().out
    before, trained_loss, written, left = map(
        float, re.search(r"base (\S+), trained (\S+), this file (\S+): (\S+)% of the gain", text).groups()
    )
    summary = json.loads((run / "summary.json").read_text())
    # bfloat16 while training, float32 here
    assert before == pytest.approx(summary["eval_loss_before"], abs=0.02)
    assert trained_loss == pytest.approx(summary["eval_loss_after"], abs=0.05)
    assert left == pytest.approx(100 * (before - written) / (before - trained_loss), abs=0.1)
    assert out.stat().st_size == base.stat().st_size
    assert command("verify", out, "--run", run, "--no-runtime") == 2  # there is no exact file to compare with


@pytest.mark.parametrize(("to", "atol"), [("f32", 5e-5), ("f16", 0.02), ("bf16", 0.2), ("q8_0", 0.3)])
def test_lora_folds_into_wider_types(trained: Trained, tmp_path: Path, to: str, atol: float) -> None:
    """atol: what rounding the weights to 24, 11, 8 and about 8 bits does to logits of up to 6."""
    base, run = trained("llama", "Q4_1", "--method", "lora")
    out = tmp_path / "out.gguf"
    assert command("fold", run, "-o", out, "--to", to, *(["--lossy"] if to == "q8_0" else [])) == 0
    model = load_trained(read_run(run)).model
    same_logits(load(out).model, model, atol)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors_of(out).items()}
    assert {kinds[name] for name in kinds if name.startswith("blk.") and "norm" not in name} == {to.upper()}
    assert kinds["token_embd.weight"] == "Q4_1"
    with pytest.raises(AssertionError):
        same_logits(load(base).model, model, 2 * atol)


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", ["lora", "qa-lora"])
def test_exported_adapter_works_in_llama_cpp(
    trained: Trained, tmp_path: Path, capsys: Output, data: Path, architecture: str, method: str
) -> None:
    base, run = trained(architecture, "Q4_1", *(["--method", "lora"] if method == "lora" else []))
    out = tmp_path / "adapter.gguf"
    assert command("export", run, "--to", "gguf-adapter", "-o", out) == 0
    names = set(tensors_of(out))
    assert names == {f"{t}.lora_{x}" for t in tensors_of(base) if "blk" in t and "norm" not in t for x in "ab"} - {
        f"{t}.lora_{x}" for t in tensors_of(base) if t.endswith("bias") for x in "ab"
    }
    loaded = load_trained(read_run(run))
    ids = [5, 100, 260, 33, 270, 12, 99, 280]
    with torch.no_grad():
        ours = loaded.model(torch.tensor([ids])).logits[0].numpy()
    with llama_cpp.LlamaCpp(base, out, n_ctx=64) as runtime:
        theirs = next(iter(runtime.logits(ids)))[1]
    with llama_cpp.LlamaCpp(base, n_ctx=64) as runtime:
        alone = next(iter(runtime.logits(ids)))[1]
    error, effect = (float(np.sqrt(np.mean((x - theirs) ** 2))) for x in (ours, alone))
    assert error < 0.15 < 3 * error + 0.15 < effect  # 8-bit activations give about 0.05


def test_export_overwrites_only_when_told(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1")
    for to, out in (("peft", tmp_path / "peft"), ("gguf-adapter", tmp_path / "adapter.gguf")):
        assert command("export", run, "--to", to, "-o", out) == 0
        capsys.readouterr()
        assert command("export", run, "--to", to, "-o", out) == 2
        assert "exists already" in capsys.readouterr().err
        assert command("export", run, "--to", to, "-o", out, "--overwrite") == 0


def test_transformers_folder_folds_to_a_folder(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    model, run = trained("folder", "F32", "--method", "lora")
    out = tmp_path / "merged"
    assert command("fold", run, "-o", out) == 0
    theirs = AutoModelForCausalLM.from_pretrained(out)
    same_logits(theirs, load_trained(read_run(run)).model, 1e-4)  # float32, W + BA added before or after the product
    with pytest.raises(AssertionError):
        same_logits(AutoModelForCausalLM.from_pretrained(model), theirs, 0.1)
    assert AutoTokenizer.from_pretrained(out)("the cat") == AutoTokenizer.from_pretrained(model)("the cat")
    ours, before = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    adapted = {f"{path}.weight" for path, _ in adapted_layers(load_trained(read_run(run)).model)}
    assert ours.keys() == before.keys()
    for key in before.keys() - adapted:
        assert torch.equal(ours[key], before[key])


def test_folded_folder_keeps_its_weights_in_their_type(trained: Trained, tmp_path: Path) -> None:
    _, run = trained("folder", "F32", "--method", "lora")
    assert command("fold", run, "-o", tmp_path / "merged", "--to", "f16") == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    trained_model = load_trained(read_run(run)).model
    for path, layer in adapted_layers(trained_model):
        wanted = base_weight(layer.base) + layer.adapter.delta()
        assert torch.equal(merged[f"{path}.weight"], wanted.half())
    assert merged["model.embed_tokens.weight"].dtype == torch.float32


def test_preview_marks_what_is_learned(trained: Trained, data: Path, capsys: Output) -> None:
    model, _ = trained("llama", "Q4_1")
    assert command("preview", model, "--data", data, "--rows", 1) == 0
    captured = capsys.readouterr()
    assert "row 0" in captured.out
    assert "20 rows of" in captured.err
