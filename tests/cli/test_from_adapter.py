"""Runs that begin from an adapter: of an earlier run, of PEFT, of MLX."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.auto import AutoModelForCausalLM

from lorafold.config import AdapterSpec, RunConfig
from lorafold.errors import ConfigError
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from lorafold.runs.from_adapter import adopted
from tests.cli.conftest import quick
from tests.cli.test_resume import outcome
from tests.practice import command, random_adapter, same_logits, tiny_folder
from tests.tiny_mlx import tiny_mlx

METHODS: dict[str, tuple[object, ...]] = {
    "qa-lora": ("--r", 4),
    "lora": ("--method", "lora", "--r", 4, "--target-modules", "q_proj", "down_proj"),
    "dora": ("--method", "lora", "--use-dora", "--r", 4),
    "patterns": ("--method", "lora", "--r", 4, "--rank-pattern", '{"q_proj": 2}', "--use-rslora"),
    "pissa": ("--method", "lora", "--r", 4, "--init-lora-weights", "pissa"),
    "moving ranks": ("--method", "lora", "--r", 4, "--target-r", 2),
    "vera": ("--method", "vera", "--r", 8, "--learning-rate", 0.05),
    "norms": ("--method", "lora", "--r", 4, "--modules-to-save", "norm"),
}
SAVING = ("--save-steps", 2)


@pytest.fixture(scope="module")
def base(tiny_file: Callable[..., Path]) -> Path:
    return tiny_file("llama", "Q4_1", tied=False)


@pytest.fixture(scope="module")
def runs(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Method -> a run, and a run that goes on from its adapter; not to be written to."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(method: str) -> tuple[Path, Path]:
        if method not in made:
            folder = tmp_path_factory.mktemp("from")
            line = ("train", base, "--data", data)
            assert command(*line, *quick(*METHODS[method]), "--output-dir", folder / "first") == 0
            again = quick(*SAVING, "--learning-rate", 0.003)
            assert command(*line, "--from-adapter", folder / "first", *again, "--output-dir", folder / "second") == 0
            made[method] = folder / "first", folder / "second"
        return made[method]

    return make


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_where_another_ended(method: str, runs: Callable[[str], tuple[Path, Path]]) -> None:
    """The loss is what it was, layers and ranks are the same."""
    first, second = runs(method)
    before, after = (read_run(run) for run in (first, second))
    # PiSSA's pair becomes one of twice the rank, multiplied in another order
    assert after.summary["eval_loss_before"] == pytest.approx(before.summary["eval_loss_after"], rel=1e-6)
    assert after.summary["eval_loss_after"] < after.summary["eval_loss_before"]
    tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, second)]
    assert {k: v.shape for k, v in tensors[0].items()} == {k: v.shape for k, v in tensors[1].items()}
    assert not any(
        torch.equal(v, tensors[1][k])
        for k, v in tensors[0].items()
        if k not in ("base_model.vera_A", "base_model.vera_B")
    )
    assert after.config.adapter.method == before.config.adapter.method
    assert after.config.from_adapter == first / "adapter"


@pytest.mark.parametrize("method", ["qa-lora", "vera", "pissa"])
def test_it_is_resumed_to_the_same_bits(method: str, runs: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Also where the adapter that the run began from is gone."""
    first, second = runs(method)
    cut = shutil.copytree(second, tmp_path / "cut")
    for name in ("adapter", "checkpoint-6", "checkpoint-4"):
        shutil.rmtree(cut / name)
    (cut / "summary.json").unlink()
    first.rename(tmp_path / "gone")
    try:
        assert command("train", "--config", cut / "config.yaml", "--output-dir", cut, "--resume") == 0
    finally:
        (tmp_path / "gone").rename(first)
    assert outcome(cut) == outcome(second)


