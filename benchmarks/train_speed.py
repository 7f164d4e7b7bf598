"""Training speed and memory of LoraFold beside TRL's SFTTrainer with PEFT, on the same rows, in one run.

    python benchmarks/train_speed.py --data gsm8k/train.jsonl.gz --json speed.json

SmolLM2-135M-Instruct, r = 8 on all linear layers, 8 rows a step, Alpaca text, loss on the completions. Every contender
runs in a process of its own, one after the other (with `--rounds` all of them several times); its speed is that of the
steps after the first, its memory the peak resident set of the process. All take the same rows in the same order, so the
ratio of two contenders is the median of the ratios step by step, which one slow step on a shared machine does not move.
LoraFold trains on the packed Q4_1 file, TRL on the same weights made dense by transformers. The losses of the first
step must agree, or nothing is reported.

The share of the matrix-product rate is that of the necessary arithmetic: 4 operations for each adapted weight and token
computed (what rows share counted once, and of the last block what follows attention where a supervised token is
predicted), 4 for each weight of the head and supervised token; the rate is torch's best of 20 products of 2,048 x 2,048
matrices in the type that LoraFold computes in: bfloat16 where the processor multiplies it, elsewhere float32. There
TRL's best settings are in float32 too, while its defaults stay what they are; as bfloat16 is emulated there, they also
run with it turned off (everywhere, for comparison). Where the time goes is a profile of QA-LoRA's last steps.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STEP_ROWS = 8
SAME_LOSS = 0.02  # bf16 on both sides, and TRL keeps its norms and adapters in float32
PROFILED = 4  # steps
PARTS = {
    "base weights: decoding and products": ("_PackedMatmul", "_PackedMatmulBackward"),
    "gradient of the head, adapters: products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("_PackAttention", "_PackAttentionBackward"),
    "gated activation": ("_SwiGLU", "_SwiGLUBackward", "_StackedSwiGLU", "_StackedSwiGLUBackward"),
    "norms": ("_RMSNormFunction", "_RMSNormFunctionBackward"),
    "loss, logits": ("_FrozenHeadLoss", "_FrozenHeadLossBackward"),
    "sums": ("aten::add", "aten::add_"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::clone"),
    "optimizer": ("Optimizer.step#AdamW.step", "aten::_fused_adamw_"),
}
CONTENDERS = {
    "lorafold qa-lora": {"method": "qa-lora"},
    "lorafold lora": {"method": "lora"},
    "trl default": {},
    "trl default, float32": {"bf16": False},
    "trl best": {"gradient_checkpointing": False, "loss_type": "chunked_nll", "dense": "auto"},
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
    from lorafold.cli.main import share_cores

    share_cores()  # as its command line does
    import torch

    from lorafold.adapters.inject import inject
    from lorafold.adapters.targets import linear_layers
    from lorafold.config import AdapterSpec, TrainingConfig
    from lorafold.data.packs import pack
    from lorafold.data.rows import Example
    from lorafold.data.tokens import tokenize
    from lorafold.models.load import compute_dtype, load
    from lorafold.train import loop

    device = options.get("device", "cpu")
    loaded = load(options.get("model", "smollm2"), compute_dtype("auto", device), device)
    examples = [Example(i, "prompt", prompt=r["prompt"], completion=r["completion"]) for i, r in enumerate(rows)]
    tokens = tokenize(examples, loaded.tokenizer, template="raw").rows
    torch.manual_seed(0)
    injection = inject(loaded.model, AdapterSpec(method=options["method"], r=8))
    layers, head = linear_layers(loaded.model), loaded.model.get_output_embeddings()
    adapted = {name: layers[name].in_features * layers[name].out_features for name in injection.modules}
    after_attention = re.compile(rf"\.{loaded.model.config.num_hidden_layers - 1}\..*(o|gate|up|down)_proj$")
    late = sum(size for name, size in adapted.items() if after_attention.search(name))  # where it is wanted alone
    early = sum(adapted.values()) - late
    in_order = iter([list(range(i, i + STEP_ROWS)) for i in range(0, len(rows), STEP_ROWS)])
    loop.epoch_batches = lambda *_: in_order  # the peer's order, so that the first losses can be compared
    config = TrainingConfig(
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        warmup_ratio=0,
        micro_batch_tokens=options["micro_batch_tokens"],
    )
    running = loop.train_steps(loaded, tokens, config)
    profiled = min(PROFILED, len(rows) // STEP_ROWS // 2) if options.get("profile") else 0
    steps = [next(running) for _ in range(len(rows) // STEP_ROWS - profiled)]
    parts = profile(running) if options.get("profile") else {}
    wide = head.in_features * head.out_features
    batches = [tokens[i : i + STEP_ROWS] for i in range(0, len(tokens), STEP_ROWS)]
    packs = [pack(batch, 1, TrainingConfig.shared_prefix_tokens) for batch in batches]
    return {
        "seconds": [step.seconds for step in steps],
        "losses": [step.loss for step in steps],
        "operations": [
            4 * (early * len(batch.ids) + late * len(batch.wanted) + wide * step.supervised)
            for batch, step in zip(packs, steps, strict=False)
        ],
        "trainable": injection.trainable,
        "parts": parts,
    }


def profile(running: Iterator[Any]) -> dict[str, float]:
    """Seconds by part of the last steps, from the times that torch's profiler gives operations themselves."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU]) as recorded:
        list(running)
    parts: dict[str, float] = {}
    for event in recorded.key_averages():
        part = next((part for part, names in PARTS.items() if event.key in names), "everything else")
        parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def matmul_rate() -> float:
    """Operations per second of torch's matrix product, 2,048 cubed, the best of 20."""
    import torch

    from lorafold.models.load import compute_dtype

    a, b = (torch.randn(2048, 2048, dtype=compute_dtype()) for _ in range(2))
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(seconds)


