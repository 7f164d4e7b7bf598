"""What a data set of a million rows costs beside one of a thousand: seconds to the first step, and memory.

    python benchmarks/many_rows.py [--rows 1000 1000000] [--formats jsonl csv parquet] [--json FILE]

Writes instruction data of about 95 tokens a row and trains SmolLM2-135M on them for three steps, twice each: with an
empty cache and with the cache of the first run. Then steps of 16 rows are drawn without training. Resident memory
counts the pages of files that are mapped at the moment, which the system can take back; anonymous memory does not.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

COLUMNS = ["instruction", "input", "output"]
SYLLABLES = ["ba", "ko", "ri", "ten", "sol", "ma", "ver", "dun", "pi", "lo", "ga", "str", "en", "tion", "al", "er"]
COMMON = [
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "that",
    "for",
    "it",
    "with",
    "as",
    "was",
    "on",
    "be",
    "by",
    "at",
    "this",
]
TAKEN = 20_000  # rows that are drawn without training
TRAIN = ["smollm2", "--max-steps", "3", "--sample-rows", "0", "--eval-limit", "8"]
COMMAND = "from lorafold.cli.main import main; main()"
TAKE = f"""
import sys, time
from itertools import islice
from pathlib import Path
from lorafold.config import DataConfig, TrainingConfig
from lorafold.data.stream import row_batches
from lorafold.models.load import load_tokenizer_only
from lorafold.runs.display import Display
from lorafold.runs.prepare import prepare
from lorafold.train.loop import epoch_batches
config = TrainingConfig(per_device_train_batch_size=16)
rows = prepare(DataConfig(Path(sys.argv[1])), load_tokenizer_only("smollm2"), 0, Display(quiet=True)).train.rows
began = time.perf_counter()
count = sum(map(len, row_batches(rows, islice(epoch_batches(len(rows), config), {TAKEN // 16}))))
print((time.perf_counter() - began) / count)
"""


def generated(count: int) -> Iterator[dict[str, str]]:
    """Rows of random words; about half of them are frequent English ones."""
    draw = random.Random(1)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(3000)] + COMMON * 100
    for i in range(count):
        texts = [" ".join(draw.choices(words, k=draw.randint(*k))) for k in ((6, 14), (0, 10), (8, 24))]
        yield dict(zip(COLUMNS, [f"Question {i}: {texts[0]}?", texts[1], f"{texts[2]}."], strict=True))


def write(path: Path, count: int) -> None:
    """Rows in the format of the suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(generated(count))), path)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(generated(count))
        else:
            file.writelines(json.dumps(row) + "\n" for row in generated(count))


def watched(arguments: list[str], cache: Path, metrics: Path | None = None) -> dict[str, float]:
    """Run Python: what `metrics` having a training step took, seconds in all, peaks in MB, and what it prints."""
    began = time.perf_counter()
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    process = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, text=True)
    found = {"first_step": 0.0, "cpu": 0.0, "VmHWM": 0.0, "RssAnon": 0.0}
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "RssAnon"):
                found[name] = max(found[name], int(value.split()[0]) / 1000)
        if not found["first_step"] and metrics and metrics.exists() and '"loss"' in metrics.read_text():
            found["first_step"] = time.perf_counter() - began
            ticks = (status.parent / "stat").read_text().rpartition(")")[2].split()[11:13]
            found["cpu"] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.01)
    assert process.stdout
    printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed")
    return found | {"seconds": time.perf_counter() - began, "printed": float(printed) if metrics is None else 0.0}


def measure(folder: Path, suffix: str, count: int) -> Iterator[dict[str, Any]]:
    """Train with an empty cache and again, then draw rows."""
    data, cache = folder / f"{count}.{suffix}", folder / f"cache-{suffix}-{count}"
    write(data, count)
    case: dict[str, Any] = {"format": suffix, "rows": count, "file_MB": data.stat().st_size / 1e6}
    for attempt in ("first", "second"):
        run = folder / f"run-{suffix}-{count}-{attempt}"
        arguments = ["-c", COMMAND, "train", *TRAIN, "--data", str(data), "--output-dir", str(run)]
        found = watched(arguments, cache, run / "metrics.jsonl")
        stored = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 1e6
        yield case | {"what": f"train, {attempt} time", "cache_MB": stored} | found
    yield case | {"what": f"draw {TAKEN:,} rows"} | watched(["-c", TAKE, str(data)], cache)


def line(case: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [
        case["format"],
        f"{case['rows']:,}",
        f"{case['file_MB']:.1f} MB",
        f"{case['cache_MB']:.0f} MB" if "cache_MB" in case else "",
        case["what"],
        f"{case['first_step']:.1f} s" if case["first_step"] else "",
        f"{case['cpu']:.1f} s" if case["cpu"] else "",
        f"{case['printed'] * 1e6:.0f} us" if case["printed"] else "",
        f"{case['VmHWM']:.0f} MB",
        f"{case['RssAnon']:.0f} MB",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 1_000_000])
    parser.add_argument("--formats", nargs="+", default=["jsonl", "csv", "parquet"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    print("| format | rows | file | cache | | first step after | of CPU time | a row | resident | anonymous |")
    print("|---|---:|---:|---:|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in args.formats:
            for count in args.rows:
                for case in measure(Path(folder), suffix, count):
                    results.append(case)
                    print(line(case), flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
