"""Training speed and memory on one GPU: LoraFold beside TRL's SFTTrainer with PEFT, and Unsloth where it is installed.

    python -m benchmarks.gpu [--data gsm8k/train.jsonl.gz] [--model model.gguf] --json gpu.json

r = 8 on all linear layers, 8 rows a step, Alpaca text, loss on the completions; the same rows in the same order, those
of `lorafold demo` if no others are given. Every contender runs in a process of its own. Two comparisons: a packed GGUF
file beside its weights made dense, and the same model in NF4 with double quantization, as `lorafold quantize` writes
it, which all of them load (QLoRA). Within each the losses of the first step must agree, or nothing is reported. Memory
is the most that torch allocated on the GPU.

Without a GPU it ends with exit code 2. `--device cpu` is for trying the program itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.train_speed import (
    SAME_LOSS,
    STEP_ROWS,
    print_table,
    ratio,
    read_rows,
    run_lorafold,
    run_trl,
    train_trl,
    with_speed,
)

DENSE = {"loss_type": "chunked_nll", "gradient_checkpointing": False, "dense": "bfloat16"}
CONTENDERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # name -> which base, who runs it, options
    "lorafold qa-lora": ("file", "lorafold", {"method": "qa-lora"}),
    "lorafold lora": ("file", "lorafold", {"method": "lora"}),
    "trl default": ("file", "trl", {"dense": "bfloat16"}),
    "trl best": ("file", "trl", DENSE),
    "lorafold qlora": ("nf4", "lorafold", {"method": "lora"}),
    "trl qlora": ("nf4", "trl", DENSE),
    "unsloth qlora": ("nf4", "unsloth", {}),
}


def demo_rows(count: int) -> list[dict[str, str]]:
    """The first rows of the embedded data as prompt (Alpaca) and completion."""
    from lorafold.data.demo import demo_file
    from lorafold.data.templates import render_prompt

    rows = [json.loads(line) for line in demo_file("train").read_text(encoding="utf-8").splitlines()[:count]]
    asked = [render_prompt("alpaca", f"Describe {row['name']} ({row['category']}).") for row in rows]
    return [{"prompt": p, "completion": row["description"]} for p, row in zip(asked, rows, strict=True)]


def run_unsloth(rows: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
    """Train with Unsloth on the NF4 folder; returns seconds and losses per step."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(options.pop("model"), max_seq_length=2048, load_in_4bit=True)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = {"r": 8, "lora_alpha": 16, "target_modules": layers, "use_gradient_checkpointing": False}
    model = FastLanguageModel.get_peft_model(model, **adapters)
    return train_trl(rows, model, tokenizer, options)


RUNNERS = {"lorafold": run_lorafold, "trl": run_trl, "unsloth": run_unsloth}


def child(job: dict[str, Any], out: Path) -> None:
    """One contender, in its own process."""
    import torch

    base, runner, options = CONTENDERS[job["name"]]
    options = options | {"model": job["model"], "device": job["device"]}
    if runner == "lorafold":
        options["micro_batch_tokens"] = job["micro_batch_tokens"]
    elif base == "nf4" and job["device"] == "cpu":
        options["bf16"] = False  # torch's autocast does not take bitsandbytes' layers on a CPU
    result = RUNNERS[runner](job["rows"], options)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if job["device"] == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    out.write_text(json.dumps(with_speed(result | {"peak_memory_gb": peak / 1e9})))


def run_child(name: str, model: str, rows: list[dict[str, str]], args: argparse.Namespace) -> dict[str, Any]:
    """One contender in a process of its own."""
    job = {"name": name, "model": model, "rows": rows, "device": args.device}
    job["micro_batch_tokens"] = args.micro_batch_tokens
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "job.json", Path(folder) / "out.json"
        file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", str(file), "--out", str(out)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, stdout=sys.stderr, env=environment, cwd=Path(__file__).parent.parent)
        return json.loads(out.read_text())


def make_nf4(model: str, folder: Path) -> str:
    """The model in NF4, by LoraFold's own command; weights are rounded to nearest."""
    from lorafold.cli.main import run

    if run(["quantize", model, "--format", "nf4", "--use-double-quant", "-o", str(folder)]):
        sys.exit("the model could not be quantized")
    return str(folder)


def compare(results: dict[str, Any]) -> dict[str, Any]:
    """Ratios of every LoraFold contender to its peers on the same base; their first losses must agree."""
    found: dict[str, Any] = {}
    for base in ("file", "nf4"):
        group = {name: r for name, r in results.items() if CONTENDERS[name][0] == base}
        first = {name: r["losses"][0] for name, r in group.items()}
        if group and max(first.values()) - min(first.values()) > SAME_LOSS:
            sys.exit(f"the contenders do not compute the same thing: first losses {first}")
        mine = [name for name in group if name.startswith("lorafold")]
        for name, peer in itertools.product(mine, [name for name in group if name not in mine]):
            memory = group[name]["peak_memory_gb"] / group[peer]["peak_memory_gb"]
            found[f"{name} / {peer}"] = {"samples": ratio(group[name], group[peer]), "memory": memory}
    return found


def main() -> None:
    """Parse, measure, compare, report."""
    import torch

    able = [name for name, (_, runner, _) in CONTENDERS.items() if runner != "unsloth" or find("unsloth")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows with question and answer (GSM8K)")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--model", default="smollm2", help="a GGUF file with 4- or 5-bit offsets, or smollm2")
    parser.add_argument("--contenders", nargs="*", default=able, choices=able)
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="of LoraFold")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(json.loads(args.child.read_text()), args.out)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here; nothing is measured")
    if args.rows < 2 * STEP_ROWS:
        parser.error(f"--rows must be {2 * STEP_ROWS} or more: the first step is not counted")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(args.data, args.rows) if args.data else demo_rows(args.rows)
        rows = rows[: len(rows) // STEP_ROWS * STEP_ROWS]
        bases = {"file": str(Path(args.model).absolute()) if Path(args.model).exists() else args.model}
        if any(CONTENDERS[name][0] == "nf4" for name in args.contenders):
            bases["nf4"] = make_nf4(args.model, Path(folder) / "nf4")
        for name in args.contenders:
            results[name] = run_child(name, bases[CONTENDERS[name][0]], rows, args)
            print(f"{name}: {results[name]['samples_per_second']:.2f} samples/s", file=sys.stderr)
    ratios = compare(results)
    print_table(results)
    for pair, r in ratios.items():
        print(f"{pair}: {r['samples']:.2f} times the samples per second, {r['memory']:.2f} times the memory")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    if args.json:
        args.json.write_text(json.dumps({"device": device, "contenders": results, "ratios": ratios}, indent=2) + "\n")
    return None


def find(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
