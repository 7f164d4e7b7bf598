"""Run folders and adapters that are damaged, incomplete or of another base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafold.errors import AdapterError
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import load
from tests.practice import command, layer_count, same_logits
from tests.tiny import tiny_gguf

Output = pytest.CaptureFixture[str]
Trained = Callable[..., tuple[Path, Path]]
Refused = Callable[..., str]


def test_what_holds_no_adapter(refused: Refused, trained: Trained, tmp_path: Path, data: Path) -> None:
    model, run = trained()
    assert "no run folder" in refused("export", tmp_path / "none", "--to", "peft", "-o", tmp_path / "out")
    assert "not a finished run folder" in refused("verify", model, "--run", tmp_path)
    message = refused("eval", model, "--adapter", tmp_path, tmp_path / "b", run, "--data", data)
    assert f"neither an adapter folder nor a run folder: {tmp_path}, {tmp_path / 'b'}" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "damaged"),
        ("- 1", "damaged"),
        ("model: [", "damaged"),
        ("model: a\n", "output_dir is missing"),
        ("model: a\noutput_dir: b\ndata: c\nr: x\n", "r is 'x'"),
        ("model: a\noutput_dir: b\ndata: c\nr: 8\nlearning_rate: [1]\n", "damaged"),
        ("model: a\noutput_dir: b\ndata: 5\n", "damaged"),
    ],
)
def test_damaged_run_folder(refused: Refused, trained: Trained, tmp_path: Path, content: str, expected: str) -> None:
    _, run = trained()
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(content)
    assert expected in refused("fold", tmp_path / "run", "-o", tmp_path / "out")


def test_base_is_known_by_its_weights_not_its_name(refused: Refused, trained: Trained, tmp_path: Path) -> None:
    model, run = trained()
    shutil.copytree(run, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())

    def base(path: Path) -> None:
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config | {"model": str(path)}))

    base(tiny_gguf(tmp_path, "llama", "Q4_1", seed=1))
    assert "trained on other base weights" in refused("fold", tmp_path / "run", "-o", tmp_path / "out")
    copy = tmp_path / "copy.gguf"
    shutil.copyfile(model, copy)
    base(copy)
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out") == 0


@pytest.fixture
def adapter(trained: Trained, tmp_path: Path) -> Path:
    """An adapter folder that may be spoiled."""
    _, run = trained()
    return Path(shutil.copytree(run / "adapter", tmp_path / "adapter"))


def test_an_adapter_that_does_not_fit_leaves_the_model_alone(trained: Trained, adapter: Path) -> None:
    model, _ = trained()
    weights = adapter / "adapter_model.safetensors"
    state = load_file(weights)
    state["base_model.model.model.layers.2.mlp.up_proj.lora_B.weight"] = torch.zeros(7, 8)
    save_file(state, weights)
    loaded = load(model)
    with pytest.raises(AdapterError, match=r"shape \[7, 8\], the base needs \[96, 8\]"):
        load_adapter(loaded, adapter)
    assert layer_count(loaded) == 0
    same_logits(loaded.model, load(model).model, atol=0.0)


def test_adapter_that_lacks_a_whole_layer(refused: Refused, trained: Trained, data: Path, adapter: Path) -> None:
    """Nothing of layer 1's q_proj is there, while q_proj is a target and other layers have theirs."""
    model, _ = trained()
    weights = adapter / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(weights).items() if "1.self_attn.q_proj" not in k}, weights)
    assert "model.layers.1.self_attn.q_proj" in refused("eval", model, "--adapter", adapter, "--data", data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOKR"),
        ("peft_type", ["LORA"]),
        ("peft_type", None),
        ("r", "x"),
        ("r", 2.5),
        ("r", 8.0),
        ("r", -1),
        ("r", None),
        ("lora_alpha", None),
        ("lora_alpha", "x"),
        ("use_dora", "yes"),
        ("rank_pattern", {"q_proj": "x"}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", ["q_proj"]),
        ("alpha_pattern", {"q_proj": "x"}),
        ("target_modules", 7),
        ("target_modules", "("),
    ],
)
def test_adapter_config_that_makes_no_sense(
    refused: Refused, trained: Trained, data: Path, adapter: Path, key: str, value: object
) -> None:
    model, _ = trained()
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    assert str(adapter) in refused("eval", model, "--adapter", adapter, "--data", data)


def test_adapter_with_another_pooling_divisor(refused: Refused, trained: Trained, data: Path, adapter: Path) -> None:
    model, _ = trained()
    weights = adapter / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        header = file.metadata()
    save_file(load_file(weights), weights, header | {"pooling_divisor": "group_size"})
    message = refused("eval", model, "--adapter", adapter, "--data", data)
    assert "pooling divisor is group_size, here it is sqrt(group_size)" in message


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_adapter_files_that_are_damaged(
    refused: Refused, trained: Trained, data: Path, adapter: Path, name: str, content: bytes
) -> None:
    model, _ = trained()
    (adapter / name).write_bytes(content)
    assert name in refused("eval", model, "--adapter", adapter, "--data", data)
