"""QA-LoRA in 4, 3 and 2 bits against LoRA and QLoRA quantized afterwards, each measured in the file that is deployed.

    python -m benchmarks.bits_methods --task gsm8k --train gsm8k/train.jsonl.gz --test gsm8k/test.jsonl.gz -o DIR
    python -m benchmarks.bits_methods --task arc --train ARC-Easy.train.jsonl.gz --test ARC-Easy.test.jsonl.gz -o DIR

`--quick` is one seed, one learning rate, 2 bits, and few rows. `--model` takes a transformers folder in 16 or 32
bits, or a GGUF file, which is decoded to float16 for the dense base; without it SmolLM2-135M-Instruct in Q4_1 is. Rows
of the table:

* LoRA on the dense base, merged, then rounded to nearest (first seed only) or quantized with GPTQ,
* QLoRA (LoRA on NF4 with double quantization), merged, then GPTQ,
* QA-LoRA on the dense base quantized with GPTQ first, folded: r = 16, all offsets, all offsets and scales,
* the first row's file with all offsets trained on the same rows once more, folded; and beside it, as that is twice the
  training, the first row with two epochs,
* all but these two by Muon instead of AdamW.

All files are MLX folders with an 8-bit embedding, in groups of 32; those of 4 bits in groups of 64, because the default
base's weights come from 4 bits in groups of 32 and would be kept by these unchanged. GPTQ is calibrated on the same
training rows in every row of the table: the first ones, or with `--draw-calibration` those that a seed draws, so that
each seed has a base of its own; `--propagate 0` is GPTQ alone. Rows with several learning rates try them with the first
seed, in the deployed file; the rate is chosen by a loss on 100 training rows (`--validation-rows`) that were not
trained on (gsm8k: of the answer, arc: of the right choice among all), the other seeds run at that rate, and the figures
are of the test rows. gsm8k: loss per token of the answers; arc: share of questions whose right answer is the likeliest
of all (mean log-likelihood per token). `--methods` picks rows of the table by number, from 0; without a number there is
the base alone. Finished parts in DIR are kept, so the command can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bits_questions import Question, read_questions
from benchmarks.bits_rows import METHODS, Method
from lorafold.adapters.targets import linear_layers
from lorafold.config import AdapterSpec, DataConfig, QuantizeConfig, RowsConfig, RunConfig, TrainingConfig
from lorafold.data.rows import Example
from lorafold.data.tokens import Tokens, tokenize
from lorafold.evals.choices import choice_losses
from lorafold.evals.loss import evaluate
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.load import LoadedModel, compute_dtype, load
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.runs.display import Display
from lorafold.runs.fold import fold_run
from lorafold.runs.folder import SUMMARY, Run, read_run
from lorafold.runs.prepare import training_rows
from lorafold.runs.quantize import quantize_model
from lorafold.runs.start import start

GROUPS = {4: 64, 3: 32, 2: 32}
LORA_RATE = 4e-3  # the best of four in docs/results/gsm8k.md; it does not depend on the bits that follow
BASE = "base, GPTQ"
TEMPLATES = {"gsm8k": "alpaca", "arc": "raw"}


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
        counts = f"{args.rows} {args.eval_rows}" + (f" {args.calibration_rows}" if args.calibration_rows != 64 else "")
        counts += f" of {args.validation_rows}" if args.validation_rows != 100 else ""
        counts += " drawn" if args.draw_calibration else ""
        counts += f" propagate {args.propagate}"
        settings = f"{args.task} {args.train.name} {args.test.name} {counts} {args.model or ''}"
        note = self.folder / "settings.txt"
        if note.exists() and note.read_text() != settings:
            raise SystemExit(f"{self.folder} holds results of {note.read_text()}, not of {settings}; choose another")
        note.write_text(settings)
        questions = read_questions(args.task, args.train, args.rows + args.validation_rows)
        self.train, self.validation = questions[: args.rows], questions[args.rows :]
        self.test = read_questions(args.task, args.test, args.eval_rows)
        self.rows = self.folder / "train.jsonl"
        pairs = [{"prompt": q.prompt, "completion": q.choices[q.right]} for q in self.train]
        self.rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def losses(self, loaded: LoadedModel, questions: list[Question]) -> tuple[float, list[float]]:
        """What a rate is chosen by, and what the table shows the mean of: a loss, or 1 for each question answered."""
        rows = [[self.tokens(loaded, q.prompt, choice) for choice in q.choices] for q in questions]
        if self.args.task == "gsm8k":
            loss = evaluate(loaded, [choices[0] for choices in rows])
            return loss, [loss]
        means = choice_losses(loaded, rows)
        right = [q.right for q in questions]
        chosen = [min(range(len(m)), key=m.__getitem__) for m in means]
        loss = statistics.mean(
            float(-torch.log_softmax(-torch.tensor(m), 0)[r]) for m, r in zip(means, right, strict=True)
        )
        return loss, [float(c == r) for c, r in zip(chosen, right, strict=True)]

    def tokens(self, loaded: LoadedModel, prompt: str, completion: str) -> Tokens:
        """One prompt with one completion."""
        example = Example(0, "prompt", prompt=prompt, completion=completion)
        return tokenize([example], loaded.tokenizer, template=TEMPLATES[self.args.task]).rows[0]

    def measured(self, key: str, make: Callable[[], tuple[Path, int]], choosing: bool = False) -> dict[str, Any]:
        """The figures of a model, which is made only if they are not there yet; a validation loss if `choosing`."""
        if key not in self.results or (choosing and self.results[key]["validation"] is None):
            path, trainable = make()
            loaded = load(path, compute_dtype())
            layers = [x for n, x in linear_layers(loaded.model).items() if n != "lm_head"]
            bits = sum(8 * x.packed.nbytes if isinstance(x, QuantLinear) else 16 * x.weight.numel() for x in layers)
            weights = sum(x.in_features * x.out_features for x in layers)
            scores = self.losses(loaded, self.test)[1]
            self.results[key] = {
                "validation": self.losses(loaded, self.validation)[0] if choosing else None,
                "test": statistics.mean(scores),
                "answered": "".join(f"{score:.0f}" for score in scores) if self.args.task == "arc" else None,
                "bits": bits / weights,
                "bytes": sum(f.stat().st_size for f in path.glob("*.safetensors")),
                "trainable": trainable,
            }
            self.file.write_text(json.dumps(self.results, indent=2) + "\n")
            self.display.say(f"{key}: {self.results[key]['test']:.4f}")
        return self.results[key]

    def made(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder of this name, made unless it is there."""
        path = self.folder / _file_name(name)
        if not (path / "config.json").exists():
            self.display.say(f"making {name}")
            make(path)
        return path

    def quantized(self, name: str, source: Path, seed: int, **options: Any) -> Path:
        """An MLX (or NF4) folder of the model at a path."""

        def make(path: Path) -> None:
            loaded = load(source)
            rows = None
            if options.get("method") == "gptq":
                options["propagate"] = self.args.propagate
                config = RowsConfig(self.rows, template=TEMPLATES[self.args.task], supervise="all")
                rows = list(training_rows(config, loaded.tokenizer).rows)
                count = min(len(rows), self.args.calibration_rows)
                rows = random.Random(seed).sample(rows, count) if self.args.draw_calibration else rows[:count]
            quantize_model(loaded, rows, QuantizeConfig(**options), path, lambda _: None)

        return self.made(name, make)

    def base(self, kind: str, bits: int, seed: int) -> Path:
        """A model that is trained."""
        model = self.args.model
        dense = model if model and model.is_dir() else self.made("dense", lambda path: write_dense(path, model))
        if kind == "nf4":
            return self.quantized("nf4", dense, seed, format="nf4")
        if kind == "quantized":
            name = f"base {bits} {seed}" if self.args.draw_calibration else f"base {bits}"
            return self.quantized(name, dense, seed, bits=bits, method="gptq", group_size=GROUPS[bits])
        return dense

    def deployed(self, method: Method, bits: int, rate: float, seed: int) -> tuple[Path, int]:
        """The file of a method, and how many parameters were trained."""
        base, spec = self.base(method.base, bits, seed), method.spec
        how = ("" if method.epochs == 1 else f" {method.epochs}") + ("" if method.optim == "adamw" else " muon")
        name = f"run {base.name} {spec.r} {spec.adapt} {rate} {seed}{how}"
        finished = self.trained(base, name, spec, rate, seed, num_train_epochs=method.epochs, optim=method.optim)
        to = None if method.after is None else "f16"
        path = self.made(f"folded {finished.path.name}", lambda path: fold_run(finished, path, to, lossy=True))
        if method.after is not None:
            merged, options = path, {"bits": bits, "method": method.after, "group_size": GROUPS[bits]}
            path = self.quantized(f"after {finished.path.name} {bits} {method.after}", merged, seed, **options)
        if method.then is None:
            return path, finished.summary["trainable_parameters"]
        last = self.trained(path, f"then {path.name}", *method.then, seed)
        path = self.made(f"folded {last.path.name}", lambda path: fold_run(last, path, lossy=True))
        return path, last.summary["trainable_parameters"]

    def trained(self, base: Path, name: str, spec: AdapterSpec, rate: float, seed: int, **options: Any) -> Run:
        """The run of this name, made unless it is there."""
        run = self.folder / _file_name(name)
        if not (run / SUMMARY).exists():
            shutil.rmtree(run, ignore_errors=True)
            data = DataConfig(self.rows, eval_data=self.rows, eval_limit=8, template=TEMPLATES[self.args.task])
            training = TrainingConfig(learning_rate=rate, sample_rows=0, seed=seed, **options)
            start(RunConfig(str(base), run, data, spec, training), self.display)
        return read_run(run)

    def fill(self) -> None:
        """The first seed with all rates, then the others; what a file weighs is remembered, the file is not."""
        self.measured("dense", lambda: (self.base("dense", 0, 0), 0))
        for seed in self.args.seeds:
            for bits in self.args.bits:
                make_base = functools.partial(self.base, "quantized", bits, seed)
                self.measured(self.base_key(bits, seed), lambda make=make_base: (make(), 0))
                for name in self.methods:
                    method = METHODS[name]
                    first = seed == self.args.seeds[0]
                    if method.after == "rtn" and not first:
                        continue  # once shows what it loses
                    for rate in self.rates(name) if first else [self.rate(name, bits)]:
                        key = f"{name} | {bits} | {rate} | {seed}"
                        make = functools.partial(self.deployed, method, bits, rate, seed)
                        self.measured(key, make, choosing=first and len(self.rates(name)) > 1)
                        for path in (*self.folder.glob("folded-run-base*"), *self.folder.glob("folded-then*")):
                            shutil.rmtree(path)
                for path in (*self.folder.glob("after-*"), *self.folder.glob("then-*")):
                    shutil.rmtree(path)  # a merged model is quantized once for all that need it
            for path in self.folder.glob("folded-*"):
                shutil.rmtree(path)

    @property
    def methods(self) -> list[str]:
        """Rows of the table."""
        return [name for i, name in enumerate(METHODS) if i in self.args.methods]

    def base_key(self, bits: int, seed: int) -> str:
        """Under which the base that a seed trains is found among the results."""
        return f"{BASE} | {bits} | {seed}" if self.args.draw_calibration else f"{BASE} | {bits}"

    def rates(self, name: str) -> tuple[float, ...]:
        """The learning rates that a row of the table tries."""
        if self.args.learning_rates:
            return tuple(self.args.learning_rates)
        return (METHODS[name].rates or tuple(self.args.lora_rates))[: self.args.rates]

    def rate(self, name: str, bits: int) -> float:
        """The learning rate of the smallest validation loss with the first seed."""
        tried = self.rates(name)
        if len(tried) == 1:
            return tried[0]
        return min(tried, key=lambda r: self.results[f"{name} | {bits} | {r} | {self.args.seeds[0]}"]["validation"])

    def scores(self, name: str, bits: int) -> list[float]:
        """Test figures of the seeds at the rate that was chosen."""
        keys = [f"{name} | {bits} | {self.rate(name, bits)} | {seed}" for seed in self.args.seeds]
        return [self.results[key]["test"] for key in keys if key in self.results]

    def markdown(self) -> str:
        """Mean and spread over the seeds, and the best of both sides compared seed by seed."""
        columns = self.args.bits
        bases = {
            b: [self.results[key] for key in dict.fromkeys(self.base_key(b, s) for s in self.args.seeds)]
            for b in columns
        }
        lines = [
            "| model in the file | " + " | ".join(f"{bits} bits" for bits in columns) + " |",
            "|---|" + "---:|" * len(columns),
            f"| {BASE}, not trained | "
            + " | ".join(_mean([base["test"] for base in bases[b]]) for b in columns)
            + " |",
        ]
        for name in self.methods:
            cells = [f"{_mean(self.scores(name, b))} ({self.rate(name, b):g})" for b in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        ours = [name for name in self.methods if METHODS[name].after is None or METHODS[name].then]
        others = [name for name in self.methods if METHODS[name].after == "gptq" and not METHODS[name].then]
        if ours and others:
            best = [self._best(names) for names in (ours, others)]
            cells = [
                _mean([x - y for x, y in zip(self.scores(best[0][b], b), self.scores(best[1][b], b), strict=True)], "+")
                for b in columns
            ]
            title = "best QA-LoRA minus best quantized afterwards, both chosen by these figures"
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
            if self.args.task == "arc":
                cells = [f"{self._error(best[0][b], best[1][b], b):.4f}" for b in columns]
                lines.append("| standard error of this, by the questions | " + " | ".join(cells) + " |")
        sizes = [bases[b][0] for b in columns]
        lines.append("| bits per weight | " + " | ".join(f"{s['bits']:.2f}" for s in sizes) + " |")
        lines.append("| file | " + " | ".join(f"{s['bytes'] / 1e6:.1f} MB" for s in sizes) + " |")
        for name in self.methods:
            keys = [f"{name} | {b} | {self.rate(name, b)} | {self.args.seeds[0]}" for b in columns]
            cells = [f"{self.results[key]['trainable'] / 1e6:.2f} M" for key in keys]
            lines.append(f"| trainable: {name} | " + " | ".join(cells) + " |")
        return "\n".join(lines) + f"\n\nIn 16 bits, not trained: {self.results['dense']['test']:.4f}"

    def _error(self, one: str, other: str, bits: int) -> float:
        """Standard error of the difference of two methods, as questions are a sample: of means over the seeds."""
        answered = [
            [self.results[f"{name} | {bits} | {self.rate(name, bits)} | {s}"]["answered"] for s in self.args.seeds]
            for name in (one, other)
        ]
        ours, theirs = ([statistics.mean(map(int, seeds)) for seeds in zip(*a, strict=True)] for a in answered)
        return statistics.stdev([x - y for x, y in zip(ours, theirs, strict=True)]) / len(ours) ** 0.5

    def _best(self, names: list[str]) -> dict[int, str]:
        """For each number of bits the method of the smallest mean loss, or of the highest mean accuracy."""
        sign = -1 if self.args.task == "arc" else 1
        return {b: min(names, key=lambda n, b=b: sign * statistics.mean(self.scores(n, b))) for b in self.args.bits}


def _mean(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


@torch.no_grad()
def write_dense(path: Path, model: Path | None = None) -> None:
    """A quantized model (the embedded one), decoded to a float16 folder."""
    loaded = load(str(model or "smollm2"), torch.float32)
    for name, layer in linear_layers(loaded.model).items():
        if not isinstance(layer, QuantLinear):
            continue
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
    parser.add_argument("--model", type=Path, help="a transformers folder in 16 or 32 bits, or a GGUF file")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--validation-rows", type=int, default=100, help="that rates are chosen by")
    parser.add_argument("--calibration-rows", type=int, default=64, help="of the training rows, for GPTQ")
    parser.add_argument("--draw-calibration", action="store_true", help="each seed draws its own calibration rows")
    parser.add_argument("--propagate", type=float, help="of `lorafold quantize`")
    numbers = range(len(METHODS))
    parser.add_argument(
        "--methods", type=int, nargs="*", choices=numbers, help="rows, from 0; all, or 0 to 5 if --quick"
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], choices=[2, 3, 4])
    parser.add_argument("--rates", type=int, default=2, help="how many learning rates each row tries, at most 2")
    parser.add_argument("--learning-rates", type=float, nargs="*", help="for every row, instead of its own")
    parser.add_argument("--lora-rates", type=float, nargs="*", default=[LORA_RATE])
    parser.add_argument(
        "--quick", action="store_true", help="one seed and rate, 2 bits, 64 rows to train, 40 to test, 24 to calibrate"
    )
    args = parser.parse_args()
    if args.quick:
        args.rows, args.eval_rows, args.calibration_rows = 64, 40, 24
        args.seeds, args.bits, args.rates = args.seeds[:1], [2], 1
    if args.methods is None:
        args.methods = [*numbers][:6] if args.quick else [*numbers]
    table = Table(args)
    table.fill()
    print(table.markdown())


if __name__ == "__main__":
    main()
