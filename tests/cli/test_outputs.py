"""Output paths and disks: refused before any work, never half-written, nothing else taken along."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.conftest import quick
from tests.practice import command, tiny_folder
from tests.tiny import tiny_gguf

Output = pytest.CaptureFixture[str]
Trained = Callable[..., tuple[Path, Path]]
LORA = ("--method", "lora")
Refused = Callable[..., str]


def test_output_below_a_file(train: Refused, trained: Trained, refused: Refused, tmp_path: Path) -> None:
    _, run = trained()
    (tmp_path / "mine.txt").write_text("keep me")
    out = tmp_path / "mine.txt" / "deeper" / "out"
    for arguments in (("fold", run), ("export", run, "--to", "peft"), ("export", run, "--to", "gguf-adapter")):
        assert "is not a folder" in refused(*arguments, "-o", out)
    assert "is not a folder" in train("--output-dir", out)


def test_output_is_checked_before_any_work(train: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a large model takes a while."""
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep me")

    def loading(*_: object) -> None:
        raise AssertionError("the model is loaded first")

    monkeypatch.setattr("lorafold.runs.start.load", loading)
    assert "exists already" in train("--output-dir", tmp_path / "taken")


def test_every_command_asks_for_permission(
    train: Refused, trained: Trained, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, who may write anywhere: so the answer of the operating system is replaced."""
    _, run = trained()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    for arguments in (("fold", run), ("export", run, "--to", "peft"), ("export", run, "--to", "gguf-adapter")):
        assert f"no permission to write in {tmp_path}" in refused(*arguments, "-o", tmp_path / "out")
    assert f"no permission to write in {tmp_path}" in train("--output-dir", tmp_path / "run")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Inside, writing beyond so many bytes of a file fails as on a full disk (with EFBIG; Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


OUTPUTS = {
    "fold": (("llama", "Q4_1"), ("fold",)),
    "fold promoted": (("llama", "Q4_0"), ("fold",)),
    "fold to f16": (("llama", "Q4_1"), ("fold", "--to", "f16")),
    "fold a folder": (("folder", "F32", "--method", "lora"), ("fold",)),
    "export peft": (("llama", "Q4_1"), ("export", "--to", "peft")),
    "export gguf-adapter": (("llama", "Q4_1"), ("export", "--to", "gguf-adapter")),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_disk_that_fills_while_writing(trained: Trained, refused: Refused, tmp_path: Path, name: str) -> None:
    options, (verb, *rest) = OUTPUTS[name]
    _, run = trained(*options)
    out = tmp_path / "out"
    with files_of_at_most(20_000):
        message = refused(verb, run, "-o", out, *rest)
    assert f"{out} was not written" in message
    assert "nothing was left behind" in message
    assert command(verb, run, "-o", out, *rest) == 0  # the run is unharmed


@pytest.mark.parametrize("name", OUTPUTS)
def test_disk_that_is_full_when_renaming(
    trained: Trained, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options, (verb, *rest) = OUTPUTS[name]
    _, run = trained(*options)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert "the disk is full" in refused(verb, run, "-o", tmp_path / "out", *rest)


def test_failed_overwrite_keeps_the_old_file(trained: Trained, refused: Refused, tmp_path: Path) -> None:
    _, run = trained()
    out = tmp_path / "out.gguf"
    out.write_text("the old one")
    with files_of_at_most(20_000):
        refused("fold", run, "-o", out, "--overwrite")
    assert out.read_text() == "the old one"


def test_failed_overwrite_keeps_the_old_folder(trained: Trained, refused: Refused, tmp_path: Path) -> None:
    """Also when the very last step, the rename, fails."""
    _, run = trained()
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("the old one")
    (out / "adapter_config.json").write_text("{}")
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if Path(target) == out and (Path(source) / "adapter_model.safetensors").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", full)
        refused("export", run, "--to", "peft", "-o", out, "--overwrite")
    assert (out / "old.txt").read_text() == "the old one"


def test_overwriting_replaces_a_whole_folder(trained: Trained, tmp_path: Path) -> None:
    _, run = trained()
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("the old one")
    (out / "adapter_config.json").write_text("{}")
    assert command("export", run, "--to", "peft", "-o", out, "--overwrite") == 0
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "adapter_config.json", "adapter_model.safetensors"}


def test_overwriting_never_takes_other_things_along(
    trained: Trained, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home folder, the run itself, the current folder: what is replaced whole must be a model or an adapter."""
    _, run = trained()
    home, copy = tmp_path / "home", tmp_path / "run"
    (home / "sub").mkdir(parents=True)
    (home / "sub" / "thesis.txt").write_text("keep me")
    (home / "notes.txt").write_text("keep me too")
    shutil.copytree(run, copy)
    for out in (home, home / "sub", copy):
        assert "is not replaced: besides model or adapter files" in refused(
            "export", run, "--to", "peft", "-o", out, "--overwrite"
        )
    monkeypatch.chdir(home)
    assert "sub" in refused("export", run, "--to", "peft", "-o", ".", "--overwrite")


def test_disk_that_fills_while_training(
    trained: Trained, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    model, _ = trained()
    calls = []

    def full(_: int) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert command("train", model, "--data", data, "--output-dir", tmp_path / "run", *quick()) == 2
    assert "the disk is full" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("base", "options", "ways"),
    [
        ("Q4_1", (), ["fold"]),
        ("Q4_1", LORA, ["peft", "gguf-adapter"]),
        ("Q4_1", (*LORA, "--modules-to-save", "norm"), ["peft", "fold"]),
        ("Q4_1", (*LORA, "--target-modules", ".*"), ["peft", "fold"]),
        ("F16", ("--method", "last-layers"), ["fold"]),
        ("F16", (*LORA, "--use-dora"), ["peft", "fold"]),
        ("mlx", (), ["fold"]),
        ("mlx", LORA, ["peft", "mlx-adapter"]),
        ("mlx", (*LORA, "--use-dora"), ["peft", "fold"]),
        ("folder", ("--method", "last-layers"), ["fold"]),
        ("folder", LORA, ["peft", "fold"]),
        ("nf4", LORA, ["peft", "fold"]),
    ],
)
def test_what_is_said_to_come_next_works(
    base: str,
    options: tuple[str, ...],
    ways: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Output,
) -> None:
    """As it is printed, both ways where there are two, and a folded model trains on."""
    monkeypatch.chdir(tmp_path)
    if base in ("Q4_1", "F16"):
        model = tiny_gguf(tmp_path, "qwen2", base)
    else:
        model = tiny_folder(tmp_path / "source", wide=base == "nf4")
    if base in ("mlx", "nf4"):
        kind = ("--bits", 4, "--group-size", 32, "--method", "rtn") if base == "mlx" else ("--format", "nf4")
        assert command("quantize", model, "-o", base, *kind) == 0
        model = tmp_path / base
    capsys.readouterr()
    assert command("train", model, "--data", data, "-o", "run", *quick(*options)) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("next: "))
    said = [way.rstrip(")").split()[1:] for way in line.removeprefix("next: ").split("   (or: ")]
    assert [way[0] if way[0] == "fold" else way[way.index("--to") + 1] for way in said] == ways
    for way in said:
        assert command(*way) == 0
        made = tmp_path / way[way.index("-o") + 1]
        assert made.is_dir() == (made.suffix != ".gguf")
    if ways[-1] == "fold":
        assert command("train", made, "--data", data, "-o", "again", *quick(*LORA, "--max-steps", 1)) == 0


def test_a_folder_is_not_folded_into_what_looks_like_a_file(data: Path, tmp_path: Path, capsys: Output) -> None:
    model, run = tiny_folder(tmp_path / "source"), tmp_path / "run"
    assert command("train", model, "--data", data, "-o", run, *quick("--method", "lora")) == 0
    assert command("fold", run, "-o", tmp_path / "tuned.gguf") == 2
    assert f"is a folder, and so is what it is folded into; give {tmp_path / 'tuned'}" in capsys.readouterr().err
    assert not (tmp_path / "tuned.gguf").exists()
