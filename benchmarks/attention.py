"""The attention kernel for any processor beside torch's flash attention, in turns: milliseconds a layer.

    python -m benchmarks.attention [--dtype bfloat16]

Rows of a pack with SmolLM2's heads: 9 of queries, 3 of keys and values, 64 wide. Both rotate nothing and start from
queries, keys and values as their projections leave them; torch's takes row by row, with shared key heads. Outputs and
gradients must agree first. Medians of 9 turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.kernels import attention as plain
from lorafold.models.attention import attend
from lorafold.models.heap import keep_freed_memory

HEADS, KEY_HEADS, WIDTH = 9, 3, 64
PACKS = {
    "10 rows of 100": [100] * 10,
    "5 rows of 200": [200] * 5,
    **{f"1 row of {n:,}": [n] for n in (1024, 2048, 4096)},
}
TURNS = 9


def ours(qkv: Tensor, lengths: list[int]) -> Tensor:
    """[T, (H + 2 K) D] -> [T, H D]."""
    nothing = qkv.new_empty(0, WIDTH)
    return attend(qkv, nothing, nothing, plain, KEY_HEADS, lengths, None, WIDTH**-0.5, None)


def flash(qkv: Tensor, lengths: list[int]) -> Tensor:
    """The same by torch."""
    heads = qkv.view(len(qkv), -1, WIDTH).transpose(0, 1)[None].split([HEADS, KEY_HEADS, KEY_HEADS], 1)
    rows = zip(*(x.split(lengths, 2) for x in heads), strict=True)
    outs = [F.scaled_dot_product_attention(*row, is_causal=True, enable_gqa=True) for row in rows]
    return torch.cat(outs, 2)[0].transpose(0, 1).flatten(1)


def turn(attention: Callable[[Tensor, list[int]], Tensor], qkv: Tensor, dy: Tensor, lengths: list[int]) -> tuple:
    """Seconds forward and backward, the output and the gradient."""
    x = qkv.clone().requires_grad_()
    times = [time.perf_counter()]
    out = attention(x, lengths)
    times.append(time.perf_counter())
    out.backward(dy)
    times.append(time.perf_counter())
    return times[1] - times[0], times[2] - times[1], out.detach(), x.grad


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    dtype = getattr(torch, parser.parse_args().dtype)
    keep_freed_memory()
    torch.manual_seed(0)
    print("| rows | forward ms | torch | backward ms | torch | times as fast |\n|---|---:|---:|---:|---:|---:|")
    for name, lengths in PACKS.items():
        qkv = torch.randn(sum(lengths), (HEADS + 2 * KEY_HEADS) * WIDTH).to(dtype)
        dy = torch.randn(sum(lengths), HEADS * WIDTH).to(dtype)
        first = [turn(attention, qkv, dy, lengths) for attention in (ours, flash)]
        close = 2e-5 if dtype == torch.float32 else 0.03
        for mine, theirs in zip(first[0][2:], first[1][2:], strict=True):
            torch.testing.assert_close(mine, theirs, atol=close, rtol=close)
        turns = [[turn(attention, qkv, dy, lengths)[:2] for attention in (ours, flash)] for _ in range(TURNS)]
        (forward, backward), (torch_forward, torch_backward) = (
            [1e3 * statistics.median(t[who][way] for t in turns) for way in (0, 1)] for who in (0, 1)
        )
        ratio = (torch_forward + torch_backward) / (forward + backward)
        print(f"| {name} | {forward:.1f} | {torch_forward:.1f} | {backward:.1f} | {torch_backward:.1f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
