"""What a training step costs: tokens per second and peak memory by row length, rows a step, rank and model size.

    python -m benchmarks.cost -o docs/results [--memory 4GB] [--only "model size"]

QA-LoRA on all linear layers of llama-shaped models with random Q4_1 weights and SmolLM2's tokenizer; rows of random
tokens, all of them supervised but the first. Every measurement is a process of its own: one step to warm up, then the
median of three. Prints tables, and writes cost.svg.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

STEPS = 4


@dataclass(frozen=True)
class Case:
    """One measurement: the model's shape, and the rows of a step."""

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    inner: int = 1536
    row_tokens: int = 256
    rows: int = 8
    r: int = 8
    memory: str | None = None

    @property
    def parameters(self) -> float:
        """Weights of the linear layers, in millions."""
        width = self.hidden // self.heads
        attention = self.hidden * width * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) / 1e6


DEFAULT = Case()
SHAPES = [(576, 30, 9, 3, 1536), (960, 32, 15, 5, 2560), (1536, 28, 12, 2, 6144), (2048, 22, 32, 4, 5632)]
SERIES = {
    "row length": [replace(DEFAULT, row_tokens=n, rows=4096 // n) for n in (128, 256, 512, 1024, 2048, 4096)],
    "rows a step": [replace(DEFAULT, rows=n) for n in (1, 2, 4, 8, 16, 32)],
    "rank": [replace(DEFAULT, r=n) for n in (2, 8, 32, 128)],
    "model size": [Case(*shape, rows=4) for shape in SHAPES],
}
AXES = {
    "row length": lambda case: case.row_tokens,
    "rows a step": lambda case: case.rows,
    "rank": lambda case: case.r,
    "model size": lambda case: round(case.parameters),
}


def write_model(path: Path, case: Case) -> None:
    """A GGUF file of this shape, with random codes and scales that give weights of about 0.02."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

    from lorafold.models.gguf_file import GGUFFile
    from lorafold.models.load import resolve

    metadata = dict(GGUFFile(resolve("smollm2")).metadata)
    vocabulary = len(metadata["tokenizer.ggml.tokens"])
    metadata |= {
        "llama.block_count": case.layers,
        "llama.embedding_length": case.hidden,
        "llama.feed_forward_length": case.inner,
        "llama.attention.head_count": case.heads,
        "llama.attention.head_count_kv": case.kv_heads,
        "llama.rope.dimension_count": case.hidden // case.heads,
    }
    writer = GGUFWriter(path, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if not key.startswith("GGUF."):
            kind = GGUFValueType.get_type(value)
            writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
    random = np.random.default_rng(0)

    def add(name: str, rows: int, columns: int) -> None:
        blocks = random.integers(0, 256, (rows, columns // 32, 20), np.uint8)
        blocks[..., :4] = np.array([0.004, -0.03], np.float16).view(np.uint8)
        writer.add_tensor(name, blocks.reshape(rows, -1), raw_dtype=GGMLQuantizationType.Q4_1)

    width = case.hidden // case.heads
    add("token_embd.weight", vocabulary, case.hidden)
    writer.add_tensor("output_norm.weight", np.ones(case.hidden, np.float32))
    for i in range(case.layers):
        for name, rows, columns in (
            ("attn_q", case.hidden, case.hidden),
            ("attn_k", case.kv_heads * width, case.hidden),
            ("attn_v", case.kv_heads * width, case.hidden),
            ("attn_output", case.hidden, case.hidden),
            ("ffn_gate", case.inner, case.hidden),
            ("ffn_up", case.inner, case.hidden),
            ("ffn_down", case.hidden, case.inner),
        ):
            add(f"blk.{i}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(case.hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(case: Case, model: Path) -> dict[str, Any]:
    """Train; tokens per second of the later steps, and the peak resident set of the process."""
    import torch

    from lorafold.adapters.inject import inject
    from lorafold.config import AdapterSpec, TrainingConfig
    from lorafold.data.tokens import Tokens
    from lorafold.models.load import compute_dtype, load
    from lorafold.train.loop import plan_step, train_steps

    loaded = load(model, compute_dtype())
    torch.manual_seed(0)
    inject(loaded.model, AdapterSpec("qa-lora", case.r))
    supervised = [False] + [True] * (case.row_tokens - 1)
    rows = [Tokens(torch.randint(100, 40_000, (case.row_tokens,)).tolist(), supervised, i) for i in range(case.rows)]
    config = TrainingConfig(case.rows, learning_rate=1e-4, max_steps=STEPS, memory=case.memory)
    plan = plan_step(loaded, rows, config)
    steps = list(train_steps(loaded, rows, config, plan))
    seconds = statistics.median(step.seconds for step in steps[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"tokens_per_second": steps[0].tokens / seconds, "peak_gb": peak, "plan": plan.describe()}


def measured(case: Case) -> dict[str, Any]:
    """`run` in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        write_model(model, case)
        command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--model", str(model)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all series, write the table and the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--memory", help="as of `lorafold train`, for all")
    parser.add_argument("--only", choices=list(SERIES))
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run(Case(**json.loads(args.case)), args.model)))
        return
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    lines: list[str] = []
    for name, cases in SERIES.items():
        if args.only in (None, name):
            unit = ", millions of weights in linear layers" if name == "model size" else ""
            lines += [f"| {name}{unit} | tokens/s | peak memory |", "|---:|---:|---:|"]
            for case in cases:
                result = measured(replace(case, memory=args.memory))
                found.setdefault(name, []).append((AXES[name](case), result))
                lines.append(f"| {AXES[name](case)} | {result['tokens_per_second']:.0f} | {result['peak_gb']:.2f} GB |")
                print(lines[-1], result["plan"], file=sys.stderr, flush=True)
            lines.append("")
    print("\n".join(lines))
    if args.output:
        plot(found, args.output / "cost.svg")


def plot(found: dict[str, list[tuple[float, dict[str, Any]]]], path: Path) -> None:
    """Tokens per second over each axis."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "lorafold"
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 2.8), squeeze=False)
    for axis, (name, points) in zip(axes[0], found.items(), strict=True):
        axis.plot([x for x, _ in points], [r["tokens_per_second"] for _, r in points], "o-")
        axis.set(xscale="log", xlabel=name, ylabel="tokens/s", ylim=(0, None))
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
