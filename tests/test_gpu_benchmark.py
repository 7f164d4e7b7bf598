"""The GPU benchmark's own logic, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from lorafold.train import loop

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "torch sees no CUDA device here" in done.stderr


@pytest.mark.parametrize("name", ["lorafold lora", "lorafold qa-lora"])
def test_a_contender(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(loop, "epoch_batches", loop.epoch_batches)  # which the contender replaces
    job = {"name": name, "model": str(tiny_file("llama", "Q4_1")), "rows": gpu.demo_rows(24), "device": "cpu"}
    gpu.child(job | {"micro_batch_tokens": 512}, tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert len(found["seconds"]) == len(found["losses"]) == 3
    assert found["samples_per_second"] == pytest.approx(16 / sum(found["seconds"][1:]))
    assert found["peak_memory_gb"] > 0.1


def result(loss: float, seconds: float, memory: float) -> dict[str, object]:
    return {"losses": [loss], "seconds": [9.0, seconds, seconds], "peak_memory_gb": memory}


def test_contenders_are_compared_within_their_base() -> None:
    file = {"lorafold lora": result(2.0, 1.0, 1.0), "trl best": result(2.01, 3.0, 4.0)}
    nf4 = {"lorafold qlora": result(5.0, 2.0, 1.0), "trl qlora": result(5.0, 1.0, 2.0)}
    assert gpu.compare(file | nf4) == {
        "lorafold lora / trl best": {"samples": 3.0, "memory": 0.25},
        "lorafold qlora / trl qlora": {"samples": 0.5, "memory": 0.5},
    }


def test_contenders_that_compute_something_else_are_not_compared() -> None:
    with pytest.raises(SystemExit, match="do not compute the same"):
        gpu.compare({"lorafold lora": result(2.0, 1.0, 1.0), "trl best": result(2.1, 3.0, 4.0)})
