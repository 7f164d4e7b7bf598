"""Norms, biases and whole modules that were trained reach GGUF files and MLX folders, whose other tensors stay."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafold.adapters.adapted import plain_parameter
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import load
from lorafold.models.mlx_folder import MLXFolder
from lorafold.runs.fold import load_trained
from lorafold.runs.fold_report import FoldReport, joined
from lorafold.runs.folder import read_run
from tests.cli.conftest import needs_llama_cpp, quick
from tests.practice import command, same_logits
from tests.tiny import tiny_gguf

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]
NORMS = ("--modules-to-save", "norm", "input_layernorm")
SAVED = {  # architecture, types, options, tensors that change beside the adapted layers'
    "llama norms": ("llama", "Q4_1", NORMS, r"output_norm\.weight|blk\.\d\.attn_norm\.weight"),
    "gemma norms, which the file shifts": ("gemma3", "Q4_1", NORMS, r"output_norm\.weight|blk\.\d\.attn_norm\.weight"),
}
WHOLE = {
    "all of llama, whose rows are in another order": ("llama", "F16", ("--method", "full")),
    "LoRA on a head that is tied": ("llama", "F16", ("--method", "lora", "--target-modules", "lm_head", "q_proj")),
    "a tied head alone": ("qwen3", "F16", ("--method", "lora", "--modules-to-save", "lm_head")),
    "an embedding alone": ("qwen3", "F16", ("--method", "lora", "--modules-to-save", "embed_tokens")),
    "all of gemma": ("gemma3", "F16", ("--method", "full")),
    "last layers of qwen2": ("qwen2", "BF16", ("--method", "last-layers", "--layers", 1)),
    "LoRA on 16 bits": ("llama", "F16", ("--method", "lora")),
    "LoRA and norms": ("qwen3", "F32", ("--method", "lora", *NORMS)),
}


def changed(base: Path, made: Path) -> set[str]:
    """Names of tensors with other bytes."""
    files = [MLXFolder(path) if path.is_dir() else GGUFFile(path) for path in (base, made)]
    assert files[0].tensors.keys() == files[1].tensors.keys()
    return {name for name in files[0].tensors if not np.array_equal(files[0].raw(name), files[1].raw(name))}


@pytest.mark.parametrize("kind", SAVED)
def test_an_exact_fold_holds_them(trained: Trained, tmp_path: Path, capsys: Output, kind: str) -> None:
    architecture, types, options, names = SAVED[kind]
    base, run = trained(architecture, types, *options)
    out = tmp_path / "tuned.gguf"
    capsys.readouterr()
    assert command("fold", run, "-o", out) == 0
    assert ("near" if architecture == "gemma3" else "exact") + " fold of" in capsys.readouterr().out
    moved = {name for name in changed(base, out) if re.fullmatch(names, name)}
    assert len(moved) == (7 if architecture == "gemma3" else 4)
    assert out.stat().st_size == base.stat().st_size
    wanted = load_trained(read_run(run)).model
    same_logits(load(out).model, wanted, atol=1e-4)
    with pytest.raises(AssertionError):
        same_logits(load(base).model, wanted, atol=0.1)
    assert command("verify", out, "--run", run, "--no-runtime") == 0
    how = "rounded, 100.00% of the worst one's update is left" if architecture == "gemma3" else "as trained"
    assert whole_line(capsys) == f"ok {len(moved)} tensors, 0 differ; {how}"


def whole_line(capsys: Output) -> str:
    """What `verify` says of them."""
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "tensors trained whole: same sha256" in x)
    return " ".join(line.replace("tensors trained whole: same sha256", "").split())


def test_verify_finds_one_that_is_other(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "Q4_1", *NORMS)
    out = tmp_path / "tuned.gguf"
    assert command("fold", run, "-o", out) == 0
    content, file = bytearray(out.read_bytes()), GGUFFile(out)
    content[file.data_start + file.tensors["output_norm.weight"].offset] ^= 1
    out.write_bytes(content)
    capsys.readouterr()
    assert command("verify", out, "--run", run, "--no-runtime") == 1
    assert whole_line(capsys) == "FAILED 4 tensors, 1 differ; as trained"


@pytest.mark.parametrize("kind", WHOLE)
def test_files_of_plain_numbers_are_folded_in_their_types(trained: Trained, tmp_path: Path, kind: str) -> None:
    architecture, types, options = WHOLE[kind]
    base, run = trained(architecture, types, *options)
    out = tmp_path / "tuned.gguf"
    assert command("fold", run, "-o", out, *(["--lossy"] if types == "BF16" else [])) == 0
    kinds = {name: info.type for name, info in GGUFFile(base).tensors.items()}
    if "lm_head" in options or "embed_tokens" in options:
        kinds["output.weight"] = kinds["token_embd.weight"]  # which the base has for both
    assert {name: info.type for name, info in GGUFFile(out).tensors.items()} == kinds
    wanted = load_trained(read_run(run)).model
    bound = {"F32": 1e-4, "F16": 0.02, "BF16": 0.2}[types]  # weights of 24, 11 and 8 bits, logits of up to 6
    same_logits(load(out).model, wanted, bound)
    with pytest.raises(AssertionError):
        same_logits(load(base).model, wanted, 2 * bound)


@needs_llama_cpp
def test_llama_cpp_computes_with_them(trained: Trained, tmp_path: Path) -> None:
    """As close to torch as it is for the base; the base itself is far off."""
    base, run = trained("gemma3", "F16", "--method", "full")
    out = tmp_path / "tuned.gguf"
    assert command("fold", run, "-o", out) == 0
    ids = [5, 100, 260, 33, 270, 12, 99, 280]
    with torch.no_grad():
        ours = load_trained(read_run(run)).model(torch.tensor([ids])).logits[0].numpy()
    far = []
    for file in (out, base):
        with LlamaCpp(file, n_ctx=64) as runtime:
            far.append(float(np.sqrt(np.mean((next(iter(runtime.logits(ids)))[1] - ours) ** 2))))
    assert far[0] < 0.05
    assert far[1] > 10 * far[0]


@pytest.mark.parametrize("options", [("--lossy",), ("--to", "f16"), ("--to", "q8_0", "--lossy")])
def test_quantizing_again_keeps_vectors_whole(trained: Trained, tmp_path: Path, options: tuple[str, ...]) -> None:
    _, run = trained("qwen2", "Q4_1", "--method", "lora", "--bias", "all", *NORMS)
    wanted, out = load_trained(read_run(run)).model, tmp_path / "tuned.gguf"
    assert command("fold", run, "-o", out, *options) == 0
    model = load(out).model
    for name in ("model.norm.weight", "model.layers.1.input_layernorm.weight", "model.layers.2.self_attn.v_proj.bias"):
        assert torch.equal(plain_parameter(model, name), trained_parameter(wanted, name))
        assert not torch.equal(plain_parameter(model, name), plain_parameter(wanted, name))


def trained_parameter(model: torch.nn.Module, name: str) -> torch.Tensor:
    """A parameter as the model computes with it."""
    owner, _, own_name = name.rpartition(".")
    return getattr(model.get_submodule(owner), own_name)


def test_what_was_trained_whole_is_not_quantized_on_the_way(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained("llama", "F16", "--method", "full")
    capsys.readouterr()
    assert command("fold", run, "-o", tmp_path / "tuned.gguf", "--to", "q4_1") == 2
    assert "leave --to out, then lorafold quantize" in capsys.readouterr().err
    assert command("fold", run, "-o", tmp_path / "tuned.gguf") == 0
    options = ["--bits", 4, "--group-size", 32, "--method", "rtn"]
    assert command("quantize", tmp_path / "tuned.gguf", "-o", tmp_path / "small.gguf", *options) == 0


def test_matrices_trained_whole_stay_dense_where_layers_are_quantized(trained: Trained, tmp_path: Path) -> None:
    _, run = trained("llama", "F16", "--method", "lora", "--modules-to-save", "embed_tokens")
    assert command("fold", run, "-o", tmp_path / "tuned.gguf", "--to", "q8_0", "--lossy") == 0
    file = GGUFFile(tmp_path / "tuned.gguf")
    assert file.tensors["token_embd.weight"].type == "F16"
    assert file.tensors["blk.0.attn_q.weight"].type == "Q8_0"
    same_logits(load(tmp_path / "tuned.gguf").model, load_trained(read_run(run)).model, atol=0.3)  # 8 bits


def test_a_file_with_matrices_of_both_kinds_keeps_them(data: Path, tmp_path: Path, capsys: Output) -> None:
    types = {"attn_q": "F16", "ffn_down": "F16", "": "Q8_0"}
    base, run = tiny_gguf(tmp_path, "qwen2", types), tmp_path / "run"
    assert command("train", base, "--data", data, "-o", run, *quick("--method", "lora")) == 0
    assert command("fold", run, "-o", tmp_path / "tuned.gguf") == 2  # LoRA has no exact place in Q8_0
    assert command("fold", run, "-o", tmp_path / "tuned.gguf", "--lossy") == 0
    made = GGUFFile(tmp_path / "tuned.gguf")
    assert {name: info.type for name, info in made.tensors.items()} == {
        name: info.type for name, info in GGUFFile(base).tensors.items()
    }
    same_logits(load(tmp_path / "tuned.gguf").model, load_trained(read_run(run)).model, atol=0.3)


def test_biases_in_the_order_of_their_rows(data: Path, tmp_path: Path) -> None:
    base, run = tiny_gguf(tmp_path, "llama", "Q4_1", bias=True), tmp_path / "run"
    assert command("train", base, "--data", data, "-o", run, *quick("--method", "lora", "--bias", "all")) == 0
    assert command("fold", run, "-o", tmp_path / "tuned.gguf", "--to", "f32") == 0
    same_logits(load(tmp_path / "tuned.gguf").model, load_trained(read_run(run)).model, atol=1e-4)


def test_loss_beside_an_exact_fold_is_told_apart() -> None:
    """Offsets in coarse steps are what was trained; whole tensors that were rounded are not."""
    offsets = FoldReport("exact", 20, 0.9, 0.95, 0.5, 0, 0)
    assert joined(offsets, [], True) == offsets
    assert joined(offsets, [1.0, 1.0], True) == replace(offsets, layers=22)
    near = joined(offsets, [1.001, 0.995], False)
    assert (near.kind, near.layers, near.kept) == ("near", 22, 0.995)
    assert near.mean_kept == pytest.approx((20 + 1.996) / 22)
    assert joined(offsets, [1.0, 1.0001], False).kind == "near"  # rounded, and by luck as far as was wanted
    assert joined(offsets, [0.5], False).kind == "lossy"
    again = joined(FoldReport("near", 2, 0.992, 0.996, 0.1, 0, 0), [0.999, 1.0], False)
    assert (again.kind, again.kept) == ("near", 0.992)
    assert again.mean_kept == pytest.approx((2 * 0.996 + 1.999) / 4)
    assert joined(FoldReport("lossy", 2, 0.5, 0.6, 1.0, 0, 0), [1.0], True).kind == "lossy"


def test_a_number_beyond_its_type_is_refused(data: Path, tmp_path: Path, capsys: Output) -> None:
    base, run = tiny_gguf(tmp_path, "llama", "F16"), tmp_path / "run"
    line = ["train", base, "--data", data, "-o", run]
    assert command(*line, *quick("--method", "full", "--max-steps", 1, "--learning-rate", 2e5)) == 0
    capsys.readouterr()
    assert command("fold", run, "-o", tmp_path / "tuned.gguf", "--lossy") == 2
    message = capsys.readouterr().err
    assert "model.layers.0.self_attn.q_proj.weight: a number is beyond float16" in message
    assert "norm" not in message  # they are float32 in the file
    assert not (tmp_path / "tuned.gguf").exists()


def mlx(folder: Path, **options: Any) -> Path:
    """A tiny MLX folder."""
    pytest.importorskip("mlx_lm")
    from tests.tiny_mlx import tiny_mlx

    return tiny_mlx(folder, **options)


@pytest.mark.parametrize(
    ("architecture", "options", "names"),
    [
        ("gemma3", NORMS, r"model\.norm\.weight|model\.layers\.\d\.input_layernorm\.weight"),
        ("qwen2", ("--method", "lora", "--bias", "all"), r"model\.layers\.\d\.self_attn\.[qkv]_proj\.bias"),
    ],
)
def test_an_mlx_folder_holds_them(
    data: Path, tmp_path: Path, capsys: Output, architecture: str, options: tuple[str, ...], names: str
) -> None:
    base, run, out = mlx(tmp_path, architecture=architecture, dtype="float16"), tmp_path / "run", tmp_path / "tuned"
    assert command("train", base, "--data", data, "-o", run, *quick(*options)) == 0
    lossy = "lora" in options
    assert command("fold", run, "-o", out, *(["--lossy"] if lossy else [])) == 0
    moved = {name for name in changed(base, out) if re.fullmatch(names, name)}
    assert len(moved) == {"gemma3": 7, "qwen2": 9}[architecture]
    wanted, made = load_trained(read_run(run)).model, load(out).model
    for name in moved:
        assert torch.equal(plain_parameter(made, name), trained_parameter(wanted, name).half().float())
    if not lossy:
        same_logits(made, wanted, atol=0.02)  # float16
        with pytest.raises(AssertionError):
            same_logits(load(base).model, wanted, atol=0.1)
        capsys.readouterr()
        assert command("verify", out, "--run", run, "--no-runtime") == 0
        assert whole_line(capsys).startswith(f"ok {len(moved)} tensors, 0 differ; rounded, 99.")


@pytest.mark.parametrize("saved", [("embed_tokens",), ("lm_head",), ("embed_tokens", "lm_head")])
def test_an_mlx_embedding_that_is_not_quantized(
    data: Path, tmp_path: Path, capsys: Output, saved: tuple[str, ...]
) -> None:
    """Tied in the base, taken apart unless both are trained as one."""

    def blocks(path: str, _: Any, *__: Any) -> bool:
        return "embed_tokens" not in path

    base, run, out = mlx(tmp_path, dtype="float16", predicate=blocks), tmp_path / "run", tmp_path / "tuned"
    line = ["train", base, "--data", data, "-o", run, *quick("--modules-to-save", *saved)]
    assert command(*line) == 0
    assert command("fold", run, "-o", out) == 0
    same_logits(load(out).model, load_trained(read_run(run)).model, atol=0.02)  # float16
    capsys.readouterr()
    assert command("verify", out, "--run", run, "--no-runtime") == 0
    assert whole_line(capsys).startswith(f"ok {len(saved)} tensors, 0 differ; rounded, ")


def test_lora_on_plain_matrices_of_an_mlx_folder_needs_no_loss(data: Path, tmp_path: Path, capsys: Output) -> None:
    def others(path: str, _: Any, *__: Any) -> bool:
        return "q_proj" not in path

    base, run, out = mlx(tmp_path, dtype="float16", predicate=others), tmp_path / "run", tmp_path / "tuned"
    options = quick("--method", "lora", "--target-modules", "q_proj")
    assert command("train", base, "--data", data, "-o", run, *options) == 0
    capsys.readouterr()
    assert command("fold", run, "-o", out) == 0
    assert "near fold of 3 layers" in capsys.readouterr().out
    same_logits(load(out).model, load_trained(read_run(run)).model, atol=0.02)


def test_mlx_bfloat16_says_what_it_cannot_hold(data: Path, tmp_path: Path, capsys: Output) -> None:
    """Norms near 1 move in steps of 2^-8 to 2^-7."""
    base, run = mlx(tmp_path), tmp_path / "run"
    line = ["train", base, "--data", data, "-o", run, *quick(*NORMS, "--method", "lora", "--learning-rate", 1e-3)]
    assert command(*line) == 0
    assert command("fold", run, "-o", tmp_path / "tuned", "--lossy") == 0
    assert "lossy fold of 25 layers" in capsys.readouterr().out
    line = ["train", base, "--data", data, "-o", tmp_path / "other", *quick(*NORMS, "--learning-rate", 1e-3)]
    assert command(*line) == 0
    capsys.readouterr()
    assert command("fold", tmp_path / "other", "-o", tmp_path / "none") == 2
    message = capsys.readouterr().err
    assert "pass --lossy to write it all the same" in message
    assert "--to f16" not in message  # an MLX folder keeps its own types
    assert not (tmp_path / "none").exists()
    assert command("fold", tmp_path / "other", "-o", tmp_path / "other-tuned", "--lossy") == 0
    capsys.readouterr()
    assert command("verify", tmp_path / "other-tuned", "--run", tmp_path / "other", "--no-runtime") == 1
    assert whole_line(capsys).startswith("FAILED 4 tensors, 0 differ; rounded, ")  # the file is not what was trained


@pytest.mark.parametrize("to", ["f32", "nf4", "int8"])
def test_a_bitsandbytes_folder_holds_them(data: Path, tmp_path: Path, to: str) -> None:
    """In 16 or 32 bits beside merged matrices, or beside matrices that are quantized again."""
    source, base, run = tiny_gguf(tmp_path, "qwen2", "F16", wide=True), tmp_path / "base", tmp_path / "run"
    assert command("quantize", source, "-o", base, "--format", "nf4") == 0
    options = quick("--method", "lora", "--bias", "all", *NORMS, "lm_head")
    assert command("train", base, "--data", data, "-o", run, *options) == 0
    assert command("fold", run, "-o", tmp_path / "tuned", "--to", to, *(["--lossy"] if to != "f32" else [])) == 0
    wanted, made = load_trained(read_run(run)).model, load(tmp_path / "tuned").model
    for name in ("model.norm.weight", "lm_head.weight", "model.layers.2.self_attn.v_proj.bias"):
        stored, plain = plain_parameter(made, name), plain_parameter(wanted, name)
        assert stored is not None
        dtype = torch.float32 if to == "f32" else torch.float16
        assert torch.equal(stored, trained_parameter(wanted, name).to(dtype).float())
        assert not torch.equal(stored, plain)
    assert torch.equal(made.model.embed_tokens.weight, wanted.model.embed_tokens.weight)  # tied to the head before
    if to == "f32":
        same_logits(made, wanted, atol=1e-4)