def run_trl(rows: list[dict[str, str]], options: dict[str, Any]) -> dict[str, Any]:
    """Train with TRL and PEFT on the dense weights, or on those of bitsandbytes; seconds and losses per step."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    from lorafold.models.load import compute_dtype, load_tokenizer_only, resolve

    path, dense = resolve(options.pop("model", "smollm2")), options.pop("dense", "float32")
    dtype = compute_dtype() if dense == "auto" else getattr(torch, dense)
    if dense == "auto" and dtype == torch.float32:
        options["bf16"] = False
    if path.is_dir():
        device = options.get("device", "cpu")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map=device)
    else:
        decoded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        del decoded.config.quantization_config  # the trainer refuses a model that it knows came from a GGUF file
        model = AutoModelForCausalLM.from_config(decoded.config, dtype=dtype)
        model.load_state_dict(decoded.state_dict())
        del decoded
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    return train_trl(rows, model, load_tokenizer_only(path), options | {"peft_config": adapter})


def train_trl(rows: list[dict[str, str]], model: Any, tokenizer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """One pass over the rows, in their order; seconds and losses per step."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    stamps, peft_config, device = [0.0], options.pop("peft_config", None), options.pop("device", "cpu")

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
            use_cpu=device == "cpu",
            shuffle_dataset=False,
            **options,
        )
        trainer = SFTTrainer(
            model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=peft_config,
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


def child(name: str, rows_file: Path, out: Path, profile: bool, micro_batch_tokens: int | None) -> None:
    """One contender, in its own process."""
    rows, options = json.loads(rows_file.read_text()), dict(CONTENDERS[name])
    if name.startswith("lorafold"):
        options |= {"profile": profile, "micro_batch_tokens": micro_batch_tokens}
    result = run_lorafold(rows, options) if name.startswith("lorafold") else run_trl(rows, options)
    result["peak_memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    out.write_text(json.dumps(with_speed(result)))


def with_speed(result: dict[str, Any]) -> dict[str, Any]:
    """The same with samples per second, of the steps after the first, if there are any."""
    later = result["seconds"][1:] or result["seconds"]
    return result | {"samples_per_second": STEP_ROWS * len(later) / sum(later)}


def print_table(results: dict[str, Any]) -> None:
    """A line for each contender."""
    print("| contender | samples/s | peak memory | first loss | trainable |\n|---|---:|---:|---:|---:|")
    for name, r in results.items():
        print(
            f"| {name} | {r['samples_per_second']:.2f} | {r['peak_memory_gb']:.2f} GB | {r['losses'][0]:.4f} "
            f"| {r['trainable']:,} |"
        )


def ratio(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """How many times the samples per second: the median of the steps after the first."""
    pairs = zip(ours["seconds"][1:], theirs["seconds"][1:], strict=True)
    return statistics.median(slow / fast for fast, slow in pairs)


def run_child(name: str, args: argparse.Namespace, profile: bool = False) -> dict[str, Any]:
    """One contender in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        rows_file, out = Path(folder) / "rows.json", Path(folder) / "out.json"
        rows_file.write_text(json.dumps(read_rows(args.data, args.rows)))
        command = [sys.executable, __file__, "--child", name, "--rows-file", str(rows_file), "--out", str(out)]
        command += ["--profile"] if profile else []
        command += ["--micro-batch-tokens", str(args.micro_batch_tokens)] if args.micro_batch_tokens else []
        subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        return json.loads(out.read_text())


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Run the contenders in turn, so many times."""
    results: dict[str, Any] = {}
    for _, name in itertools.product(range(args.rounds), args.contenders):
        result = run_child(name, args)
        print(f"{name}: {result['samples_per_second']:.2f} samples/s", file=sys.stderr)
        results[name] = joined(results[name], result) if name in results else result
    return results


def joined(former: dict[str, Any], again: dict[str, Any]) -> dict[str, Any]:
    """The same with the steps of another round, of which the first is not counted either."""
    lists = {key: former[key] + again[key][1:] for key in ("seconds", "operations") if key in former}
    peak = max(former["peak_memory_gb"], again["peak_memory_gb"])
    return with_speed(former | lists | {"peak_memory_gb": peak})


def main() -> None:
    """Parse, measure, compare, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="rows with question and answer (GSM8K)")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=1, help="on a machine whose speed wanders")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contenders", nargs="*", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--micro-batch-tokens", type=int, help="of LoraFold; its default if not given")
    parser.add_argument("--profile", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rows-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child, args.rows_file, args.out, args.profile, args.micro_batch_tokens)
    if args.rows < 2 * STEP_ROWS or args.rows % STEP_ROWS or args.rounds < 1:
        parser.error(
            f"--rows: whole steps of {STEP_ROWS}, two or more, as the first is not counted; --rounds: 1 or more"
        )
    results = measure(args)
    first = {name: r["losses"][0] for name, r in results.items()}
    if max(first.values()) - min(first.values()) > SAME_LOSS:
        sys.exit(f"the contenders do not compute the same thing: first losses {first}")
    report: dict[str, Any] = {"contenders": results}
    print_table(results)
    mine = [name for name in results if name.startswith("lorafold")]
    rate = matmul_rate()
    report |= {"matmul_rate": rate, "peak_memory_gb": max(results[name]["peak_memory_gb"] for name in mine)}
    for name in mine:
        later = list(zip(results[name]["operations"], results[name]["seconds"], strict=True))[1:]
        share = sum(n for n, _ in later) / sum(t for _, t in later) / rate
        report[f"share_of_matmul_rate, {name}"] = share
        print(f"{name}: {share:.1%} of the matrix-product rate of {rate / 1e9:,.0f} GFLOP/s")
    for name, peer in itertools.product(mine, [name for name in results if name.startswith("trl")]):
        report[f"{name} / {peer}"] = ratio(results[name], results[peer])
        print(f"{name} / {peer}: {report[f'{name} / {peer}']:.2f} times the samples per second")
    summary = {
        "ratio_trl_default": [report[key] for key in report if key.endswith("/ trl default")],
        "ratio_trl_best": [report[key] for key in report if key.endswith("/ trl best")],
        "share_of_matmul_rate": [report[key] for key in report if key.startswith("share_of_matmul_rate")],
    }
    report |= {key: min(values, default=None) for key, values in summary.items()}  # of the slower of both methods
    if mine:
        parts = run_child(mine[0], args, profile=True)["parts"]
        report["parts"] = {part: seconds / sum(parts.values()) for part, seconds in parts.items()}
        print("\n| part of a step | share |\n|---|---:|")
        for part, share in report["parts"].items():
            print(f"| {part} | {share:.1%} |")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
