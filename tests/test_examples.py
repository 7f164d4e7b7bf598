"""The worked examples run: an adapter learns what the model could not do, and off it is the model as it was."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = {  # script -> (what the model knows, what it is taught, the adapter off), as the script calls them
    "digits_vit": ("digits", "mirrored", "digits, adapter off"),
    "tones_wav2vec2": ("sine tones", "sawtooth", "sine, adapter off"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.main()
    known, taught, off = EXAMPLES[name]
    assert found[known] > 0.8  # 0.88 to 0.96, by processor and threads
    assert found[f"{taught}, before"] < 0.4
    assert found[f"{taught}, adapted"] > 0.8
    assert found[off] == found[known]
    assert found[f"{taught}, merged"] == pytest.approx(found[f"{taught}, adapted"], abs=0.003)
    assert "parameters trained" in capsys.readouterr().out


def test_every_example_is_run() -> None:
    assert {path.stem for path in (Path(__file__).parent.parent / "examples").glob("*.py")} == set(EXAMPLES)
