"""Runs that several command tests read; none of them may write into these folders."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lorafold.evals import llama_cpp
from tests.practice import command, tiny_folder, write_data
from tests.tiny import tiny_gguf
from tests.tiny_classifier import tiny_bert

# short and steep: the tiny models are random, and the runs need only to learn something
QUICK: dict[str, object] = {
    "--max-steps": 6,
    "--learning-rate": 0.01,
    "--eval-fraction": 0.3,
    "--sample-rows": 1,
    "--sample-tokens": 4,
    "--dtype": "float32",
}
MIXED = {"token_embd": "Q8_0", "attn_v": "Q5_0", "ffn_down": "Q5_1", "attn_k": "Q4_0", "": "Q4_1"}
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
every_file = pytest.mark.parametrize("name", [*FILES, *SCALED])
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="xllamacpp is not installed")
Folded = Callable[[str], tuple[Path, Path, Path]]


def quick(*options: object) -> list[object]:
    """The options with `QUICK` for all that are not among them."""
    return [x for key, value in QUICK.items() if key not in options for x in (key, value)] + list(options)


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _llama_cpp_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp's threads spin at their barriers: beside other processes two are far slower than one."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 rows of prompts and completions."""
    return write_data(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[..., tuple[Path, Path]]:
    """`trained("llama", "Q4_1", "--r", "full")`: (model, run folder); `"folder"` trains a transformers folder."""

    @cache
    def make(architecture: str = "llama", types: str = "Q4_1", *options: object) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("trained")
        if architecture == "folder":
            model = tiny_folder(folder / "model", types)
        else:
            model = tiny_gguf(folder, architecture, MIXED if types == "mixed" else types)
        assert command("train", model, "--data", data, "--output-dir", folder / "run", *quick(*options)) == 0
        return model, folder / "run"

    return make


@pytest.fixture(scope="session")
def folded(trained: Callable[..., tuple[Path, Path]], tmp_path_factory: pytest.TempPathFactory) -> Folded:
    """`folded(name of FILES or SCALED)`: (base, run, folded file); do not write to them."""
    made: dict[str, tuple[Path, Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path, Path]:
        if name not in made:
            base, run = trained(*(FILES | SCALED)[name])
            out = tmp_path_factory.mktemp("folded") / "tuned.gguf"
            assert command("fold", run, "-o", out) == 0
            made[name] = base, run, out
        return made[name]

    return make


METHODS: dict[str, list[object]] = {  # of the tasks whose tiny models are random: steep enough to learn in some epochs
    "lora": ["--r", 4, "--learning-rate", 0.01],
    "vera": ["--r", 16, "--learning-rate", 0.05],
    "full": ["--learning-rate", 0.003],
    "last-layers": ["--layers", 1, "--learning-rate", 0.01],
    "head": ["--learning-rate", 0.1],
}
Make = Callable[..., tuple[Path, Path]]


def runs_of_task(factory: pytest.TempPathFactory, task: str, *options: object) -> Make:
    """`make("bert", "lora")`: (model, run folder) of a task, for an encoder ("bert") or a decoder ("llama")."""
    models: dict[str, Path] = {}

    @cache
    def make(kind: str, method: str) -> tuple[Path, Path]:
        if kind not in models:
            models[kind] = (tiny_bert if kind == "bert" else tiny_folder)(factory.mktemp(kind))
        out = factory.mktemp("run") / "run"
        line = ["--task", task, *options, "--method", method, *METHODS[method], "--dtype", "float32"]
        assert command("train", models[kind], *line, "--output-dir", out) == 0
        return models[kind], out

    return make


def summary(path: Path) -> dict[str, Any]:
    """The figures of a run."""
    return json.loads((path / "summary.json").read_text())


def copy_run(run: Path, target: Path) -> Path:
    """A run folder that may be changed."""
    (target / "adapter").mkdir(parents=True)
    for file in run.rglob("*"):
        if file.is_file():
            (target / file.relative_to(run)).write_bytes(file.read_bytes())
    return target


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """`refused("train", ...)`: the message; the command must end with 2 and leave `tmp_path` as it was."""

    def check(*arguments: object) -> str:
        before = tree(tmp_path)
        capsys.readouterr()
        assert command(*arguments) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("lorafold: ") == 1
        assert tree(tmp_path) == before
        return captured.err.partition("lorafold: ")[2]

    return check


@pytest.fixture
def train(
    refused: Callable[..., str], tiny_file: Callable[..., Path], data: Path, tmp_path: Path
) -> Callable[..., str]:
    """`train("--r", 0)`: the message of a training run that is refused."""

    def check(*options: object, model: object = None, rows: object = data) -> str:
        model = model or tiny_file("llama", "Q4_1")
        output = [] if "--output-dir" in options else ["--output-dir", tmp_path / "run"]
        return refused("train", model, "--data", rows, *output, *quick(*options))

    return check