def test_what_goes_on_is_folded_and_proven(runs: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    _, second = runs("qa-lora")
    assert command("fold", second, "-o", tmp_path / "tuned.gguf") == 0
    assert command("verify", tmp_path / "tuned.gguf", "--run", second, "--no-runtime") == 0
    _, second = runs("dora")
    assert command("fold", second, "-o", tmp_path / "tuned-f32.gguf", "--to", "f32") == 0


def test_an_adapter_of_peft_goes_on(data: Path, tmp_path: Path) -> None:
    """With a rank pattern, dropout and layers of its own; what is written PEFT reads again."""
    peft = pytest.importorskip("peft")
    folder = tiny_folder(tmp_path / "model", tied=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    options = {"lora_alpha": 12, "lora_dropout": 0.1, "rank_pattern": {"v_proj": 2}, "init_lora_weights": False}
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=6, target_modules=["q_proj", "v_proj"], **options))
    tuned.save_pretrained(tmp_path / "peft")
    line = ("train", folder, "--data", data, "--from-adapter", tmp_path / "peft", *quick("--learning-rate", 1e-9))
    assert command(*line, "--output-dir", tmp_path / "run") == 0
    run = read_run(tmp_path / "run")
    spec = run.config.adapter
    assert (spec.r, spec.lora_dropout, spec.target_modules) == (6, 0.1, ("q_proj", "v_proj"))
    trained = load_trained(run).model
    same_logits(trained, tuned.eval(), 1e-5)  # float32 sums in another order; 6 steps of 1e-9 move nothing
    other = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "run" / "adapter")
    same_logits(other, trained, 1e-5)


def test_an_adapter_of_mlx_goes_on(data: Path, tmp_path: Path) -> None:
    base = tiny_mlx(tmp_path / "base")
    first, adapter, second = tmp_path / "first", tmp_path / "adapter", tmp_path / "second"
    line = ("train", base, "--data", data)
    assert command(*line, *quick("--method", "lora", "--r", 4), "--output-dir", first) == 0
    assert command("export", first, "--to", "mlx-adapter", "-o", adapter) == 0
    assert command(*line, "--from-adapter", adapter, *quick(), "--output-dir", second) == 0
    losses = [json.loads((run / "summary.json").read_text()) for run in (first, second)]
    assert losses[1]["eval_loss_before"] == pytest.approx(losses[0]["eval_loss_after"], rel=1e-6)


def test_ranks_move_on_an_adapter_that_has_begun(
    runs: Callable[[str], tuple[Path, Path]], base: Path, data: Path, tmp_path: Path
) -> None:
    first, _ = runs("patterns")
    options = quick("--target-r", 1, "--learning-rate", 0.003)
    line = ("train", base, "--data", data, "--from-adapter", first, *options, "--output-dir", tmp_path / "run")
    assert command(*line) == 0
    assert sum(read_run(tmp_path / "run").summary["ranks"].values()) == 21


def test_options_that_contradict_the_adapter_are_named_together(
    runs: Callable[[str], tuple[Path, Path]], train: Callable[..., str], base: Path
) -> None:
    first, _ = runs("lora")
    start = ("--from-adapter", first)
    message = train(*start, "--method", "lora", "--r", 8, "--use-dora", "--init-lora-weights", "pissa", model=base)
    for text in (
        "r is 8, and the adapter has 4",
        "use_dora is True",
        "init_lora_weights is 'pissa', and the adapter has begun",
    ):
        assert text in message
    message = train(*start, "--method", "qa-lora", "--target-modules", "v_proj", model=base)  # also a default, if said
    assert "method is 'qa-lora', and the adapter has 'lora'" in message
    assert "target_modules is ('v_proj',), and the adapter has ('down_proj', 'q_proj')" in message
    assert "trained on other base weights" in train(*start)


def test_what_no_run_begins_from(
    train: Callable[..., str], refused: Callable[..., str], data: Path, tmp_path: Path, base: Path
) -> None:
    assert "is not an adapter folder" in train("--from-adapter", tmp_path / "none")
    folder = tiny_folder(tmp_path / "model", tied=False)
    line = ("train", folder, "--data", data, *quick("--method", "head", "--max-steps", 2))
    assert command(*line, "--output-dir", tmp_path / "head") == 0
    assert "--method head, and no adapter: fold it" in train("--from-adapter", tmp_path / "head", model=folder)
    line = ("train", folder, "--task", "classification", "--data", data, "--method", "lora")
    message = refused(*line, "--from-adapter", tmp_path / "head", "--output-dir", tmp_path / "out")
    assert "from_adapter is for language models so far" in message


def test_a_configuration_made_in_python_is_held_to_the_adapter_too(base: Path, data: Path, tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", base, 0, method="lora", r=4, bias="none")
    options: dict[str, Any] = {"data": data, "from_adapter": adapter}
    assert adopted(RunConfig(str(base), tmp_path, **options)).adapter.r == 4
    with pytest.raises(ConfigError, match="r is 6, and the adapter has 4"):
        adopted(RunConfig(str(base), tmp_path, **options, adapter=AdapterSpec("lora", r=6)))
