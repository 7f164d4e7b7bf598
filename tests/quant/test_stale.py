"""What numba remembers of kernels is forgotten when code that they call has changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lorafold.kernels.compiled import forget_stale

SOURCES = ["kernels/lanes.py", "kernels/block.py", "quant/vectors.py", "quant/kernels.py"]


@pytest.mark.parametrize(
    ("changed", "forgotten"),
    [("kernels/lanes.py", True), ("quant/vectors.py", True), ("quant/kernels.py", False), (None, False)],
)
def test_what_is_older_than_code_it_calls_is_forgotten(tmp_path: Path, changed: str | None, forgotten: bool) -> None:
    """In both rooms; numba sees by itself when the file of a kernel changes. A date in the future is no change."""
    now = time.time()
    for name in SOURCES:
        _written(tmp_path / name, now - 300)
    indices = [tmp_path / room / "__pycache__" / "block.py311.nbi" for room in ("kernels", "quant")]
    other = tmp_path / "kernels" / "__pycache__" / "block.pyc"
    for path in (*indices, other):
        _written(path, now - 200)
    newer = tmp_path / "quant" / "__pycache__" / "newer.nbi"
    _written(newer, now - 50)
    _written(tmp_path / (changed or "kernels/lanes.py"), now - 100 if changed else now + 1000)
    forget_stale(tmp_path)
    assert [path.exists() for path in indices] == [not forgotten] * 2
    assert other.exists()
    assert newer.exists()


def _written(path: Path, when: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    os.utime(path, (when, when))
