"""Every Triton kernel compiled for a GPU that need not be there: launched as always, up to the launch itself.

    python -m tests.gpu_compiler 80

prints, for each kernel and what it was given, how often it contains a fused multiply-add.
"""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from lorafold.kernels import gpu as kernels
from lorafold.quant import gpu
from lorafold.quant.codecs import CODECS

DECODED = [
    *("Q4_0", "Q4_1", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("NF4", "NF4-DQ", "INT8", "MLX2-G32-BF16", "MLX3-G64-F16", "MLX4-G128-F32", "MLX6-G64-BF16", "MLX8-G32-F16"),
]


def compile_only(capability: int) -> list[tuple[str, Any]]:
    """Let kernels compile and not run; returns the list in which they will stand."""
    made: list[tuple[str, Any]] = []
    launch = triton.JITFunction.run

    def run(self: Any, *args: Any, **options: Any) -> None:
        made.append((self.fn.__name__, launch(self, *args, **(options | {"warmup": True}))))

    driver.set_active(
        SimpleNamespace(  # type: ignore[arg-type]
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
            get_current_target=lambda: GPUTarget("cuda", capability, 32),
        )
    )
    triton.JITFunction.run = run
    return made


def main() -> None:
    """Compile, print."""
    made = compile_only(int(sys.argv[1]))
    for name in DECODED:
        codec = CODECS[name]
        blocks = torch.zeros(3, 5 if codec.group_size else 1, codec.block_bytes or 36, dtype=torch.uint8)
        given = torch.zeros(3, 5 * codec.block_weights // (codec.group_size or 1) or 1)
        for dtype in (torch.bfloat16, torch.float16, torch.float32) if name == "Q4_1" else (torch.bfloat16,):
            if name != "NF4-DQ":
                gpu.decode(codec, blocks, dtype)
            if name in ("Q4_1", "Q4_K", "NF4-DQ"):
                gpu.decode(codec, blocks, dtype, given if codec.affine else None, given)
    for dtype in (torch.bfloat16, torch.float32):
        x, weight, rstd = torch.zeros(3, 576, dtype=dtype), torch.zeros(576, dtype=dtype), torch.zeros(3)
        kernels.rms_norm(x, weight, 1e-5)
        kernels.rms_norm_backward(x, weight, rstd, x)
        kernels.swiglu(x, x)
        kernels.swiglu_backward(x, x, x)
        for gradient in (False, True):
            kernels.cross_entropy_(x, torch.zeros(3, dtype=torch.int64), gradient)
    for name, kernel in made:
        assert kernel.asm["cubin"]
        print(name, len(re.findall(r"\bfma\.", kernel.asm["ptx"])), kernel.metadata.enable_fp_fusion)


if __name__ == "__main__":
    main()
