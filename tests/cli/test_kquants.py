"""A mixed K-quant file, as Q4_K_M files are, from training to the proof in llama.cpp: promoted and in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafold.evals import llama_cpp
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command, same_logits
from tests.tiny import tiny_gguf

MIXED_K = {"attn_v": "Q6_K", "ffn_down": "Q6_K", "token_embd": "Q3_K", "attn_k": "Q5_K", "attn_q": "Q2_K", "": "Q4_K"}
Made = Callable[[str], tuple[Path, Path, Path, str]]
ways = pytest.mark.parametrize("k_quants", ["promote", "in-place"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Made:
    """`made("in-place")`: (base, run, folded file, what the training said)."""
    done: dict[str, tuple[Path, Path, Path, str]] = {}

    def make(k_quants: str) -> tuple[Path, Path, Path, str]:
        if k_quants not in done:
            folder = tmp_path_factory.mktemp("k-quants")
            base, run, out = tiny_gguf(folder, "llama", MIXED_K, wide=True), folder / "run", folder / "tuned.gguf"
            options = quick("--k-quants", k_quants, "--learning-rate", 0.03)
            with pytest.MonkeyPatch.context() as patch:
                said: list[str] = []
                patch.setattr("lorafold.runs.display.Display.say", lambda _, text: said.append(text))
                assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
            assert command("fold", run, "-o", out) == 0
            done[k_quants] = base, run, out, "\n".join(said)
        return done[k_quants]

    return make


def kinds(path: Path) -> dict[str, str]:
    return {name: info.type for name, info in GGUFFile(path).tensors.items()}


@ways
def test_training_says_what_happens_to_each_type(made: Made, k_quants: str) -> None:
    said = made(k_quants)[3]
    assert "6 matrices of type Q6_K stay as they are: it stores no offset to learn" in said
    assert ("9 matrices promoted from Q4_K to Q4_1 (weights within 0.0" in said) == (k_quants == "promote")
    assert ("3 matrices promoted from Q5_K to Q5_1" in said) == (k_quants == "promote")


@ways
def test_the_model_learns(made: Made, k_quants: str) -> None:
    summary = read_run(made(k_quants)[1]).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1


def test_types_of_the_folded_files(made: Made) -> None:
    base, _, out, _ = made("in-place")
    assert kinds(out) == kinds(base)
    assert out.stat().st_size == base.stat().st_size
    base, _, out, _ = made("promote")
    promoted = {"Q4_K": "Q4_1", "Q5_K": "Q5_1"}
    assert kinds(out) == {name: promoted.get(kind, kind) for name, kind in kinds(base).items()}


def test_in_place_leaves_scales_and_codes_alone(made: Made) -> None:
    """Of a Q4_K block bytes 2-3 (dmin), 8-11 and the upper halves of 12-15 (minima) may change, and no others."""
    base, _, out, _ = made("in-place")
    before, after = GGUFFile(base), GGUFFile(out)
    moved = np.zeros(144, bool)
    for name, kind in kinds(base).items():
        if kind == "Q4_K":
            moved |= (before.blocks(name) != after.blocks(name)).any((0, 1))
            low = before.blocks(name)[..., 12:16] & 15
            np.testing.assert_array_equal(low, after.blocks(name)[..., 12:16] & 15)
            np.testing.assert_array_equal(before.blocks(name)[..., 4:8], after.blocks(name)[..., 4:8])
    assert set(np.flatnonzero(moved)) <= {2, 3, *range(8, 16)}
    assert moved[2:4].any()


@ways
def test_folded_file_computes_what_was_trained(made: Made, k_quants: str) -> None:
    base, run, out, _ = made(k_quants)
    trained = load_trained(read_run(run)).model
    same_logits(load(out).model, trained, 0.0)
    with pytest.raises(AssertionError):
        same_logits(load(base).model, trained, 0.05)


@ways
@pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
def test_verify_proves_it(made: Made, k_quants: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, run, out, _ = made(k_quants)
    capsys.readouterr()
    assert command("verify", out, "--run", run) == 0
    text = capsys.readouterr().out
    assert "largest difference 0 over" in text
    assert ("promoted within 0.0" in text) == (k_quants == "promote")
    assert "ok      llama.cpp, folded file" in text


def test_adapter_remembers_the_way(made: Made, tmp_path: Path) -> None:
    """Loaded on the base again it stands on the formats it was trained on, and exports as a PEFT folder and GGUF."""
    for way, kind in (("promote", "Q4_1"), ("in-place", "Q4_K")):
        _, run, _, _ = made(way)
        trained = load_trained(read_run(run))
        assert trained.model.get_submodule("model.layers.0.mlp.up_proj.base").codec == kind
        assert command("export", run, "--to", "gguf-adapter", "-o", tmp_path / f"{way}.gguf") == 0
        assert command("export", run, "--to", "peft", "-o", tmp_path / way) == 0


def test_what_would_store_scales_is_named(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_gguf(tmp_path, "llama", "Q4_K", wide=True)
    options = quick("--adapt", "scale", "--k-quants", "in-place")
    assert command("train", base, "--data", data, "--output-dir", tmp_path / "run", *options) == 2
    said = capsys.readouterr().err
    assert "promote them (--k-quants promote), leave them out" in said
    assert "whose matrices are Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, or from an MLX folder" in said


def test_lossy_fold_needs_a_type_that_is_made_here(
    made: Made, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = made("promote")[0]
    options = quick("--method", "lora")
    assert command("train", base, "--data", data, "--output-dir", tmp_path / "run", *options) == 0
    capsys.readouterr()
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf", "--lossy") == 2
    said = capsys.readouterr().err
    assert "Q6_K (6 matrices)" in said
    assert "Q4_K (9 matrices)" in said
    assert "choose --to f16 and run it on that, or --to q4_0, q4_1" in said
    assert "layers.0" not in said
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf", "--to", "q8_0", "--lossy") == 0
    trained = load_trained(read_run(tmp_path / "run")).model
    with torch.no_grad():
        same_logits(load(tmp_path / "out.gguf").model, trained, 0.5)
