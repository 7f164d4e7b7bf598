"""Runs whose ranks move: what they say of it, and what is refused. Also in test_more_methods, _resume and _workers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.ranks import MovingRanks
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command

MOVING = ("--method", "lora", "--r", 4, "--target-r", 1)


@pytest.fixture(scope="module")
def run(tiny_file: Callable[..., Path], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 layers that end with 21 ranks; a checkpoint after each 3 of 6 steps."""
    folder = tmp_path_factory.mktemp("ranks") / "run"
    line = [tiny_file("llama", "Q4_1"), "--data", data, *quick(*MOVING, "--save-steps", 3), "--output-dir", folder]
    assert command("train", *line) == 0
    return folder


def test_the_run_says_which_ranks_are_left(run: Path) -> None:
    ranks = json.loads((run / "summary.json").read_text())["ranks"]
    assert (len(ranks), sum(ranks.values())) == (21, 21)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    stored = {key.removeprefix("base_model.model.").partition(".lora_")[0]: min(t.shape) for key, t in tensors.items()}
    assert stored == {path: rank for path, rank in ranks.items() if rank}
    assert len(stored) < 21  # some have lost all
    report = (run / "report.html").read_text()
    assert "Ranks after training" in report
    assert "lora r=4 to 1" in report
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    scalings = {
        key: alpha / config["rank_pattern"].get(key, config["r"]) for key, alpha in config["alpha_pattern"].items()
    }
    assert {*scalings.values(), config["lora_alpha"] / config["r"]} == {2.0}


@pytest.mark.parametrize("alone", [False, True], ids=["both", "none left"])
def test_an_update_that_embedding_and_head_share_is_one(
    alone: bool, tiny_file: Callable[..., Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts once, and leaves both at once where it is the least important."""
    if alone:
        monkeypatch.setattr(MovingRanks, "importance", lambda ranks: _least(ranks, "model.embed_tokens"))
    options = quick(*MOVING, "--target-modules", "embed_tokens", "q_proj", "--ensure-weight-tying")
    line = [tiny_file("llama", "Q4_1"), "--data", data, *options, "--output-dir", tmp_path / "run"]
    assert command("train", *line) == 0
    run = read_run(tmp_path / "run")
    ranks = run.summary["ranks"]
    assert (len(ranks), sum(ranks.values())) == (4, 4)
    trained = load_trained(run)
    held = dict(adapted_layers(trained.model))
    assert ("model.embed_tokens" in held) == ("lm_head" in held) == (ranks["model.embed_tokens"] > 0) == (not alone)
    stored = json.loads((run.adapter / "adapter_config.json").read_text())
    assert stored["ensure_weight_tying"]


def _least(ranks: MovingRanks, path: str) -> dict[str, Tensor]:
    """Importances of one everywhere but in a layer."""
    layers = ranks._layers
    return {p: torch.full((adapter.learned()[0].shape[0],), float(p != path)) for p, adapter in layers.items()}


@pytest.mark.parametrize("damage", ["missing", "of others"])
def test_a_checkpoint_without_their_importance_is_damaged(
    damage: str, run: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    cut = shutil.copytree(run, tmp_path / "cut")
    shutil.rmtree(cut / "checkpoint-6")
    (cut / "summary.json").unlink()
    file = cut / "checkpoint-3" / "ranks.safetensors"
    tensors = load_file(file)
    file.unlink()
    if damage == "of others":
        save_file(dict(list(tensors.items())[1:]), file)
    assert "checkpoint-3 is damaged" in refused(
        "train", "--config", cut / "config.yaml", "--resume", "--output-dir", cut
    )


def test_ranks_do_not_move_where_they_cannot(
    train: Callable[..., str], refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    assert "tinit (3) and tfinal (3) leave none of the run's 6 steps" in train(*MOVING, "--tinit", 3, "--tfinal", 3)
    assert "target_r means nothing to qa-lora" in train("--target-r", 4)
    line = ("train", "some", "--task", "classification", "--data", data, "--output-dir", tmp_path / "run")
    assert "target_r is for language models so far" in refused(*line, "--method", "lora", "--target-r", 4)
