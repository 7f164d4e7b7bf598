"""QA-LoRA in 4, 3 and 2 bits against LoRA and QLoRA quantized afterwards, each measured in the file that is deployed.

    python benchmarks/bits_methods.py --task gsm8k --train gsm8k/train.jsonl.gz --test gsm8k/test.jsonl.gz -o DIR
    python benchmarks/bits_methods.py --task arc --train ARC-Easy.train.jsonl.gz --test ARC-Easy.test.jsonl.gz -o DIR

`--quick` is one seed and few rows.

SmolLM2-135M-Instruct, decoded from Q4_1 to float16, is the dense base. Rows of the table:

* LoRA on the dense base, merged, then rounded to nearest or quantized with GPTQ,
* QLoRA (LoRA on NF4 with double quantization), merged, then GPTQ,
* QA-LoRA on the dense base quantized with GPTQ first, folded: r = 16, all offsets, all offsets and scales.

All files are MLX folders with an 8-bit embedding, in groups of 32; those of 4 bits in groups of 64, because the base's
weights come from 4 bits in groups of 32 and would be kept by these unchanged. Learning rates are those of
docs/results/gsm8k.md, not searched again for fewer bits or the other task. GPTQ is calibrated on the same training rows
in every row of the table. gsm8k: loss per token of the answers; arc: share of questions whose right answer is the
likeliest of four (mean log-likelihood per token). Finished parts in DIR are kept, so the command can be stopped and
repeated.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorafold.adapters.inject import linear_layers
from lorafold.config import AdapterSpec, DataConfig, QuantizeConfig, RowsConfig, RunConfig, TrainingConfig
from lorafold.data.rows import Example
from lorafold.data.tokens import Tokens, tokenize
from lorafold.evals.choices import choice_accuracy
from lorafold.evals.loss import evaluate
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.load import LoadedModel, compute_dtype, load
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.runs.display import Display
from lorafold.runs.fold import fold_run
from lorafold.runs.folder import SUMMARY, read_run
from lorafold.runs.prepare import all_rows
from lorafold.runs.quantize import quantize_model
from lorafold.runs.start import start

GROUPS = {4: 64, 3: 32, 2: 32}
CALIBRATION_ROWS = 64
LORA = (AdapterSpec("lora", 8), 4e-3)
QA_LORA = {
    "QA-LoRA r=16": (AdapterSpec("qa-lora", 16), 8e-3),
    "QA-LoRA full": (AdapterSpec("qa-lora", "full"), 1e-3),
    "QA-LoRA full, offsets and scales": (AdapterSpec("qa-lora", "full", adapt="both"), 1e-3),
}
TEMPLATES = {"gsm8k": "alpaca", "arc": "raw"}


@dataclass(frozen=True)
class Question:
    """One row of either task: what is asked, what can be answered, and which of these is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int = 0


