"""Many adapters on one base: what switching costs, and a batch with another adapter for each row.

    python -m benchmarks.many_adapters [--rows 32] [--tokens 64] [--json FILE]

The embedded model in bfloat16 (or float32 where the processor has no such products). Both ways of computing take turns,
and the median of the ratios counts. Each kind of adapter has a process of its own: what an earlier one left of the heap
would scatter the next one's modules.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from pathlib import Path

import torch

from lorafold.adapters.adapted import set_active
from lorafold.adapters.inject import adapter_state, inject
from lorafold.adapters.rows import adapters_by_row
from lorafold.config import AdapterSpec
from lorafold.models.load import LoadedModel, compute_dtype, load

SPECS = {"LoRA r=8": AdapterSpec("lora", r=8), "QA-LoRA r=8": AdapterSpec("qa-lora", r=8)}


def with_adapters(spec: AdapterSpec, count: int) -> LoadedModel:
    """The embedded model with adapters named 0, 1, ... that all do something."""
    loaded = load("smollm2", compute_dtype())
    torch.manual_seed(0)
    for i in range(count):
        inject(loaded.model, spec, str(i))
        with torch.no_grad():
            for parameter in adapter_state(loaded.model, str(i)).values():
                parameter += 0.01 * torch.randn(parameter.shape)
    return loaded


@torch.no_grad()
def measure(label: str, rows: int, tokens: int, turns: int) -> dict[str, float]:
    """Seconds of a forward pass to the last hidden state, and of a switch."""
    loaded = with_adapters(SPECS[label], rows)
    ids = torch.randint(0, 1000, (1, rows * tokens))
    pack = {
        "input_ids": ids,
        "position_ids": torch.arange(tokens).repeat(rows)[None],
        "segments": [tokens] * rows,
        "use_cache": False,
    }
    names = [str(i) for i in range(rows)]
    switches, one, each, prepared = [], [], [], []
    for turn in range(turns + 1):
        began = time.perf_counter()
        set_active(loaded.model, str(turn % rows))
        switched = time.perf_counter()
        loaded.model.model(**pack)
        finished = time.perf_counter()
        with adapters_by_row(loaded.model, names, pack["segments"], loaded.dtype):
            ready = time.perf_counter()
            loaded.model.model(**pack)
            done = time.perf_counter()
        if turn:
            switches.append(switched - began)
            one.append(finished - switched)
            each.append(done - ready)
            prepared.append(ready - finished)
    return {
        "switch_ms": 1e3 * statistics.median(switches),
        "tokens_per_second_one": rows * tokens / statistics.median(one),
        "tokens_per_second_each": rows * tokens / statistics.median(each),
        "speed_ratio": statistics.median(a / b for a, b in zip(one, each, strict=True)),
        "prepare_seconds": statistics.median(prepared),
    }


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    print("| adapters | switch | one for all | another for each row | ratio | stacking them |")
    print("|---|---:|---:|---:|---:|---:|")
    for label in SPECS:
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            found = alone.apply(measure, (label, arguments.rows, arguments.tokens, arguments.turns))
        results[label] = found
        print(
            f"| {arguments.rows} x {label} | {found['switch_ms']:.2f} ms "
            f"| {found['tokens_per_second_one']:.0f} tokens/s "
            f"| {found['tokens_per_second_each']:.0f} tokens/s | {found['speed_ratio']:.2f} "
            f"| {found['prepare_seconds']:.2f} s |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
