"""Whether scale and offset of a folded file carry over to HQQ's and tinygemm's way of writing them.

    python -m benchmarks.float_zero

HQQ decodes (code - zero) * scale, so zero = -offset / scale; torch's int4 product (tinygemm) decodes
(code - 8) * scale + zero, so zero = offset + 8 * scale. For every group of the embedded model (Q4_1): the largest
difference of a decoded weight, in quantization steps, by the type in which scale and zero are stored; and torch's int4
operator on the CPU against the same product in float64.
"""

from __future__ import annotations

import torch

from lorafold.adapters.targets import linear_layers
from lorafold.models.load import load
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import QuantizedWeight

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def errors(weight: QuantizedWeight, dtype: torch.dtype) -> tuple[float, float]:
    """Largest difference in steps: HQQ, tinygemm."""
    form, blocks = weight.format, weight.blocks
    scale, offset = form.scale(blocks).double()[..., None], form.offset(blocks).double()[..., None]
    codes = form.codes(blocks).double()
    exact, step = codes * scale + offset, scale.abs().clamp_min(1e-8)
    s = scale.to(dtype).double()
    hqq = (codes - (-offset / scale.clamp_min(1e-8)).to(dtype).double()) * s
    tinygemm = (codes - 8) * s + (offset + 8 * scale).to(dtype).double()
    return float(((hqq - exact).abs() / step).max()), float(((tinygemm - exact).abs() / step).max())


def int4_product(weight: QuantizedWeight, dtype: torch.dtype) -> float:
    """Error of torch's int4 product on random inputs, relative to the exact one."""
    form, blocks = weight.format, weight.blocks
    scale, offset = form.scale(blocks), form.offset(blocks)
    x = torch.randn(16, weight.shape[1]).to(dtype)
    codes = form.codes(blocks).flatten(1).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    parameters = torch.stack([scale, offset + 8 * scale], dim=-1).transpose(0, 1).contiguous().to(dtype)
    out = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, form.group_size, parameters)
    exact = x.double() @ weight.decode().double().T
    return float((out.double() - exact).norm() / exact.norm())


@torch.no_grad()
def main() -> None:
    """Print the table."""
    layers = [
        x for n, x in linear_layers(load("smollm2").model).items() if isinstance(x, QuantLinear) and "lm_head" not in n
    ]
    print("| stored as | HQQ, steps | tinygemm, steps | torch's int4 product, relative |\n|---|---:|---:|---:|")
    for dtype in TYPES:
        worst = [max(column) for column in zip(*(errors(layer.packed, dtype) for layer in layers), strict=True)]
        product = max(int4_product(layer.packed, dtype) for layer in layers[:7])
        print(f"| {str(dtype).removeprefix('torch.')} | {worst[0]:.1e} | {worst[1]:.1e} | {product:.1e} |")


if __name__ == "__main__":
    main()
