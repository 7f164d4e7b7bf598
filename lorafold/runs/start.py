"""A training run from its configuration to a finished run folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lorafold.adapters.inject import Injection, inject
from lorafold.config import RunConfig
from lorafold.data.rows import Example
from lorafold.data.stream import RowStream
from lorafold.data.tokens import Tokens, prompt_ids
from lorafold.errors import ConfigError, TrainingError
from lorafold.evals.generate import generate
from lorafold.evals.loss import evaluate
from lorafold.models.adapter_files import save_adapter
from lorafold.models.load import LoadedModel, compute_dtype, load
from lorafold.runs.display import Display, training_note
from lorafold.runs.folder import ADAPTER, Run, RunFolder, check_folder, read_run
from lorafold.runs.prepare import PreparedData, prepare
from lorafold.runs.report import write_report
from lorafold.train.budget import Plan
from lorafold.train.loop import MICRO_BATCH_TOKENS, Step, plan_step, rows_per_step, total_steps, train_steps
from lorafold.train.memory import peak_bytes, restart_peak


def start(config: RunConfig, display: Display) -> Run:
    """Train as configured and write the run folder.

    Raises:
        LoraFoldError: something in the input is wrong (nothing is written then), or training cannot go on (the run
            folder then holds the last good adapter).
    """
    began = time.perf_counter()
    restart_peak()
    config = config.resolved()
    check_folder(config.output_dir)
    device = pick_device(config.training.device)
    loaded = load(config.model, compute_dtype(config.training.dtype, device), device)
    display.say(f"model: {loaded.path.name} in {str(loaded.dtype).removeprefix('torch.')} on {device}")
    data = prepare(config.data, loaded.tokenizer, config.training.seed, display)
    seeded(config.training.seed)
    injection = inject(loaded.model, config.adapter)
    display.say(f"adapter: {config.adapter.label}, {injection.describe()}")
    folder = RunFolder(config.output_dir)
    folder.config(config)
    try:
        summary = _run(config, loaded, data, injection, folder, display)
    finally:
        folder.close()
    summary["wall_seconds"] = time.perf_counter() - began
    folder.summary(summary)
    run = read_run(folder.path)
    display.say(f"report: {write_report(run)}")
    return run


def _run(
    config: RunConfig,
    loaded: LoadedModel,
    data: PreparedData,
    injection: Injection,
    folder: RunFolder,
    display: Display,
) -> dict[str, Any]:
    training, held_out = config.training, data.held_out.rows
    loading = peak_bytes()  # planning counts anew
    plan = plan_step(loaded, data.train.rows, training)
    display.say(plan.describe())
    before = _evaluate(loaded, held_out, display, folder, config, plan, 0)
    display.say(f"held-out loss before: {before:.4f}")
    asked = data.examples[: training.sample_rows]
    samples_before = sample(loaded, asked, config, display, "samples before")
    steps = _train(config, loaded, data, folder, display, plan, before)
    save_adapter(folder.path / ADAPTER, loaded, config.adapter)
    after = _evaluate(loaded, held_out, display, folder, config, plan, len(steps))
    display.say(f"held-out loss after: {after:.4f} (before: {before:.4f})")
    samples_after = sample(loaded, asked, config, display, "samples after")
    folder.samples(
        [
            {"prompt": prompt_text(e), "reference": reference_text(e), "before": b, "after": a}
            for e, b, a in zip(asked, samples_before, samples_after, strict=True)
        ]
    )
    seconds = sum(step.seconds for step in steps)
    return {
        "eval_loss_before": before,
        "eval_loss_after": after,
        "trainable_parameters": injection.trainable,
        "samples_per_second": sum(step.rows for step in steps) / seconds,
        "tokens_per_second": sum(step.tokens for step in steps) / seconds,
        "peak_memory_bytes": max(loading, peak_bytes()),
        "train_seconds": seconds,
        "steps": len(steps),
        "rows_per_step": rows_per_step(training),
        "train_rows": len(data.train.rows),
        "eval_rows": len(held_out),
        "eval_tokens": sum(sum(row.supervised) for row in held_out),
        "cut_rows": data.train.cut,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "promoted_tensors": len(injection.promotions),
        "added_bytes": injection.added_bytes,
        "base_weights_sha256": loaded.weights_hash(),
        "data_sha256": data.fingerprint,
        "eval_data_sha256": data.eval_fingerprint,
    }


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    data: PreparedData,
    folder: RunFolder,
    display: Display,
    plan: Plan,
    before: float,
) -> list[Step]:
    training, rows = config.training, data.train.rows
    total = total_steps(len(rows), training)
    steps: list[Step] = []
    try:
        with display.bar("training", total) as advance:
            for step in train_steps(loaded, rows, training, plan):
                steps.append(step)
                folder.metric(**step.__dict__)
                advance(1, training_note(step.loss, step.tokens / step.seconds))
                if training.eval_steps and step.step % training.eval_steps == 0 and step.step < total:
                    loaded.model.eval()
                    loss = _evaluate(loaded, data.held_out.rows, display, folder, config, plan, step.step)
                    display.say(f"step {step.step}: held-out loss {loss:.4f} (before: {before:.4f})")
    except TrainingError as error:
        save_adapter(folder.path / ADAPTER, loaded, config.adapter)
        raise TrainingError(
            f"{error}. Training stopped; {folder.path / ADAPTER} holds the adapter as it was after step {len(steps)}. "
            "A lower learning_rate is the usual cure."
        ) from error
    except BaseException:  # Ctrl-C and the like: what was learned so far is kept
        if steps:
            save_adapter(folder.path / ADAPTER, loaded, config.adapter)
            display.say(
                f"stopped after step {len(steps)} of {total}; {folder.path / ADAPTER} holds the adapter as it is"
            )
        raise
    finally:
        if isinstance(rows, RowStream):
            display.say(f"training data: {rows.describe_met()}")
    return steps


def _evaluate(
    loaded: LoadedModel,
    rows: Sequence[Tokens] | RowStream,
    display: Display,
    folder: RunFolder,
    config: RunConfig,
    plan: Plan,
    step: int,
) -> float:
    most, shared = min(plan.micro_batch_tokens, MICRO_BATCH_TOKENS), config.training.shared_prefix_tokens or None
    with display.bar("evaluating", len(rows)) as advance:
        loss = evaluate(loaded, rows, most, progress=advance, shared=shared)
    folder.metric(step=step, eval_loss=loss)
    return loss


def sample(
    loaded: LoadedModel, examples: Sequence[Example], config: RunConfig, display: Display, label: str
) -> list[str]:
    """What the model says to the prompts of some examples, greedily."""
    texts = []
    with display.bar(label, len(examples)) as advance:
        for example in examples:
            ids = prompt_ids(example, loaded.tokenizer, config.data.template)
            out = generate(loaded, ids, config.training.sample_tokens, keep=config.training.memory is None)
            texts.append(loaded.tokenizer.decode(out, skip_special_tokens=True).strip())
            advance(1)
    return texts


def prompt_text(example: Example) -> str:
    """The prompt of an example as a person reads it."""
    if example.messages:
        turns = example.messages[:-1] if example.messages[-1]["role"] == "assistant" else example.messages
        return "\n".join(str(turn["content"]) for turn in turns)
    return example.prompt or (example.text or "")[:200]


def reference_text(example: Example) -> str:
    """The completion that the data give."""
    if example.messages and example.messages[-1]["role"] == "assistant":
        return str(example.messages[-1]["content"])
    return example.completion or ""


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        ConfigError: cuda is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda, and torch sees no CUDA device here; use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def seeded(seed: int) -> None:
    """Seed everything that initializes or shuffles."""
    torch.manual_seed(seed)
