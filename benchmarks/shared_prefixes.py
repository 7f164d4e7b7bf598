"""What it gains to compute once what the rows of a step have in common from their start.

    python -m benchmarks.shared_prefixes --gsm8k gsm8k/train.jsonl.gz --products product_descriptions/products.jsonl.gz

QA-LoRA, r = 8 on all linear layers of SmolLM2-135M-Instruct, 8 rows a step. Each step's rows are computed forward and
backward with shared beginnings and without, in turns; the ratio is the median over the steps. First real rows: GSM8K
and product descriptions in Alpaca text, and GSM8K after one system prompt of 300 tokens. Then the break-even: rows of
160 tokens of their own after 0 to 256 tokens in common.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from lorafold.adapters.adapted import parameters_once
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.data.packs import micro_batches
from lorafold.data.rows import Example
from lorafold.data.templates import render_prompt
from lorafold.data.tokens import Tokens, tokenize
from lorafold.evals.loss import SHARED, pack_loss, packed
from lorafold.models.load import LoadedModel, compute_dtype, load
from lorafold.train.loop import usual_tokens

STEP_ROWS, STEPS = 8, 6
PRODUCT = "Create a detailed description for the following product: {name}, belonging to category: {style}"
SYSTEM = "You are a patient teacher of arithmetic. Explain every step, name every quantity, and check the result. "


def examples(path: Path, prompt: str, completion: str, before: str = "") -> list[Example]:
    """The first rows of a file in Alpaca text."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, STEP_ROWS * STEPS)]
    return [
        Example(i, "prompt", prompt=before + render_prompt("alpaca", prompt.format(**r)), completion=r[completion])
        for i, r in enumerate(rows)
    ]


def synthetic(common: int) -> list[Tokens]:
    """Rows of 160 random tokens after some that are the same in all."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(1000, 40_000, (common,), generator=generator).tolist()
    rows = []
    for i in range(STEP_ROWS * STEPS):
        own = torch.randint(1000, 40_000, (160,), generator=generator).tolist()
        rows.append(Tokens(start + own, [False] * (common + 60) + [True] * 100, i))
    return rows


def step_seconds(loaded: LoadedModel, rows: Sequence[Tokens], shared: int | None) -> tuple[float, float, int]:
    """Seconds and loss of a step, and how many tokens were computed."""
    began, total, tokens = time.perf_counter(), 0.0, 0
    ordered = sorted(rows, key=lambda row: row.ids) if shared is not None else list(rows)
    with parameters_once(loaded.model):
        for group in micro_batches(ordered, usual_tokens(loaded), loaded.row_align, shared):
            batch = packed(loaded, group, shared)
            loss = pack_loss(loaded, batch)
            loss.backward()
            total, tokens = total + float(loss.detach()), tokens + len(batch.ids)
    loaded.model.zero_grad()
    return time.perf_counter() - began, total, tokens


def compare(name: str, loaded: LoadedModel, rows: Sequence[Tokens]) -> None:
    """Print one line of the table."""
    ratios, seconds, tokens = [], [], []
    for start in range(0, len(rows), STEP_ROWS):
        batch = rows[start : start + STEP_ROWS]
        apart, once = step_seconds(loaded, batch, None), step_seconds(loaded, batch, SHARED)
        assert abs(apart[1] - once[1]) < 0.01 * apart[1]  # bfloat16; equal to 1e-5 in float32, by the tests
        ratios.append(apart[0] / once[0])
        seconds.append((apart[0], once[0]))
        tokens.append((apart[2], once[2]))
    computed = [sum(column) / len(column) for column in zip(*tokens, strict=True)]
    took = [statistics.median(column) for column in zip(*seconds, strict=True)]
    print(
        f"| {name} | {computed[0]:.0f} | {computed[1]:.0f} | {took[0]:.2f} | {took[1]:.2f} "
        f"| {statistics.median(ratios):.2f} |",
        flush=True,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--products", type=Path, required=True)
    args = parser.parse_args()
    loaded = load("smollm2", compute_dtype())
    inject(loaded.model, AdapterSpec("qa-lora", 8))
    loaded.model.train()
    system = SYSTEM * 100
    words = loaded.tokenizer(system)["input_ids"][:300]
    data = {
        "GSM8K, Alpaca": examples(args.gsm8k, "{question}", "answer"),
        "product descriptions, Alpaca": examples(args.products, PRODUCT, "description"),
        "GSM8K after a system prompt of 300 tokens": examples(
            args.gsm8k, "{question}", "answer", loaded.tokenizer.decode(words) + "\n\n"
        ),
    }
    step_seconds(loaded, synthetic(0)[:STEP_ROWS], None)  # compiles
    print(
        "| rows | tokens apart | tokens shared | s apart | s shared | times as fast |\n|---|---:|---:|---:|---:|---:|"
    )
    for name, rows in data.items():
        compare(name, loaded, tokenize(rows, loaded.tokenizer, template="raw").rows)
    for common in (0, 16, 32, 64, 128, 256):
        compare(f"160 tokens after {common} in common", loaded, synthetic(common))


if __name__ == "__main__":
    main()
