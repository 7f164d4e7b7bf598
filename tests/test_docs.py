"""The documents say what is there, and README's commands run."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

import lorafold.models.load
from lorafold.cli.main import run
from lorafold.config import AdapterSpec, DataConfig, QuantizeConfig, RowsConfig, TaskConfig, TrainingConfig
from lorafold.data.demo import demo_file
from tests.tiny_classifier import labelled_rows, pair_rows, tagged_rows, tiny_bert, write_rows

ROOT = Path(__file__).parent.parent


def bash_commands(path: Path) -> list[str]:
    """Lines of the bash blocks of a document."""
    blocks = re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_korean_readme_has_the_same_commands_and_figures() -> None:
    english, korean = ROOT / "README.md", ROOT / "README.ko.md"
    assert bash_commands(english) == bash_commands(korean)
    numbers = [re.findall(r"\d+\.\d+", path.read_text(encoding="utf-8")) for path in (english, korean)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def write_task_rows(folder: Path) -> None:
    """The encoder and the rows of the tasks beside language modelling."""
    tiny_bert(folder / "minilm")
    for name, count in (("reviews.csv", 24), ("more.csv", 8)):
        reviews = [{"title": r["title"], "body": r["text"], "stars": r["label"]} for r in labelled_rows(count)]
        write_rows(folder / name, reviews)
    write_rows(folder / "news.jsonl", tagged_rows(24))
    write_rows(folder / "faq.jsonl", [{"question": r["anchor"], "answer": r["positive"]} for r in pair_rows(24)])


def test_readme_commands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of README, in its order, on a tiny model in the place of the embedded one and for a few steps.

    Only what a tiny random model cannot do is changed: training stops after 2 steps, and the comparison in llama.cpp,
    whose bounds are for models that predict something, is left to the tests of `verify`.
    """
    model = tiny_file("llama", "Q4_1")
    monkeypatch.setattr(lorafold.models.load, "_embedded", lambda: model)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = demo_file("held_out").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "products.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    write_task_rows(tmp_path)
    extra = {
        "train": ["--max-steps", "2", "--sample-tokens", "4", "--dtype", "float32", "--learning-rate", "0.01"],
        "verify": ["--no-runtime"],
        "generate": ["--max-new-tokens", "4"],
    }
    commands = bash_commands(ROOT / "README.md")
    assert {shlex.split(c)[1] for c in commands} >= {"train", "fold", "verify", "export", "generate", "eval", "preview"}
    for command in commands:
        program, name, *rest = shlex.split(command)
        assert program == "lorafold"
        assert run([name, *rest, *extra.get(name, [])]) == 0, f"{command}\n{capsys.readouterr().err}"
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "tuned.gguf").stat().st_size == model.stat().st_size


def test_readme_python(capsys: pytest.CaptureFixture[str]) -> None:
    """The Python of both READMEs runs, and is the same but for comments."""
    codes = []
    for name in ("README.md", "README.ko.md"):
        (code,) = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), re.DOTALL)
        exec(compile(code, name, "exec"), {})
        codes.append([line.partition("#")[0].rstrip() for line in code.splitlines()])
        assert "torch.Size([3, 10])" in capsys.readouterr().out
    assert codes[0] == codes[1]


def test_the_file_map_is_complete() -> None:
    """Every module has its line in docs/architecture.md, and every line its module."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\* `([\w/]+\.py)`", text, re.MULTILINE))
    there = {
        str(p.relative_to(ROOT / "lorafold")) for p in (ROOT / "lorafold").rglob("*.py") if p.name != "__init__.py"
    }
    assert listed == there


def test_make_has_the_two_commands() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo: setup\n\t.*lorafold demo", text, re.MULTILINE)
    assert re.search(r"^test: setup\n(\t.*\n)*\t.*pytest", text, re.MULTILINE)


@pytest.mark.parametrize("group", [DataConfig, RowsConfig, TaskConfig, AdapterSpec, TrainingConfig, QuantizeConfig])
def test_every_option_is_explained(group: type) -> None:
    """Each has a line of its own in its docstring, where --help finds it."""
    explained = set(re.findall(r"^\s+(\w+): ", inspect.getdoc(group) or "", re.MULTILINE))
    inherited = {name for base in group.__mro__[1:-1] for name in re.findall(r"(\w+): ", inspect.getdoc(base) or "")}
    assert {f.name for f in dataclasses.fields(group)} <= explained | inherited
