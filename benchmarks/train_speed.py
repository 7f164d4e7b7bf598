"""Training speed and memory of LoraFold beside TRL's SFTTrainer with PEFT, on the same rows, in one run.

    python benchmarks/train_speed.py --data gsm8k/train.jsonl.gz --json speed.json

SmolLM2-135M-Instruct, r = 8 on all linear layers, 8 rows a step, Alpaca text, loss on the completions. Every contender
runs in a process of its own, one after the other; its speed is that of the steps after the first, its memory the
peak resident set of the process. All take the same rows in the same order, so the ratio of two contenders is the
median of the ratios step by step, which one slow step on a shared machine does not move. LoraFold trains on the
packed Q4_1 file, TRL on the same weights made dense by transformers. The losses of the first step must agree, or
nothing is reported.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STEP_ROWS = 8
SAME_LOSS = 0.02  # bf16 on both sides, and TRL keeps its norms and adapters in float32
CONTENDERS = {
    "lorafold qa-lora": {"method": "qa-lora"},
    "lorafold lora": {"method": "lora"},
    "trl default": {},
    "trl best": {"gradient_checkpointing": False, "loss_type": "chunked_nll", "dense": "bfloat16"},
}


def read_rows(path: Path, count: int) -> list[dict[str, str]]:
    """The first rows as prompt (Alpaca) and completion."""
    from lorafold.data.templates import render_prompt

    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for _, line in zip(range(count), file, strict=False)]
    return [{"prompt": render_prompt("alpaca", row["question"]), "completion": row["answer"]} for row in rows]


def run_lorafold(rows: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
    """Train with LoraFold; returns seconds and losses per step."""
    import torch

    from lorafold.adapters.inject import inject
    from lorafold.config import AdapterSpec, TrainingConfig
    from lorafold.data.rows import Example
    from lorafold.data.tokens import tokenize
    from lorafold.models.load import compute_dtype, load
    from lorafold.train import loop

    loaded = load("smollm2", compute_dtype())
    examples = [Example(i, "prompt", prompt=r["prompt"], completion=r["completion"]) for i, r in enumerate(rows)]
    tokens = tokenize(examples, loaded.tokenizer, template="raw").rows
    torch.manual_seed(0)
    trainable = inject(loaded.model, AdapterSpec(method=options["method"], r=8)).trainable
    in_order = iter([list(range(i, i + STEP_ROWS)) for i in range(0, len(rows), STEP_ROWS)])
    loop.epoch_batches = lambda *_: in_order  # the peer's order, so that the first losses can be compared
    config = TrainingConfig(learning_rate=1e-4, lr_scheduler_type="constant", warmup_ratio=0)
    steps = list(loop.train_steps(loaded, tokens, config))
    return {
        "seconds": [step.seconds for step in steps],
        "losses": [step.loss for step in steps],
        "tokens": sum(step.tokens for step in steps),
        "trainable": trainable,
    }


def run_trl(rows: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL and PEFT on the dense weights; returns seconds and losses per step."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from lorafold.models.load import load_tokenizer_only, resolve

    path = resolve("smollm2")
    dtype = getattr(torch, options.pop("dense", "float32"))
    decoded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    del decoded.config.quantization_config  # the trainer refuses a model that it knows came from a GGUF file
    model = AutoModelForCausalLM.from_config(decoded.config, dtype=dtype)
    model.load_state_dict(decoded.state_dict())
    del decoded
    stamps = [0.0]

    class Clock(TrainerCallback):
        """Notes when steps begin and end."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            stamps[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            stamps.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            folder,
            per_device_train_batch_size=STEP_ROWS,
            num_train_epochs=1,
            learning_rate=1e-4,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            shuffle_dataset=False,
            **options,
        )
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer_only(path),
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[Clock()],
        )
        trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {
        "seconds": [b - a for a, b in itertools.pairwise(stamps)],
        "losses": losses,
        "trainable": trainable,
    }


def child(name: str, rows_file: Path, out: Path) -> None:
    """One contender, in its own process."""
    rows, options = json.loads(rows_file.read_text()), dict(CONTENDERS[name])
    result = run_lorafold(rows, options) if name.startswith("lorafold") else run_trl(rows, options)
    later = result["seconds"][1:]
    result["samples_per_second"] = STEP_ROWS * len(later) / sum(later)
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    out.write_text(json.dumps(result))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders in turn."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        rows_file = Path(folder) / "rows.json"
        rows_file.write_text(json.dumps(read_rows(args.data, args.rows)))
        for name in args.contenders:
            out = Path(folder) / "out.json"
            command = [sys.executable, __file__, "--child", name, "--rows-file", str(rows_file), "--out", str(out)]
            subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            results[name] = json.loads(out.read_text())
            print(f"{name}: {results[name]['samples_per_second']:.2f} samples/s", file=sys.stderr)
    return results


def main() -> None:
    """Parse, measure, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows with question and answer (GSM8K)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.rows_file, args.out)
    results = measure(args)
    first = {name: r["losses"][0] for name, r in results.items()}
    if max(first.values()) - min(first.values()) > SAME_LOSS:
        sys.exit(f"the contenders do not compute the same thing: first losses {first}")
    report: dict[str, Any] = {"contenders": results}
    print("| contender | samples/s | peak memory | first loss | trainable |\n|---|---:|---:|---:|---:|")
    for name, r in results.items():
        print(
            f"| {name} | {r['samples_per_second']:.2f} | {r['peak_memory_gb']:.2f} GB | {r['losses'][0]:.4f} "
            f"| {r['trainable']:,} |"
        )
    mine = [name for name in results if name.startswith("lorafold")]
    for name, peer in itertools.product(mine, [name for name in results if name.startswith("trl")]):
        pairs = zip(results[name]["seconds"][1:], results[peer]["seconds"][1:], strict=True)
        ratio = statistics.median(theirs / ours for ours, theirs in pairs)
        report[f"{name} / {peer}"] = ratio
        print(f"{name} / {peer}: {ratio:.2f} times the samples per second")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
