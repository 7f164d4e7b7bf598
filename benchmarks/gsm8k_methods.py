"""Held-out loss of LoRA and QA-LoRA on GSM8K, trained and as deployed in the GGUF file.

    python benchmarks/gsm8k_methods.py --train gsm8k/train.jsonl.gz --test gsm8k/test.jsonl.gz -o DIR

SmolLM2-135M-Instruct Q4_1, 400 rows in Alpaca text, one epoch, batch 8, all linear layers. For each method three
learning rates, and a fourth where the best of three was at the edge (two for scales); the rate is chosen on 100 further
rows of the training file, then that run is folded (QA-LoRA) or merged and quantized again (LoRA), and base, trained
model and written file are evaluated in float32 on rows of the test file, which nothing was chosen by. Finished runs in
DIR are kept, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

from lorafold.config import AdapterSpec, DataConfig, RunConfig, TrainingConfig
from lorafold.runs.display import Display
from lorafold.runs.fold import fold_run
from lorafold.runs.folder import SUMMARY, Run, read_run
from lorafold.runs.gain import measure_gain
from lorafold.runs.start import start

GRID: dict[str, tuple[AdapterSpec, tuple[float, ...]]] = {
    "LoRA r=8": (AdapterSpec("lora", 8), (5e-4, 1e-3, 2e-3, 4e-3)),
    "QA-LoRA r=8": (AdapterSpec("qa-lora", 8), (2e-3, 4e-3, 8e-3, 16e-3)),
    "QA-LoRA r=15": (AdapterSpec("qa-lora", 15), (2e-3, 4e-3, 8e-3, 16e-3)),
    "QA-LoRA r=32": (AdapterSpec("qa-lora", 32), (1e-3, 2e-3, 4e-3, 8e-3)),
    "QA-LoRA full": (AdapterSpec("qa-lora", "full"), (5e-4, 1e-3, 2e-3)),
    "QA-LoRA full, scales": (AdapterSpec("qa-lora", "full", adapt="scale"), (5e-4, 1e-3)),
    "QA-LoRA full, both": (AdapterSpec("qa-lora", "full", adapt="both"), (5e-4, 1e-3)),
}


def rows_to_choose_by(args: argparse.Namespace) -> Path:
    """The rows after the training rows, as a file in the output folder."""
    path = args.output / "choose.jsonl"
    if not path.exists():
        with gzip.open(args.train, "rt", encoding="utf-8") as lines:
            args.output.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(islice(lines, args.rows, args.rows + args.eval_rows)), encoding="utf-8")
    return path


def folder_of(args: argparse.Namespace, name: str, rate: float) -> Path:
    """Where a run of the grid lies."""
    return args.output / f"{name.replace(',', '').replace(' ', '-').replace('=', '')}-{rate:g}"


def train_one(args: argparse.Namespace, name: str, spec: AdapterSpec, rate: float, display: Display) -> Run:
    """One run of the grid, or its folder if it is there already."""
    folder = folder_of(args, name, rate)
    if (folder / SUMMARY).exists():
        return read_run(folder)
    config = RunConfig(
        "smollm2",
        folder,
        DataConfig(
            data=args.train,
            eval_data=rows_to_choose_by(args),
            prompt="{question}",
            completion="{answer}",
            template="alpaca",
            limit=args.rows,
        ),
        spec,
        TrainingConfig(learning_rate=rate, sample_rows=0, seed=args.seed),
    )
    return start(config, display)


def row(args: argparse.Namespace, name: str, runs: dict[float, Run], display: Display) -> dict[str, object]:
    """Fold the best run of a method and measure the file on the test rows."""
    rate, best = min(runs.items(), key=lambda item: item[1].summary["eval_loss_after"])
    path = best.path / "deployed.gguf"
    report = fold_run(best, path, lossy=best.config.adapter.method == "lora")
    test = replace(best.config.data, eval_limit=args.eval_rows)
    gain = measure_gain(replace(best, config=replace(best.config, data=test)), path, display, args.test)
    path.unlink()
    return {
        "method": name,
        "trainable": best.summary["trainable_parameters"],
        "learning_rate": rate,
        "searched": {f"{r:g}": round(run.summary["eval_loss_after"], 4) for r, run in sorted(runs.items())},
        "base": gain.base,
        "trained": gain.trained,
        "deployed": gain.written,
        "gain_left": gain.left,
        "fold": report.kind,
        "samples_per_second": best.summary["samples_per_second"],
        "peak_memory_gb": best.summary["peak_memory_bytes"] / 1e9,
    }


def markdown(rows: list[dict[str, object]]) -> str:
    """The rows as a table."""
    lines = [
        "| method | trainable | rate: loss it was chosen by | rate | base | trained | in the file | gain left |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for r in rows:
        searched = ", ".join(f"{k}: {v}" for k, v in r["searched"].items())  # type: ignore[attr-defined]
        lines.append(
            f"| {r['method']} ({r['fold']}) | {r['trainable']:,} | {searched} | {r['learning_rate']:g} "
            f"| {r['base']:.4f} | {r['trained']:.4f} | {r['deployed']:.4f} | {r['gain_left']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the grid and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--eval-rows", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--methods", nargs="*", default=list(GRID), choices=list(GRID))
    parser.add_argument("--train-only", action="store_true", help="fill DIR and measure nothing yet")
    parser.add_argument("--finished-only", action="store_true", help="measure the runs that DIR holds, train nothing")
    args = parser.parse_args()
    display, rows = Display(), []
    for i in range(4) if not args.finished_only else ():  # rate by rate: even a part of the grid compares
        for name in args.methods:
            spec, rates = GRID[name]
            if i < len(rates):
                train_one(args, name, spec, rates[-1 - i], display)
    for name in args.methods if not args.train_only else ():
        runs = {rate: folder_of(args, name, rate) for rate in GRID[name][1]}
        finished = {rate: read_run(path) for rate, path in runs.items() if (path / SUMMARY).exists()}
        if finished:
            rows.append(row(args, name, finished, display))
    if rows:
        (args.output / "table.json").write_text(json.dumps(rows, indent=2) + "\n")
        print(markdown(rows))


if __name__ == "__main__":
    main()
