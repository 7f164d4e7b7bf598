"""Which kernels do the elementwise work on a tensor: a CPU's, a GPU's, or none, and then torch operations do."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorafold.kernels import block, gpu


def kernels_for(x: Tensor) -> Any:
    """The module whose `rms_norm`, `swiglu` and `cross_entropy_` cover this tensor; None where torch has to do it."""
    return block if block.usable(x) else gpu if gpu.usable(x) else None
