"""Folders of bitsandbytes: made here and read by transformers, made there and read here, trained on and merged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lorafold.adapters.targets import linear_layers
from lorafold.errors import FormatError
from lorafold.models.load import load
from lorafold.quant.linear import QuantLinear
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command, same_logits, tiny_folder_of
from tests.tiny import tiny_config, tiny_gguf, tiny_ids, tiny_model

bitsandbytes = pytest.importorskip("bitsandbytes")

FORMATS: dict[str, tuple[object, ...]] = {
    "nf4": ("--format", "nf4"),
    "nf4 plain": ("--format", "nf4", "--no-use-double-quant"),
    "int8": ("--format", "int8"),
}
formats = pytest.mark.parametrize("kind", FORMATS)
Output = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose rows divide into blocks of 64."""
    folder = tmp_path_factory.mktemp("bnb") / "source"
    tiny_folder_of(folder, "llama")
    tiny_model("llama", "F32", wide=True).save_pretrained(folder)
    return folder


def _loaded_by_transformers(path: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def _same_model(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    """The same weights exactly. Logits nearly: bitsandbytes multiplies in 16 bits, or rounds activations to 8."""
    layers = {name: layer for name, layer in linear_layers(ours).items() if isinstance(layer, QuantLinear)}
    assert len(layers) == 7 * 3
    for name, layer in layers.items():
        weight = theirs.get_submodule(name).weight
        if layer.codec == "INT8":
            decoded = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)  # type: ignore[union-attr]
        else:
            decoded = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[union-attr]
        assert torch.equal(layer.packed.decode(decoded.dtype), decoded.view(layer.shape))
    with torch.no_grad():
        a, b = ours(tiny_ids(40)).logits, theirs(tiny_ids(40)).logits.float()
    assert (a - b).norm() < 0.1 * a.norm()


@formats
def test_made_here_and_read_by_transformers(kind: str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert command("quantize", source, "-o", out, *FORMATS[kind]) == 0
    _same_model(load(out).model, _loaded_by_transformers(out))


@formats
def test_made_by_transformers_and_read_here(kind: str, source: Path, tmp_path: Path) -> None:
    options = {"load_in_8bit": True} if kind == "int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    config = BitsAndBytesConfig(**options, bnb_4bit_use_double_quant=kind == "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "out")
    for file in source.glob("token*"):
        (tmp_path / "out" / file.name).write_bytes(file.read_bytes())
    _same_model(load(tmp_path / "out").model, theirs.eval())


@formats
def test_trained_and_merged(kind: str, source: Path, tmp_path: Path, data: Path, capsys: Output) -> None:
    """Into 16 bits nearly everything is kept; back into the same bits only with --lossy, and the loss is said."""
    base, run = tmp_path / "base", tmp_path / "run"
    assert command("quantize", source, "-o", base, *FORMATS[kind]) == 0
    assert command("train", base, "--data", data, "--output-dir", run, *quick("--method", "lora")) == 0
    assert command("fold", run, "-o", tmp_path / "merged", "--to", "f32") == 0
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    trained = load_trained(read_run(run)).model
    same_logits(load(tmp_path / "merged").model, trained, atol=1e-4)
    same_logits(_loaded_by_transformers(tmp_path / "merged"), trained, atol=1e-4)
    again = kind.split()[0]
    capsys.readouterr()
    refused = command("fold", run, "-o", tmp_path / "again", "--to", again) == 2
    assert refused == (again == "nf4")  # the steps of 8 bits are far smaller than this adapter's update
    if refused:
        assert "--lossy" in capsys.readouterr().err
        assert command("fold", run, "-o", tmp_path / "again", "--to", again, "--lossy") == 0
        assert "gain" in capsys.readouterr().out
    assert load(tmp_path / "again").bnb is not None


def test_layers_without_an_adapter_are_written_as_they_were_computed_with(
    source: Path, tmp_path: Path, data: Path
) -> None:
    base, run, merged = tmp_path / "base", tmp_path / "run", tmp_path / "merged"
    assert command("quantize", source, "-o", base, "--format", "nf4") == 0
    options = quick("--method", "lora", "--target-modules", "q_proj")
    assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
    assert command("fold", run, "-o", merged, "--to", "f32") == 0
    same_logits(load(merged).model, load_trained(read_run(run)).model, atol=1e-4)


def test_from_a_gguf_file_with_biases(tmp_path: Path) -> None:
    file = tiny_gguf(tmp_path, "qwen2", "F16", wide=True)
    assert command("quantize", file, "-o", tmp_path / "out", "--format", "int8", "--stored", "float16") == 0
    ours, theirs = (load(path).model(tiny_ids(40)).logits.detach() for path in (tmp_path / "out", file))
    assert (ours - theirs).norm() < 0.06 * theirs.norm()
    packed = load(tmp_path / "out").model.get_submodule("model.layers.0.self_attn.q_proj")
    assert packed.bias.abs().sum() > 0  # type: ignore[operator, union-attr]


def test_refusals(source: Path, tmp_path: Path, capsys: Output) -> None:
    narrow = tiny_folder_of(tmp_path / "narrow", "llama")
    assert tiny_config("llama").intermediate_size % 64
    assert command("quantize", narrow, "-o", tmp_path / "out", "--format", "nf4") == 2
    assert "groups of 64" in capsys.readouterr().err
    assert command("quantize", source, "-o", tmp_path / "out.gguf", "--format", "nf4") == 2
    assert "name a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_would_be_ignored_are_refused(source: Path, tmp_path: Path, data: Path, capsys: Output) -> None:
    options = ("--format", "nf4", "--bits", 3, "--method", "gptq")
    assert command("quantize", source, "-o", tmp_path / "out", *options) == 2
    message = capsys.readouterr().err
    assert "bits means nothing" in message
    assert "method means nothing" in message
    assert command("quantize", source, "-o", tmp_path / "out", "--format", "nf4", "--data", data) == 2
    assert "leave it out" in capsys.readouterr().err


def test_one_format_in_a_folder(source: Path, tmp_path: Path, data: Path) -> None:
    """Quantized again into the other format, layers without an adapter go with it."""
    base, run, out = tmp_path / "base", tmp_path / "run", tmp_path / "out"
    assert command("quantize", source, "-o", base, "--format", "nf4") == 0
    options = quick("--method", "lora", "--target-modules", "q_proj")
    assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
    assert command("fold", run, "-o", out, "--to", "int8", "--lossy") == 0
    codecs = {x.codec for x in linear_layers(load(out).model).values() if isinstance(x, QuantLinear)}
    assert codecs == {"INT8"}
    _same_model(load(out).model, _loaded_by_transformers(out))


def test_a_gguf_file_takes_none_of_them(tmp_path: Path, data: Path, capsys: Output) -> None:
    file, run = tiny_gguf(tmp_path, "llama", "Q4_1"), tmp_path / "run"
    assert command("train", file, "--data", data, "--output-dir", run, *quick("--method", "lora")) == 0
    assert command("fold", run, "-o", tmp_path / "out.gguf", "--to", "nf4", "--lossy") == 2
    assert "a GGUF file holds no nf4" in capsys.readouterr().err


def _half_magnitudes(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.SCB"] = tensors["model.layers.1.self_attn.k_proj.SCB"].half()


def _permuted(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.self_attn.k_proj.weight_format"] = torch.tensor(2, dtype=torch.uint8)


@pytest.mark.parametrize(("damage", "message"), [(_half_magnitudes, "its SCB is F16"), (_permuted, "permuted")])
def test_8_bit_layers_that_would_be_misread(
    damage: Callable[[dict[str, torch.Tensor]], None], message: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command("quantize", source, "-o", out, "--format", "int8") == 0
    tensors = load_file(out / "model.safetensors")
    damage(tensors)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(FormatError, match=message):
        load(out)


def _drop_magnitudes(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[f"{name}.absmax"]


def _other_table(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.quant_map"] = tensors[f"{name}.quant_map"] * 2


def _short(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-2].clone()


def _no_json(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor([1, 2], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_magnitudes, "it lacks"),
        (_other_table, "table of values"),
        (_short, "do not have the size"),
        (_no_json, "state is damaged"),
    ],
)
def test_damaged_layers_are_named(
    damage: Callable[[dict[str, torch.Tensor], str], None], message: str, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert command("quantize", source, "-o", out, "--format", "nf4") == 0
    tensors = load_file(out / "model.safetensors")
    damage(tensors, "model.layers.1.self_attn.k_proj.weight")
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(FormatError, match=message) as error:
        load(out)
    assert "model.layers.1.self_attn.k_proj" in str(error.value)