def read_questions(task: str, path: Path, count: int) -> list[Question]:
    """The first rows of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    if task == "gsm8k":
        return [Question(row["question"], (row["answer"],)) for row in rows]
    questions = []
    for row in rows:
        text, _, rest = (
            row["instruction"].removeprefix("Please choose the correct answer to the question: ").partition("\n\n")
        )
        choices = re.split(r"\s*Answer\d+: ", rest.partition("\n\nAnswer format")[0])[1:]
        right = int(row["answer"].removeprefix("answer")) - 1
        questions.append(Question(f"Question: {text}\nAnswer:", tuple(f" {c.strip()}" for c in choices), right))
    return questions


def _file_name(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name)


class Table:
    """The runs of one task, one after the other, with what is finished kept in a folder."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.display = args, Display()
        self.folder: Path = args.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "results.json"
        self.results: dict[str, dict[str, Any]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        settings = f"{args.task} {args.train.name} {args.test.name} {args.rows} {args.eval_rows}"
        note = self.folder / "settings.txt"
        if note.exists() and note.read_text() != settings:
            raise SystemExit(f"{self.folder} holds results of {note.read_text()}, not of {settings}; choose another")
        note.write_text(settings)
        self.train = read_questions(args.task, args.train, args.rows)
        self.test = read_questions(args.task, args.test, args.eval_rows)
        self.rows = self.folder / "train.jsonl"
        pairs = [{"prompt": q.prompt, "completion": q.choices[q.right]} for q in self.train]
        self.rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def score(self, loaded: LoadedModel) -> float:
        """Loss (gsm8k) or accuracy (arc) on the test rows."""
        rows = [[self.tokens(loaded, q.prompt, choice) for choice in q.choices] for q in self.test]
        if self.args.task == "gsm8k":
            return evaluate(loaded, [choices[0] for choices in rows])
        return choice_accuracy(loaded, rows, [q.right for q in self.test])

    def tokens(self, loaded: LoadedModel, prompt: str, completion: str) -> Tokens:
        """One prompt with one completion."""
        example = Example(0, "prompt", prompt=prompt, completion=completion)
        return tokenize([example], loaded.tokenizer, template=TEMPLATES[self.args.task]).rows[0]

    def measure(self, name: str, path: Path, trainable: int = 0) -> None:
        """Score the model that lies at a path, once."""
        if name not in self.results:
            loaded = load(path, compute_dtype())
            layers = [x for n, x in linear_layers(loaded.model).items() if n != "lm_head"]
            size = sum(f.stat().st_size for f in path.glob("*.safetensors"))
            bits = sum(8 * x.packed.nbytes if isinstance(x, QuantLinear) else 16 * x.weight.numel() for x in layers)
            weights = sum(x.in_features * x.out_features for x in layers)
            self.results[name] = {
                "score": self.score(loaded),
                "bits": bits / weights,
                "bytes": size,
                "trainable": trainable,
            }
            self.file.write_text(json.dumps(self.results, indent=2) + "\n")
            self.display.say(f"{name}: {self.results[name]['score']:.4f}")

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name, made unless it is there."""
        path = self.folder / _file_name(name)
        if not (path / "config.json").exists():
            self.display.say(f"making {name}")
            make(path)
        return path

    def quantized(self, name: str, source: Path, **options: Any) -> Path:
        """An MLX (or NF4) folder of the model at a path."""

        def make(path: Path) -> None:
            loaded = load(source)
            rows = None
            if options.get("method") == "gptq":
                config = RowsConfig(self.rows, template=TEMPLATES[self.args.task], supervise="all")
                rows = all_rows(config, loaded.tokenizer).rows[:CALIBRATION_ROWS]
            quantize_model(loaded, rows, QuantizeConfig(**options), path, lambda _: None)

        return self.made(name, make)

    def trained(self, name: str, base: Path, spec: AdapterSpec, rate: float, seed: int) -> tuple[Path, int]:
        """The folded (or merged) model of a run, and its trainable parameters."""
        run = self.folder / f"run-{_file_name(name)}"
        if not (run / SUMMARY).exists():
            shutil.rmtree(run, ignore_errors=True)
            data = DataConfig(self.rows, eval_data=self.rows, eval_limit=8, template=TEMPLATES[self.args.task])
            training = TrainingConfig(learning_rate=rate, sample_rows=0, seed=seed)
            start(RunConfig(str(base), run, data, spec, training), self.display)
        finished = read_run(run)
        to = "f16" if spec.method == "lora" else None
        folded = self.made(f"{name} folded", lambda path: fold_run(finished, path, to, lossy=True))
        return folded, finished.summary["trainable_parameters"]

    def fill(self) -> None:
        """Everything, the cheapest comparisons first."""
        dense = self.made("dense", write_dense)
        self.measure("base", dense)
        nf4 = self.quantized("nf4", dense, format="nf4")
        for seed in self.args.seeds:
            bases = {"LoRA": dense, "QLoRA": nf4}
            merged = {name: self.trained(f"{name} {seed}", base, *LORA, seed) for name, base in bases.items()}
            for name, (path, trainable) in merged.items():
                self.measure(f"{name}, 16 bits | {seed}", path, trainable)
            for bits in self.args.bits:
                for name, (path, trainable) in merged.items():
                    for method in ("rtn", "gptq") if name == "LoRA" else ("gptq",):
                        label = f"{name}, then {'GPTQ' if method == 'gptq' else 'nearest'}, {bits} bits | {seed}"
                        if label not in self.results:
                            made = self.quantized(
                                f"after {label}", path, bits=bits, method=method, group_size=GROUPS[bits]
                            )
                            self.measure(label, made, trainable)
                            shutil.rmtree(made)
                base = self.quantized(f"base {bits}", dense, bits=bits, method="gptq", group_size=GROUPS[bits])
                self.measure(f"GPTQ, {bits} bits", base)
                for name, (spec, rate) in QA_LORA.items():
                    label = f"{name}, {bits} bits | {seed}"
                    if label not in self.results:
                        path, trainable = self.trained(f"{name} {bits} {seed}", base, spec, rate, seed)
                        self.measure(label, path, trainable)
                        shutil.rmtree(path)

    def markdown(self) -> str:
        """Mean and spread over the seeds."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for name, result in self.results.items():
            groups.setdefault(name.partition(" | ")[0], []).append(result)
        measure = "loss" if self.args.task == "gsm8k" else "accuracy"
        lines = [
            f"| model in the file | {measure} | bits per weight | file | trainable |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, results in groups.items():
            scores = [r["score"] for r in results]
            spread = f" ± {statistics.stdev(scores):.4f}" if len(scores) > 1 else ""
            lines.append(
                f"| {name} | {statistics.mean(scores):.4f}{spread} | {results[0]['bits']:.2f} "
                f"| {results[0]['bytes'] / 1e6:.1f} MB | {results[0]['trainable']:,} |"
            )
        return "\n".join(lines)


@torch.no_grad()
def write_dense(path: Path) -> None:
    """The embedded model, decoded to a float16 folder."""
    loaded = load("smollm2", torch.float32)
    for name, layer in linear_layers(loaded.model).items():
        assert isinstance(layer, QuantLinear)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
        plain.weight = nn.Parameter(layer.packed.decode(), requires_grad=False)
        loaded.model.set_submodule(name, plain)
    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    embedding.weight = nn.Parameter(embedding.packed.decode(), requires_grad=False)
    create_bnb(path, loaded.model, loaded.tokenizer, {}, torch.float16)


def main() -> None:
    """Fill the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TEMPLATES), required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], choices=[2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="one seed, 3 and 2 bits, 120 training and 60 test rows")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.eval_rows, args.seeds, args.bits = 120, 60, args.seeds[:1], [3, 2]
    table = Table(args)
    table.fill()
    print(table.markdown())


if __name__ == "__main__":
    main()
