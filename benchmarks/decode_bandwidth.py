"""Decode kernels against the memory bandwidth that a plain copy reaches, on a CPU.

    python -m benchmarks.decode_bandwidth [--json FILE]

Each format's matrices, 64 MB dense in bfloat16, are decoded again and again into fresh memory; beside them a bfloat16
tensor of the same size is copied, in turns, so that both see the same machine. Bandwidth is bytes read and written per
second: packed blocks and dense result for a decoder, twice the tensor for a copy. The median of the turns is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lorafold.quant.codecs import CODECS
from lorafold.quant.weight import QuantizedWeight

ROWS, WIDTH, TURNS = 8192, 4096, 15
FORMATS = ("Q4_1", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "NF4", "NF4-DQ")
FORMATS += tuple(f"MLX{bits}-G64-F16" for bits in (2, 3, 4, 5, 6, 8))


def random_weight(codec: str) -> QuantizedWeight:
    """Blocks of random bytes whose scales and offsets are plain numbers."""
    form = CODECS[codec]
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, WIDTH // form.block_weights, form.block_bytes)
    blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    extra = None
    if codec == "NF4-DQ":
        extra = torch.rand(1 + blocks.shape[0] * blocks.shape[1] // 256)
    elif codec == "NF4":
        blocks[..., :4] = torch.tensor([0.02]).view(torch.uint8)
    elif form.block_weights == 256:
        place = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[codec]
        for at in place:
            blocks[..., at : at + 2] = torch.tensor([0.001], dtype=torch.float16).view(torch.uint8)
    else:
        for at in (0, 2) if form.affine else (0,):
            blocks[..., at : at + 2] = torch.tensor([0.01], dtype=torch.float16).view(torch.uint8)
    return QuantizedWeight(codec, (ROWS, WIDTH), blocks, extra)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    dense = torch.randn(ROWS, WIDTH).bfloat16()
    results = {}
    print("| format | decode GB/s | copy GB/s | share | billion weights/s |")
    print("|---|---:|---:|---:|---:|")
    for codec in FORMATS:
        weight = random_weight(codec)
        contenders = (lambda w=weight: w.decode(torch.bfloat16), dense.clone)
        for work in contenders:
            work()  # compiles
        turns = [tuple(seconds(work) for work in contenders) for _ in range(TURNS)]
        decode, copy = (statistics.median(column) for column in zip(*turns, strict=True))
        moved, copied = weight.nbytes + 2 * ROWS * WIDTH, 4 * ROWS * WIDTH
        share = statistics.median((moved / ours) / (copied / theirs) for ours, theirs in turns)
        rates = moved / decode / 1e9, copied / copy / 1e9
        results[codec] = {"decode_gb_s": rates[0], "copy_gb_s": rates[1], "share": share}
        per_second = ROWS * WIDTH / decode / 1e9
        print(f"| {codec} | {rates[0]:.1f} | {rates[1]:.1f} | {share:.0%} | {per_second:.1f} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
