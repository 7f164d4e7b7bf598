"""A mistake ends with exit code 2 and one message that names the faults and the way out, and nothing is written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafold.evals import llama_cpp
from lorafold.evals.loss import pack_loss
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import load
from tests.practice import command, tiny_folder
from tests.tiny import tiny_gguf

Output = pytest.CaptureFixture[str]
Trained = Callable[..., tuple[Path, Path]]
QUICK = ("--max-steps", 2, "--learning-rate", 0.01, "--eval-fraction", 0.3, "--sample-rows", 0)


def refused(capsys: Output, *arguments: object) -> str:
    """The message of a command that must be refused."""
    capsys.readouterr()
    assert command(*arguments) == 2
    streams = capsys.readouterr()
    assert "Traceback" not in streams.err
    assert streams.err.count("lorafold: ") == 1
    return streams.err[streams.err.index("lorafold: ") :]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    return tiny_gguf(folder, "llama", "Q4_1")


@pytest.fixture
def train(model: Path, data: Path, tmp_path: Path, capsys: Output) -> Callable[..., str]:
    """`train(options...)` must be refused and leave no run folder; returns the message. `data=` and `model=` differ."""
    default_model, default_data = model, data

    def attempt(*options: object, model: Path | str = default_model, data: Path = default_data) -> str:
        out = tmp_path / "run"
        message = refused(capsys, "train", model, "--data", data, "--output-dir", out, *QUICK, *options)
        assert not out.exists()
        return message

    return attempt


# models


def test_no_such_model(train: Callable[..., str]) -> None:
    assert "no model at nowhere.gguf" in train(model="nowhere.gguf")


def test_truncated_model(train: Callable[..., str], model: Path) -> None:
    model.write_bytes(model.read_bytes()[:-100])
    message = train()
    assert "damaged or truncated" in message
    assert str(model) in message


# targets and methods


def test_target_that_matches_nothing_lists_what_could_be_matched(train: Callable[..., str]) -> None:
    message = train("--target-modules", "q_porj", "w99")
    assert "'q_porj' matches no layer (did you mean 'q_proj'?)" in message
    assert "'w99' matches no layer" in message
    assert "down_proj (3)" in message
    assert "lm_head (1)" in message


@pytest.mark.parametrize("types", ["Q8_0", "F16"])
def test_targets_without_offsets_are_refused_with_the_alternatives(
    train: Callable[..., str], tmp_path: Path, types: str
) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    message = train(model=tiny_gguf(folder, "llama", types))
    for part in ("store none", "--exclude-modules", "--method lora", "Q4_0, Q4_1, Q5_0, Q5_1"):
        assert part in message


def test_qa_lora_on_a_dense_folder(train: Callable[..., str], tmp_path: Path) -> None:
    assert "--method lora" in train(model=tiny_folder(tmp_path / "folder"))


def test_full_rank_lora(train: Callable[..., str]) -> None:
    assert "--method qa-lora" in train("--method", "lora", "--r", "full")


# options


def test_unknown_option_names_the_nearest(train: Callable[..., str]) -> None:
    assert "--learning-rate" in train("--learning-rat", "0.1")


def test_unknown_command_names_the_nearest(capsys: Output) -> None:
    assert "train" in refused(capsys, "trian", "model")


def test_wrong_values_are_named_together(train: Callable[..., str]) -> None:
    message = train("--per-device-train-batch-size", 0, "--warmup-ratio", 2, "--max-grad-norm", "-1")
    for name in ("per_device_train_batch_size", "warmup_ratio", "max_grad_norm"):
        assert name in message


def test_configuration_with_unknown_keys(train: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("learning_rte: 0.1\nlora_alpa: 4\nr: 4\n")
    message = train("--config", path)
    assert "'learning_rte' (did you mean 'learning_rate'?)" in message
    assert "'lora_alpa' (did you mean 'lora_alpha'?)" in message


@pytest.mark.parametrize(("text", "part"), [("- 1\n- 2\n", "map option names"), ("a: [1", "not YAML")])
def test_configuration_that_is_none(train: Callable[..., str], tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "options.yaml").write_text(text)
    assert part in train("--config", tmp_path / "options.yaml")
    assert "cannot read the configuration" in train("--config", tmp_path / "absent.yaml")


def test_the_command_line_wins_over_the_configuration(model: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text(
        f"model: {model}\ndata: {data}\nr: 2\nseed: 7\nmax_steps: 1\nsample_rows: 0\n"
    )
    out = tmp_path / "run"
    assert command("train", "--config", tmp_path / "options.yaml", "--output-dir", out, "--r", 3) == 0
    config = (out / "config.yaml").read_text()
    assert "\nr: 3\n" in config
    assert "\nseed: 7\n" in config


# data


def test_missing_data(train: Callable[..., str], tmp_path: Path) -> None:
    assert "no such file" in train(data=tmp_path / "absent.jsonl")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b'{"prompt": "\xff", "completion": "x"}\n', "UTF-8"),
        (b'{"question": "a", "answer": "b"}\n' * 9, "--prompt"),
        (b'{"prompt": "a"\n', "line 1"),
    ],
)
def test_unusable_data(train: Callable[..., str], tmp_path: Path, content: bytes, part: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    assert part in train(data=path)


def test_no_supervised_token(train: Callable[..., str]) -> None:
    assert "--max-length" in train("--max-length", 2)


# outputs


def test_run_folder_that_exists(model: Path, data: Path, tmp_path: Path, capsys: Output) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "mine").write_text("keep")
    message = refused(capsys, "train", model, "--data", data, "--output-dir", out, *QUICK)
    assert "exists already" in message
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_fold_into_a_file_that_exists(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained()
    out = tmp_path / "out.gguf"
    out.write_text("keep")
    assert "--overwrite" in refused(capsys, "fold", run, "-o", out)
    assert out.read_text() == "keep"
    assert command("fold", run, "-o", out, "--overwrite") == 0


def test_fold_into_a_folder_without_permission(
    trained: Trained, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = trained()
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # tests may run as root, who may write everywhere
    assert "no permission" in refused(capsys, "fold", run, "-o", tmp_path / "out.gguf")


@pytest.mark.parametrize("kind", ["same type", "promoted"])
def test_disk_full_while_folding_leaves_nothing(
    trained: Trained, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    _, run = trained("llama", "Q4_1" if kind == "same type" else "Q4_0")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lorafold.models.gguf_write.shutil.copyfile", full)
    monkeypatch.setattr("lorafold.models.gguf_write._pad", full)
    folder = tmp_path / "out"
    folder.mkdir()
    message = refused(capsys, "fold", run, "-o", folder / "out.gguf")
    assert "the disk is full" in message
    assert list(folder.iterdir()) == []


# adapters


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> tuple[Path, Path]:
    """A model and its run folder that may be changed."""
    model, run = trained()
    return model, Path(shutil.copytree(run, tmp_path / "copied"))


def change(run: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def test_adapter_for_another_base(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    _, run = trained()
    (tmp_path / "other").mkdir()
    other = tiny_gguf(tmp_path / "other", "llama", "Q4_1", seed=1)
    message = refused(capsys, "generate", other, "--adapter", run, "--prompt", "a")
    assert "other base weights" in message


def test_all_faults_of_an_adapter_are_named_and_the_model_is_left_alone(
    copied: tuple[Path, Path], capsys: Output
) -> None:
    model, run = copied
    prefix = "base_model.model.model.layers"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{prefix}.0.self_attn.q_proj.lora_A.weight"]
        tensors[f"{prefix}.1.mlp.up_proj.lora_B.weight"] = torch.zeros(3, 3)
        tensors[f"{prefix}.9.mlp.up_proj.lora_B.weight"] = torch.zeros(3, 3)
        tensors[f"{prefix}.2.mlp.up_proj.lora_B.weight"][0, 0] = float("nan")

    change(run, spoil)
    message = refused(capsys, "generate", model, "--adapter", run, "--prompt", "a")
    for part in (
        "missing tensor model.layers.0.self_attn.q_proj.lora_A",
        "has shape [3, 3]",
        "unexpected",
        "not finite",
    ):
        assert part in message


def test_not_a_run_folder(tmp_path: Path, capsys: Output) -> None:
    assert "no run folder" in refused(capsys, "fold", tmp_path / "absent", "-o", tmp_path / "x.gguf")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "fold", tmp_path / "empty", "-o", tmp_path / "x.gguf")
    assert "config.yaml is missing" in message
    assert "adapter is missing" in message


def test_a_run_whose_base_has_gone(copied: tuple[Path, Path], tmp_path: Path, capsys: Output) -> None:
    _, run = copied
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("model: ", "model: /gone", 1))
    assert "no model at /gone" in refused(capsys, "fold", run, "-o", tmp_path / "x.gguf")


# training


def test_a_loss_that_is_not_finite_keeps_the_last_good_adapter(
    model: Path, data: Path, tmp_path: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(1000))

    def poisoned(*arguments: object) -> torch.Tensor:
        loss = pack_loss(*arguments)  # type: ignore[arg-type]
        return loss if next(steps) < 2 else loss * float("nan")

    monkeypatch.setattr("lorafold.train.loop.pack_loss", poisoned)
    out = tmp_path / "run"
    message = refused(capsys, "train", model, "--data", data, "--output-dir", out, *QUICK[2:], "--max-steps", 9)
    assert "step 3" in message
    assert "of the data" in message
    assert "learning_rate" in message
    loaded = load(model)
    load_adapter(loaded, out / "adapter")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert not (out / "summary.json").exists()


def test_a_missing_extra_is_named(trained: Trained, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained()
    llama_cpp._library.cache_clear()
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    message = refused(capsys, "generate", model, "--prompt", "a", "--runtime", "llama.cpp")
    assert "pip install 'lorafold[llama-cpp]'" in message


def test_fold_over_its_own_base(copied: tuple[Path, Path], capsys: Output) -> None:
    """Even with --overwrite: a run without its base is lost."""
    model, run = copied
    before = model.read_bytes()
    assert "choose another output" in refused(capsys, "fold", run, "-o", model, "--overwrite")
    assert model.read_bytes() == before
