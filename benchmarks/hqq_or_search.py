"""Scales without calibration: rounding to nearest, HQQ's solver, and the search of `lorafold quantize`.

    python -m benchmarks.hqq_or_search --data gsm8k/test.jsonl.gz

The linear layers of SmolLM2-135M-Instruct (decoded from Q4_1) in groups of 64 with float16 parameters, the embedding
as it is; loss per token of the answers of 40 GSM8K rows in Alpaca text. HQQ (half-quadratic quantization, Badri and
Shaji 2023) keeps the scale of rounding to nearest and moves the zero point, for the smallest error in an l_p norm of
p = 0.7, with its published settings: beta = 10, growing by 1 % in each of 20 rounds, the best round kept.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
from pathlib import Path

import torch
from torch import Tensor

from lorafold.adapters.targets import linear_layers
from lorafold.data.rows import Example
from lorafold.data.tokens import tokenize
from lorafold.evals.loss import evaluate
from lorafold.models.load import compute_dtype, load
from lorafold.quant.calibrate import quantize
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantLinear
from lorafold.quant.mlx import mlx_codec
from lorafold.quant.weight import QuantizedWeight

GROUP, ROWS = 64, 40
NORM, BETA, GROWTH, ROUNDS = 0.7, 10.0, 1.01, 20


def hqq(weight: Tensor, codec: str) -> QuantizedWeight:
    """A matrix [O, I] with HQQ's zero points."""
    form = CODECS[codec]
    groups, levels = weight.unflatten(1, (-1, form.group_size)), (1 << form.bits) - 1
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    inverse = levels / (high - low).clamp_min(1e-8)
    zero = -low * inverse
    best, least, beta = zero, torch.full_like(zero, torch.inf), BETA
    for _ in range(ROUNDS):
        codes = (groups * inverse + zero).round().clamp(0, levels)
        rest = groups - (codes - zero) / inverse
        error = rest.abs().mean(-1, keepdim=True)
        best, least = torch.where(error < least, zero, best), torch.minimum(error, least)
        shrunk = rest.sign() * (rest.abs() - rest.abs().clamp_min(1e-12) ** (NORM - 1) / beta).clamp_min(0)
        zero = (codes - (groups - shrunk) * inverse).mean(-1, keepdim=True)
        beta *= GROWTH
    codes = (groups * inverse + best).round().clamp(0, levels)
    scale, offset = 1 / inverse, -best / inverse
    blocks = form.assemble(scale[..., 0], offset[..., 0], codes.to(torch.uint8))
    return QuantizedWeight(codec, (weight.shape[0], weight.shape[1]), blocks)


def main() -> None:
    """Quantize, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    with gzip.open(args.data, "rt", encoding="utf-8") as lines:
        pairs = [json.loads(line) for line in itertools.islice(lines, ROWS)]
    loaded = load("smollm2", compute_dtype())
    examples = [Example(i, "prompt", prompt=r["question"], completion=r["answer"]) for i, r in enumerate(pairs)]
    rows = tokenize(examples, loaded.tokenizer, template="alpaca").rows
    layers = {n: x for n, x in linear_layers(loaded.model).items() if n != "lm_head" and isinstance(x, QuantLinear)}
    dense = {name: layer.packed.decode() for name, layer in layers.items()}
    print(f"base: {evaluate(loaded, rows):.4f}\n\n| bits | nearest | HQQ | search |\n|---:|---:|---:|---:|", flush=True)
    for bits in (4, 3, 2):
        codec, losses = mlx_codec(bits, GROUP, "F16"), []
        for method in ("rtn", "hqq", "search"):
            for name, layer in layers.items():
                layer.packed = hqq(dense[name], codec) if method == "hqq" else quantize(dense[name], codec, method)
            losses.append(evaluate(loaded, rows))
        print(f"| {bits} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |", flush=True)


if __name__ == "__main__":
    main()
