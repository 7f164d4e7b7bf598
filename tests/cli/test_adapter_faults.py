"""Adapters that cannot be combined, reduced or shown: every fault at once, and the way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.practice import command, edited_adapter, random_adapter, tiny_folder

WEIGHTS = "adapter_model.safetensors"
Tiny = Callable[..., Path]
Refused = Callable[..., str]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense"))


def test_adapters_that_do_not_go_together(tiny_file: Tiny, tmp_path: Path, refused: Refused) -> None:
    """Everything at once: bases, layers, shapes; with the way out."""
    base, other = tiny_file("llama", "Q4_1"), tiny_file("qwen3", "Q4_1")
    first = random_adapter(tmp_path / "first", base, 0, method="lora", r=4)
    second = random_adapter(tmp_path / "second", other, 0, method="lora", r=2, target_modules=("q_proj", "o_proj"))
    out = ["-o", tmp_path / "out", "--weights", 1, 1]
    message = refused("adapters", "combine", first, second, *out, "--combination", "linear")
    assert "different base weights" in message
    assert "lacks 15 layers of the others (model.layers.0.mlp.down_proj, " in message
    assert "--union" in message
    assert "model.layers.0.self_attn.o_proj differs in shape: (64, 64) in" in message
    assert "(64, 128) in" in message
    assert "ranks differ in 6 layers" in message
    assert "use cat or svd" in message
    grouped = [
        random_adapter(tmp_path / "offset", base, 0),
        random_adapter(tmp_path / "scale", base, 0, adapt="scale"),
        edited_adapter(tmp_path / "offset", tmp_path / "in-place", {"k_quants": "in-place"}),
    ]
    message = refused("adapters", "combine", *grouped, *out[:2], "--weights", 1, 1, 1)
    assert "adapt differs: offset in" in message
    assert "k_quants differs: in-place in" in message or "k_quants differs: promote in" in message
    message = refused("adapters", "combine", first, grouped[1], *out)
    assert "learns scales, so it is no LoRA" in message
    assert "2 adapters and 1 weights" in refused("adapters", "combine", first, second, *out[:2], "--weights", 1)


def test_damaged_adapters_are_named(tiny_file: Tiny, tmp_path: Path, refused: Refused) -> None:
    base = tiny_file("llama", "Q4_1")
    good = random_adapter(tmp_path / "good", base, 0, method="lora", r=4)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    bad = edited_adapter(
        good,
        tmp_path / "bad",
        {"rank_pattern": {"layers.1.mlp.up_proj": 3}},
        drop="layers.2.mlp.up_proj.lora_B",
        **{f"{key}A.weight": torch.full((4, 64), torch.nan), f"{key}magnitude": torch.ones(3)},
    )
    message = refused("adapters", "combine", good, bad, tmp_path / "none", "-o", tmp_path / "out", "--weights", 1, 1, 1)
    assert f"unexpected tensor {key}magnitude" in message
    assert "q_proj.lora_A.weight is no matrix of finite numbers" in message
    assert "model.layers.2.mlp.up_proj has no lora_B" in message
    assert "model.layers.1.mlp.up_proj has factors [4, 64] and [96, 4], and its rank is to be 3" in message
    assert f"{tmp_path / 'none'} is not an adapter folder" in message
    (bad / WEIGHTS).write_bytes(b"no tensors")
    assert "cannot be read" in refused("adapters", "show", bad)


def test_the_base_is_asked_for_where_it_is_needed(tiny_file: Tiny, tmp_path: Path, refused: Refused) -> None:
    """Offsets learned directly say nothing of the group size; the base the folder names may be elsewhere."""
    base = tiny_file("llama", "Q4_1")
    random_adapter(tmp_path / "full", base, 0, r="full")
    gone = {"base_model_name_or_path": str(tmp_path / "gone.gguf")}
    adapter = edited_adapter(tmp_path / "full", tmp_path / "moved", gone)
    out = tmp_path / "out"
    message = refused("adapters", "reduce", adapter, "-o", out, "--r", 1)
    assert "--base" in message
    assert "gone.gguf" in message
    message = refused(
        "adapters", "reduce", tmp_path / "full", "-o", out, "--r", 1, "--base", tiny_file("qwen3", "Q4_1")
    )
    assert "trained on other base weights" in message
    assert command("adapters", "reduce", adapter, "-o", out, "--r", 1, "--base", base) == 0
    assert command("adapters", "reduce", adapter, "-o", out, "--r", 1, "--base", base, "--overwrite") == 0


def test_other_refusals(dense: Path, tiny_file: Tiny, tmp_path: Path, refused: Refused) -> None:
    out = ["-o", tmp_path / "out"]
    assert "no linear layer differs" in refused(
        "adapters", "extract", "--base", dense, "--tuned", dense, *out, "--r", 1
    )
    message = refused("adapters", "extract", "--base", dense, "--tuned", tiny_file("qwen3", "Q4_1"), *out, "--r", 1)
    assert "q_proj is (64, 64) in" in message
    adapter = random_adapter(tmp_path / "adapter", tiny_file("llama", "Q4_1"), 0)
    assert ".svg, .png, .pdf, not .txt" in refused("adapters", "show", adapter, "-o", tmp_path / "plot.txt")
    assert "exists already" in refused("adapters", "reduce", adapter, "-o", adapter, "--r", 1)
