"""Time and memory of loading SmolLM2-135M Q4_1 with its tokenizer, beside transformers' own GGUF loading.

    python benchmarks/load.py

Imports are made first and counted apart. Each side runs in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

PROLOGUE = """
import time
import numba, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from lorafold.models.load import load, resolve
from lorafold.train.memory import resident_bytes
path = resolve("smollm2")
before, began = resident_bytes(), time.perf_counter()
"""
EPILOGUE = """
print(time.perf_counter() - began, (resident_bytes() - before) / 1e6, before / 1e6)
"""
SIDES = {
    "lorafold": "loaded = load(path)",
    "transformers": (
        "model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)\n"
        "tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)"
    ),
}


def measured(body: str, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float, float, float]:
    """Seconds and megabytes of loading, megabytes before it, seconds of the whole process."""
    began = clock()
    out = subprocess.run(
        [sys.executable, "-c", PROLOGUE + body + EPILOGUE], check=True, capture_output=True, text=True
    ).stdout
    seconds, added, before = map(float, out.split()[-3:])
    return seconds, added, before, clock() - began


def main() -> None:
    """Print a table."""
    print("| | load | adds | imports |\n|---|---:|---:|---:|")
    for name, body in SIDES.items():
        seconds, added, before, whole = measured(body)
        print(f"| {name} | {seconds:.2f} s | {added:.0f} MB | {before:.0f} MB, {whole - seconds:.1f} s |")


if __name__ == "__main__":
    main()
