"""What storing an update of offsets costs in each format: root mean square of the rounding, as a share of the update.

    python -m benchmarks.offset_rounding

Gaussian weights, quantized by llama.cpp (K-quants), by ggml's reference quantizer or by MLX's rule; the update is
Gaussian too, with a standard deviation of some part of a quantization step. What is lost here is seen by training.
"""

from __future__ import annotations

import torch

from lorafold.quant.codecs import CODECS
from lorafold.quant.mlx import MLXCodec
from lorafold.quant.weight import QuantizedWeight, encode
from tests.ggml_quantizer import ggml_quantize

FORMATS = ("Q4_1", "Q5_1", "Q4_K", "Q5_K", "Q2_K", "MLX4-G64-F16", "MLX4-G64-BF16")
STEPS = (0.03, 0.1, 0.3)  # of a quantization step


def quantized(name: str, weight: torch.Tensor) -> QuantizedWeight:
    """A dense matrix in a format."""
    codec = CODECS[name]
    shape = (weight.shape[0], weight.shape[1])
    if isinstance(codec, MLXCodec):
        groups = weight.unflatten(1, (-1, codec.group_size))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low) / ((1 << codec.bits) - 1)
        codes = ((groups - low[..., None]) / scale[..., None]).round()
        return QuantizedWeight(name, shape, codec.assemble(scale, low, codes.to(torch.uint8)))
    if codec.encodes:
        return encode(weight, name)
    stored = ggml_quantize(weight.numpy(), name)
    return QuantizedWeight(name, shape, torch.from_numpy(stored.reshape(shape[0], -1, codec.block_bytes)))


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    weight = torch.randn(512, 1024) * 0.05
    print("| format | " + " | ".join(f"update of {s:g} steps" for s in STEPS) + " |")
    print("|---|" + "---:|" * len(STEPS))
    for name in FORMATS:
        packed = quantized(name, weight)
        codec, stored = packed.format, packed.format.offset(packed.blocks)
        cells = []
        for share in STEPS:
            update = share * codec.scale(packed.blocks).abs() * torch.randn(stored.shape)
            lost = codec.move_offset(stored, update) - stored - update
            cells.append(f"{float(lost.norm() / update.norm()):.1%}")
        print(f"| {name} ({codec.bits_per_weight:.2f} bits) | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
