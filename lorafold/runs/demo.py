"""The whole story on the embedded model and data: tune, fold, verify, and ask base and tuned file the same thing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from lorafold.config import AdapterSpec, DataConfig, RunConfig, TrainingConfig
from lorafold.data.demo import DEMO_COMPLETION, DEMO_PROMPT, demo_file
from lorafold.data.tokens import prompt_ids
from lorafold.evals import llama_cpp
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.models.load import EMBEDDED, load_tokenizer_only, resolve
from lorafold.runs.display import Display
from lorafold.runs.fold import fold_run
from lorafold.runs.folder import REPORT, Run
from lorafold.runs.gain import Gain, measure_gain
from lorafold.runs.prepare import held_out_examples, held_out_rows
from lorafold.runs.report import Report, Table, write_report
from lorafold.runs.start import prompt_text, reference_text, start
from lorafold.runs.verify import Check, check_table, verify_file, verify_runtime

_ASKED = 3  # held-out prompts that are put to llama.cpp
_ANSWER_TOKENS = 128


def run_demo(folder: Path, display: Display) -> bool:
    """Run the demo into a folder that does not exist yet; returns whether every check of the proof passed.

    Raises:
        OutputError: the folder holds something already.
        FormatError: the embedded model is not installed.
    """
    began = time.perf_counter()
    config = demo_config(folder / "qa-lora")
    display.say(f"\n1/5  QA-LoRA on {resolve(EMBEDDED).name}")
    run = start(config, display)
    display.say("\n2/5  fold: write the update into the file's own offsets")
    tuned = folder / "tuned.gguf"
    folded = fold_run(run, tuned)
    display.say(f"{tuned}: {folded.describe()}")
    display.say("\n3/5  verify: is the file exactly what was trained?")
    checks = _verify(tuned, run, display)
    display.say(check_table(checks))
    display.say("\n4/5  the same prompts, base file and tuned file")
    samples = _ask(resolve(EMBEDDED), tuned, run, display)
    for part, text in samples[0].items():
        display.say(f"\n{part}:\n{text}")
    display.say("\n5/5  control: what others do, a plain LoRA merged and quantized again")
    control, merged = _control(folder, display)
    tables = [
        Table(
            "Is the file what was trained?",
            ("check", "result", "figures"),
            [_row(c) for c in checks],
            folded.describe(),
        ),
        _comparison(run, control, merged),
    ]
    report = Report("LoraFold demo: a tuned GGUF, before and after", tables, samples)
    path = write_report(run, report, folder / REPORT)
    before, after = run.summary["eval_loss_before"], run.summary["eval_loss_after"]
    display.say(
        f"\nQA-LoRA, folded: held-out loss {before:.3f} -> {after:.3f}, all of it in {tuned}\n"
        f"LoRA, merged and quantized again: {merged.describe()}\n"
        f"report: {path}\ntook {time.perf_counter() - began:.0f} s"
    )
    return not any(check.passed is False for check in checks)


def demo_config(folder: Path) -> RunConfig:
    """The demo's training run."""
    return RunConfig(
        model=EMBEDDED,
        output_dir=folder,
        data=DataConfig(
            data=demo_file("train"), eval_data=demo_file("held_out"), prompt=DEMO_PROMPT, completion=DEMO_COMPLETION
        ),
        adapter=AdapterSpec(method="qa-lora", r=16),
        training=TrainingConfig(num_train_epochs=1.5, sample_rows=1),
    )


def _verify(tuned: Path, run: Run, display: Display) -> list[Check]:
    checks = verify_file(tuned, run)
    if not llama_cpp.available():
        return [*checks, Check("llama.cpp", None, "not installed: pip install 'lorafold[llama-cpp]'")]
    rows = held_out_rows(run, load_tokenizer_only(tuned)).rows
    return checks + verify_runtime(tuned, run, rows, display).checks()


def _ask(base: Path, tuned: Path, run: Run, display: Display) -> list[dict[str, str]]:
    """Held-out prompts with the answers of base and tuned file, from llama.cpp where it is installed."""
    if not llama_cpp.available():
        return [
            {"prompt": s["prompt"], "base file": s["before"], "tuned file": s["after"], "reference": s["reference"]}
            for s in run.samples
        ]
    examples = held_out_examples(run)[:_ASKED]
    tokenizer = load_tokenizer_only(base)
    prompts = [prompt_ids(example, tokenizer, run.config.data.template) for example in examples]
    answers = []
    for path in (base, tuned):
        with display.bar(f"llama.cpp: {path.name}", len(prompts)) as done, LlamaCpp(path) as engine:
            texts = []
            for ids in prompts:
                out = engine.generate(ids, _ANSWER_TOKENS)
                texts.append(str(tokenizer.decode(out, skip_special_tokens=True)).strip())
                done()
            answers.append(texts)
    return [
        {"prompt": prompt_text(e), "base file": b, "tuned file": t, "reference": reference_text(e)}
        for e, b, t in zip(examples, *answers, strict=True)
    ]


def _control(folder: Path, display: Display) -> tuple[Run, Gain]:
    config = demo_config(folder / "lora")
    spec = AdapterSpec(method="lora", r=8)
    training = replace(config.training, num_train_epochs=0.5, sample_rows=0)  # enough to show it
    run = start(replace(config, adapter=spec, training=training), display)
    path = folder / "lora-requantized.gguf"
    display.say(fold_run(run, path, lossy=True).describe())
    return run, measure_gain(run, path, display)


def _row(check: Check) -> list[str]:
    return [check.name, {True: "ok", False: "FAILED", None: ""}[check.passed], check.detail]


def _comparison(run: Run, control: Run, merged: Gain) -> Table:
    def cells(name: str, parameters: int, trained: float, deployed: float, base: float) -> list[str]:
        left = (base - deployed) / (base - trained)
        return [name, f"{parameters:,}", f"{base:.4f}", f"{trained:.4f}", f"{deployed:.4f}", f"{left:.1%}"]

    s, c = run.summary, control.summary
    rows = [
        cells(
            f"{run.config.adapter.label}, folded",
            s["trainable_parameters"],
            s["eval_loss_after"],
            s["eval_loss_after"],
            s["eval_loss_before"],
        ),
        cells(
            f"{control.config.adapter.label}, merged and quantized again",
            c["trainable_parameters"],
            merged.trained,
            merged.written,
            merged.base,
        ),
    ]
    heads = ("method", "trainable parameters", "base", "trained", "in the file", "gain left")
    return Table("What reaches the file (held-out loss)", heads, rows)
