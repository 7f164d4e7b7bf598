"""Run folders are written line by line, read back whole, and say what they lack."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorafold.config import (
    DEFAULT_LEARNING_RATE,
    AdapterSpec,
    DataConfig,
    RunConfig,
    TaskConfig,
    TrainingConfig,
    option_names,
)
from lorafold.errors import ConfigError
from lorafold.files import OutputError
from lorafold.runs.folder import RunFolder, read_run
from lorafold.runs.gain import Gain
from lorafold.runs.report import Report, Table, write_report

TRAINING = TrainingConfig(
    2, 3, 0.5, 16.0, 1.5, 9, 0.1, "cosine", 0.2, 0.3, 4, 5, 6, True, 99, "2GB", 30, True, "float32", "cpu", 8, 1, 2
)
CONFIG = RunConfig(
    "model.gguf",
    Path("out"),
    DataConfig(Path("rows.jsonl"), "{a} – ü", "{b}", "plain", 77, "all", 5, Path("held.jsonl"), 0.2, 6),
    AdapterSpec(
        *("lora", 3, 7.0, 0.1, ("q_proj", "v_proj"), ("x",), (0, 2), ("experts",), True, True, "gaussian"),
        rank_pattern={"q_proj": 2},
        alpha_pattern={r"layers\.1\..*": 0.5},
        bias="all",
        modules_to_save=("head",),
        ensure_weight_tying=True,
    ),
    replace(TRAINING, optim="muon"),
    TaskConfig("classification", "{title}", "stars", label_names=("good", "bad")),
    Path("/adapters/start"),
)
MOVES = replace(  # what does not go with the rest above
    CONFIG, adapter=AdapterSpec("lora", 8, target_r=4, tinit=1, tfinal=2, delta_t=3, beta1=0.7, beta2=0.8)
)
SUMMARY: dict[str, Any] = {
    "eval_loss_before": 2.0,
    "eval_loss_after": 1.0,
    "trainable_parameters": 12345,
    "samples_per_second": 1.25,
    "tokens_per_second": 250.0,
    "peak_memory_bytes": 3_210_000_000,
    "wall_seconds": 125.0,
    "train_rows": 10,
    "steps": 5,
    "rows_per_step": 2,
    "base_weights_sha256": "b" * 64,
    "data_sha256": "d" * 64,
}


def finished(path: Path, config: RunConfig = CONFIG) -> RunFolder:
    folder = RunFolder(path)
    folder.config(config)
    (path / "adapter").mkdir()
    return folder


def test_the_example_sets_every_option() -> None:
    """So that the round trip below covers new options as well."""
    plain = RunConfig("other", Path("other"), DataConfig(Path("other")))
    default, moves = plain.to_dict(), MOVES.to_dict()
    same = [key for key, value in CONFIG.to_dict().items() if value == default[key] == moves[key]]
    other_tasks = ["words_column", "tags_column", "anchor", "positive", "negative", "scale"]
    assert same == [*other_tasks, "adapt", "k_quants", "d_initial", "layers"]  # of other methods than lora
    assert set(CONFIG.to_dict()) == set(option_names())


def test_configuration_comes_back_as_it_was(tmp_path: Path) -> None:
    finished(tmp_path / "run").close()
    assert read_run(tmp_path / "run").config == CONFIG
    finished(tmp_path / "moves", MOVES).close()
    assert read_run(tmp_path / "moves").config == MOVES
    names = ("O", "B-PER", "I-PER")
    for number, task in enumerate(
        (
            TaskConfig("token-classification", words_column="w", tags_column="t", label_names=names),
            TaskConfig("embedding", anchor="{q}", positive="{a}", negative="{no}", scale=5.0),
        )
    ):
        finished(tmp_path / str(number), replace(CONFIG, task=task)).close()
        assert read_run(tmp_path / str(number)).config.task == task
    default = RunConfig("m", Path("o"), DataConfig(Path("d"))).resolved()
    finished(tmp_path / "default", default).close()
    assert read_run(tmp_path / "default").config == default


def test_resolved_paths_hold_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").touch()
    resolved = CONFIG.resolved()
    assert resolved.model == str(tmp_path / "model.gguf")
    assert (resolved.data.data, resolved.data.eval_data) == (tmp_path / "rows.jsonl", tmp_path / "held.jsonl")
    assert replace(CONFIG, model="smollm2").resolved().model == "smollm2"


def test_resolved_writes_out_what_depends_on_something_else() -> None:
    for spec, alpha, rate in (
        (AdapterSpec("lora", r=4), 8.0, "lora"),
        (AdapterSpec("qa-lora", r=16), 32.0, "qa-lora"),
        (AdapterSpec("qa-lora", r="full"), 2.0, "qa-lora full"),
        (AdapterSpec("lora", r=4, lora_alpha=5), 5, "lora"),
    ):
        resolved = replace(CONFIG, adapter=spec, training=TrainingConfig()).resolved()
        assert resolved.adapter.lora_alpha == alpha
        assert resolved.training.learning_rate == DEFAULT_LEARNING_RATE[rate]
    resolved = CONFIG.resolved()
    assert replace(resolved, data=CONFIG.data) == CONFIG
    assert resolved.resolved() == resolved


def test_metrics_are_on_disk_at_once(tmp_path: Path) -> None:
    """Another process sees each line while the run goes on."""
    folder = finished(tmp_path / "run")
    for step in (1, 2):
        folder.metric(step=step, loss=0.5)
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
    folder.close()


def test_run_that_did_not_finish_can_be_read(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    folder.metric(step=1, loss=0.5)
    folder.close()
    run = read_run(tmp_path / "run")
    assert (run.summary, run.samples, run.metrics) == ({}, [], [{"step": 1, "loss": 0.5}])
    assert run.adapter == tmp_path / "run" / "adapter"


def test_samples_keep_any_text(tmp_path: Path) -> None:
    samples = [{"prompt": "ü \u2028 한국어\n", "reference": "", "before": "a\x85b", "after": "</script>"}]
    folder = finished(tmp_path / "run")
    folder.samples(samples)
    folder.close()
    assert read_run(tmp_path / "run").samples == samples


def test_folder_in_use_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    RunFolder(tmp_path).close()
    with pytest.raises(OutputError, match="exists already"):
        RunFolder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        RunFolder(tmp_path / "file")
    with pytest.raises(OutputError):
        RunFolder(tmp_path / "file" / "run")


def test_unknown_keys_and_missing_ones_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_dict({"modle": "a", "data": "d", "rr": 3})
    for text in ("'modle' (did you mean 'model'?)", "'rr'", "model is missing", "output_dir is missing"):
        assert text in str(caught.value)
    assert "data is missing" not in str(caught.value)


def test_targets_may_be_one_name() -> None:
    values = {"model": "a", "output_dir": "o", "data": "d", "target_modules": "q_proj"}
    assert RunConfig.from_dict(values).adapter.target_modules == ("q_proj",)


def test_config_yaml_is_for_people(tmp_path: Path) -> None:
    finished(tmp_path / "run").close()
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "{a} – ü" in text
    assert "!!" not in text  # plain values only
    assert list(yaml.safe_load(text)) == list(CONFIG.to_dict())
    assert len(CONFIG.to_dict()) == 3 + sum(
        len(fields(k)) for k in (AdapterSpec, DataConfig, TrainingConfig, TaskConfig)
    )


def test_report_shows_figures_and_escapes_text(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run")
    folder.metric(step=0, eval_loss=2.0)
    folder.metric(step=1, loss=1.9, learning_rate=0.1)
    folder.metric(step=1, eval_loss=1.0)
    folder.samples([{"prompt": "<script>alert(1)</script>", "reference": "r", "before": "b", "after": "a & b"}])
    folder.summary(SUMMARY)
    folder.close()
    html = write_report(read_run(tmp_path / "run")).read_text(encoding="utf-8")
    for text in ("2.0000", "1.0000", "12,345", "1.25", "250", "3.21 GB", "2 min 5 s", "b" * 64, "a &amp; b", "<svg"):
        assert text in html
    assert "<script>" not in html
    table = Table("Checks", ("check", "result"), [["a < b", "ok"]], "said & done")
    other = tmp_path / "other.html"
    report = Report("T", [table], [{"x": "only these samples"}])
    assert write_report(read_run(tmp_path / "run"), report, other) == other
    html = other.read_text(encoding="utf-8")
    for text in ("a &lt; b", "said &amp; done", "only these samples", "<title>T</title>"):
        assert text in html
    assert "alert(1)" not in html


@pytest.mark.parametrize(
    ("gain", "left"),
    [
        (Gain(2.0, 1.0, 1.0), 1.0),
        (Gain(2.0, 1.0, 2.0), 0.0),
        (Gain(2.0, 1.0, 1.25), 0.75),
        (Gain(2.0, 1.0, 2.5), -0.5),
        (Gain(2.0, 2.0, 2.0), 0.0),
    ],
)
def test_gain_left(gain: Gain, left: float) -> None:
    assert gain.left == pytest.approx(left)
    assert f"{left:.1%} of the gain is left" in gain.describe()
