"""`lorafold quantize --loftq-r`: base and start lie side by side, PEFT reads both, training begins from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto import AutoModelForCausalLM

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import base_weight
from lorafold.adapters.targets import linear_layers
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import load
from lorafold.quant import calibrate
from lorafold.runs import quantize as runs_quantize
from tests.cli.conftest import quick
from tests.practice import command, tiny_folder_of
from tests.tiny import tiny_gguf, tiny_ids, tiny_model

FORMATS: dict[str, tuple[object, ...]] = {
    "int8": ("--format", "int8"),
    "mlx": ("--bits", 2, "--embedding-bits", 16),
    "mlx rtn": ("--bits", 3, "--method", "rtn", "--embedding-bits", 16),
    "gguf": ("--bits", 4, "--embedding-bits", 16),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama as a folder and as a GGUF file."""
    folder = tmp_path_factory.mktemp("loftq")
    return tiny_folder_of(folder / "source", "llama"), tiny_gguf(folder, "llama", "F16")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose rows divide into the blocks of 64 that NF4 has."""
    folder = tiny_folder_of(tmp_path_factory.mktemp("wide") / "source", "llama")
    tiny_model("llama", "F32", wide=True).save_pretrained(folder)
    return folder


def distances(source: Path, base: Path, start: Path | None) -> list[float]:
    """Of each layer of the blocks, |W - Q - s B A| / |W|."""
    dense, loaded = linear_layers(load(source).model), load(base)
    if start is not None:
        load_adapter(loaded, start)
    found = []
    updates = {path: layer.adapter.delta() for path, layer in adapted_layers(loaded.model)}  # type: ignore[union-attr]
    for name, layer in linear_layers(loaded.model).items():
        if name != "lm_head":
            wanted = base_weight(dense[name])
            found.append(float((wanted - base_weight(layer) - updates.get(name, 0)).norm() / wanted.norm()))
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_base_and_start_are_nearer_than_the_base_alone(
    kind: str, sources: tuple[Path, Path], tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Layer by layer nearer than what plain quantization gives, and in its logits; a run begins with that."""
    source = sources[kind == "gguf"]
    plain, out = (tmp_path / f"{name}{'.gguf' * (kind == 'gguf')}" for name in ("plain", "out"))
    assert command("quantize", source, "-o", plain, *FORMATS[kind]) == 0
    capsys.readouterr()
    assert command("quantize", source, "-o", out, *FORMATS[kind], "--loftq-r", 8, "--loftq-steps", 2) == 0
    start = tmp_path / "out-loftq"
    said = capsys.readouterr().out
    assert f"with the adapter {start} by" in said
    assert f"train {out} --from-adapter {start} --data" in said
    errors = [distances(source, *pair) for pair in ((plain, None), (out, start))]
    assert all(after < 0.9 * before for before, after in zip(*errors, strict=True))
    logits = [load(path).model(tiny_ids(40)).logits for path in (source, plain)]
    trained = load(out)
    load_adapter(trained, start)
    logits.append(trained.model(tiny_ids(40)).logits)
    assert (logits[2] - logits[0]).norm() < 0.95 * (logits[1] - logits[0]).norm()
    run = tmp_path / "run"
    options = quick("--max-steps", 2, "--sample-rows", 0)
    assert command("train", out, "--data", data, "--from-adapter", start, *options, "--output-dir", run) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["trainable_parameters"] == sum(8 * sum(x.weight.shape) for x in blocks(sources[0]))


def blocks(source: Path) -> list[nn.Linear]:
    layers: Any = [x for name, x in linear_layers(load(source).model).items() if name != "lm_head"]
    return layers


def test_peft_reads_the_start_on_the_same_base(wide: Path, tmp_path: Path) -> None:
    """On the folder that transformers and bitsandbytes load: its weights and PEFT's update are near the dense ones."""
    peft, bnb = pytest.importorskip("peft"), pytest.importorskip("bitsandbytes")
    out = tmp_path / "out"
    assert command("quantize", wide, "-o", out, "--format", "nf4", "--loftq-r", 8, "--loftq-steps", 2) == 0
    base = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, tmp_path / "out-loftq").eval()
    dense = AutoModelForCausalLM.from_pretrained(wide)
    theirs = []
    for name, layer in dense.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            tuned, wanted = model.base_model.model.get_submodule(name), layer.weight.detach()
            weight = tuned.base_layer.weight
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            together = decoded + tuned.get_delta_weight("default").detach()
            theirs.append(float((wanted - together).norm() / wanted.norm()))
    # what a table of float32 decodes to is rounded to bfloat16 by some versions: 3 digits of an error of a tenth
    assert theirs == pytest.approx(distances(wide, out, tmp_path / "out-loftq"), rel=5e-3)
    with torch.no_grad():
        errors = [(m(tiny_ids(40)).logits - dense(tiny_ids(40)).logits).norm() for m in (model, load(out).model)]
    assert errors[0] < errors[1]


def test_it_goes_on_where_it_stopped(
    sources: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("quantize", sources[0], "--bits", 2, "--method", "rtn", "--loftq-r", 4, "--loftq-steps", 2)
    assert command(*arguments, "-o", tmp_path / "whole") == 0
    calls: list[object] = []

    def stop_in_the_second_block(*args: Any) -> object:
        calls.append(args)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return calibrate.quantize(*args)

    monkeypatch.setattr(runs_quantize, "quantize", stop_in_the_second_block)
    assert command(*arguments, "-o", tmp_path / "out") == 130
    assert command(*arguments[:-2], "-o", tmp_path / "out") == 2
    assert "blocks of another quantization" in capsys.readouterr().err
    assert command(*arguments, "-o", tmp_path / "out") == 0
    assert len(calls) == 20 + 2 * 14 + 1  # two of three blocks, twice each layer, and the embedding
    for name in ("", "-loftq"):
        (whole,), (out,) = (list((tmp_path / f"{path}{name}").glob("*.safetensors")) for path in ("whole", "out"))
        ours, theirs = load_file(out), load_file(whole)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, ours[key]) for key, value in theirs.items())
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--loftq-r", 4, "--method", "gptq"), "gptq moves them away from that"),
        (("--loftq-r", 4, "--data"), "data is for calibration, which loftq_r does not need"),
        (("--loftq-r", 0, "--loftq-steps", 0), "loftq_steps is 0; it must be positive"),
        (("--loftq-steps", 3), "give its rank as well, loftq_r"),
        (("--loftq-r", 500), "has a rank of 32"),
    ],
)
def test_refusals(
    options: tuple[object, ...],
    said: str,
    sources: tuple[Path, Path],
    refused: Callable[..., str],
    data: Path,
    tmp_path: Path,
) -> None:
    more = (data,) if "--data" in options else ()
    assert said in refused("quantize", sources[0], "-o", tmp_path / "out", *options, *more)


def test_a_start_that_is_there_is_not_overwritten(
    sources: tuple[Path, Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "out-loftq").mkdir()
    assert "out-loftq exists already" in refused("quantize", sources[0], "-o", tmp_path / "out", "--loftq-r", 4)
