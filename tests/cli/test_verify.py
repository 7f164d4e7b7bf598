"""`lorafold verify` accepts what was folded and finds whatever else is in its place."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lorafold.evals.compare import KL_FACTOR
from tests.cli.conftest import FILES, Folded, every_file, needs_llama_cpp
from tests.practice import command, tensors_of

Trained = Callable[..., tuple[Path, Path]]
Output = pytest.CaptureFixture[str]


@every_file
def test_verify_accepts_the_folded_file(folded: Folded, capsys: Output, name: str) -> None:
    _, run, out = folded(name)
    capsys.readouterr()
    assert command("verify", out, "--run", run, "--no-runtime") == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["ok"] * 5
    assert "largest difference 0 over" in printed[1]


@needs_llama_cpp
@every_file
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
