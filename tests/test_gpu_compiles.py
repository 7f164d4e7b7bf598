"""Triton's own compiler takes every kernel, without a GPU: what its interpreter accepts is more than that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles(capability: str, tmp_path: Path) -> None:
    """To machine code; decoding without fused multiply-adds, which would give other bits than torch."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.gpu_compiler", capability],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len({name for name, *_ in lines}) == 7
    decoders = [rest for name, *rest in lines if name.startswith("_decode")]
    assert len(decoders) > 20
    assert all(rest == ["0", "False"] for rest in decoders)
