"""Triton kernels are tested on a GPU where there is one, and everywhere else in Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorafold.kernels import gpu

pytest.importorskip("triton")
from triton.runtime import interpreter

INTERPRETED = isinstance(gpu._swiglu, interpreter.InterpretedFunction)  # conftest.py asks for it
devices = pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="Triton compiles for the GPU here")),
        pytest.param(
            "cuda", marks=pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device")
        ),
    ],
)


@pytest.fixture
def bfloat16_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter cuts float32 numbers to bfloat16 (triton 3.7), where a GPU rounds them to the nearest."""
    as_it_is = interpreter._convert_float

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if (str(source), str(target)) != ("fp32", "bf16"):
            return as_it_is(data, source, target, rounding)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
        return rounded.view(torch.uint16).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
