"""numba and torch share one pool of OpenMP threads; decoding must not change how many are used."""

from __future__ import annotations

import os
import subprocess
import sys

import numba
import pytest

CODE = """
import torch
{before}
from lorafold.quant.weight import encode
import numba
encode(torch.randn(64, 64), "Q4_1").decode()
print(torch.get_num_threads(), numba.get_num_threads())
"""


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="one core")
@pytest.mark.parametrize("how", ["environment", "torch.set_num_threads(1)"])
def test_one_thread_means_one_thread(how: str) -> None:
    """Who asks for one thread beside other work means all of it. numba starts its threads at the first call of a
    kernel, which sets OpenMP's number for torch as well; so this needs a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if how == "environment":
        environment["OMP_NUM_THREADS"] = "1"
    code = CODE.format(before="" if how == "environment" else how)
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "1"]
