"""A classification run from its configuration to a finished run folder."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from lorafold.adapters.inject import inject
from lorafold.config import METHODS, RunConfig
from lorafold.data.labels import Labelled
from lorafold.errors import ConfigError, TrainingError, bullet_list
from lorafold.evals.classes import Scores
from lorafold.models.adapter_files import save_adapter
from lorafold.models.classifier import LABELS, is_quantized, known_labels, load_classifier, new_modules
from lorafold.models.load import LoadedModel, compute_dtype
from lorafold.runs.display import Display, training_note
from lorafold.runs.folder import ADAPTER, Run, RunFolder, check_folder, read_run
from lorafold.runs.labelled import LabelledData, read_labelled
from lorafold.runs.report import Report, Table, write_report
from lorafold.runs.start import pick_device, seeded
from lorafold.train.classify import evaluate_classes, train_classes
from lorafold.train.loop import MICRO_BATCH_TOKENS, Step, make_optimizer, rows_per_step, total_steps
from lorafold.train.memory import peak_bytes, restart_peak

_MEANINGLESS = (
    "prompt",
    "completion",
    "template",
    "supervise",
    "memory",
    "shared_prefix_tokens",
    "save_steps",
    "save_total_limit",
    "shard_base",
)


def classify(config: RunConfig, display: Display) -> Run:
    """Train a classifier as configured and write the run folder.

    Raises:
        LoraFoldError: something in the input is wrong (nothing is written then), or training cannot go on (the run
            folder then holds the last good adapter).
    """
    began = time.perf_counter()
    restart_peak()
    _refuse_meaningless(config)
    config = config.resolved()
    check_folder(config.output_dir)
    training = config.training
    device = pick_device(training.device)
    data = read_labelled(config, known_labels(config.model))
    seeded(training.seed)
    loaded = load_classifier(config.model, data.labels, compute_dtype(training.dtype, device), device)
    display.say(f"model: {loaded.path.name} in {str(loaded.dtype).removeprefix('torch.')} on {device}")
    train, held_out = data.tokenized(loaded.tokenizer, config.data.max_length, display)
    config = replace(config, adapter=_with_head(config, loaded))
    injection = inject(loaded.model, config.adapter)
    display.say(f"training: {config.adapter.label}, {injection.describe()}")
    optimizer = make_optimizer(loaded, training)
    folder = RunFolder(config.output_dir)
    folder.config(config)
    try:
        summary = _run(config, loaded, optimizer, data, train, held_out, folder, display)
    finally:
        folder.close()
    summary |= {"trainable_parameters": injection.trainable, "wall_seconds": time.perf_counter() - began}
    folder.summary(summary)
    run = read_run(folder.path)
    display.say(f"report: {write_report(run, _report(run))}")
    return run


def _refuse_meaningless(config: RunConfig) -> None:
    faults = [
        f"{name} means nothing to --task classification; leave it out"
        for name in _MEANINGLESS
        for group in (config.data, config.training)
        if hasattr(group, name) and getattr(group, name) != getattr(type(group), name)
    ]
    if config.adapter.init_lora_weights == "eva":
        faults.append("init_lora_weights eva is for language models so far")
    if config.from_adapter is not None:
        faults.append("from_adapter is for language models so far")
    if config.adapter.target_r is not None:
        faults.append("target_r is for language models so far")
    if config.adapter.method == "qa-lora" and not is_quantized(config.model):
        faults.append("qa-lora learns offsets of a quantized base; use --method lora, which takes this model as it is")
    if faults:
        raise ConfigError(faults[0] if len(faults) == 1 else "several options are wrong:\n" + bullet_list(faults))


def _with_head(config: RunConfig, loaded: LoadedModel) -> Any:
    """The spec that trains the head, and whatever else the folder lacks, whole."""
    spec = config.adapter
    if "modules_to_save" not in METHODS[spec.method].options:
        return spec  # full: everything
    return replace(spec, modules_to_save=tuple(dict.fromkeys((*spec.modules_to_save, *new_modules(loaded)))))


def _run(
    config: RunConfig,
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    data: LabelledData,
    train: Sequence[Labelled],
    held_out: Sequence[Labelled],
    folder: RunFolder,
    display: Display,
) -> dict[str, Any]:
    before = _evaluate(loaded, held_out, config, display, folder, 0)
    display.say(f"held-out rows before: {_said(before)}")
    steps = _train(config, loaded, optimizer, data.labels, train, held_out, folder, display)
    _save(config, loaded, data.labels)
    after = _evaluate(loaded, held_out, config, display, folder, len(steps))
    display.say(f"held-out rows after: {_said(after)}")
    seconds = sum(step.seconds for step in steps)
    return {
        **before.to_dict("before"),
        **after.to_dict("after"),
        "labels": data.labels,
        "f1_after": dict(zip(data.labels, after.f1, strict=True)),
        "samples_per_second": sum(step.rows for step in steps) / seconds,
        "tokens_per_second": sum(step.tokens for step in steps) / seconds,
        "peak_memory_bytes": peak_bytes(),
        "train_seconds": seconds,
        "steps": len(steps),
        "rows_per_step": rows_per_step(config.training),
        "train_rows": len(train),
        "eval_rows": len(held_out),
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "base_weights_sha256": loaded.weights_hash(),
        "data_sha256": data.fingerprint,
        "eval_data_sha256": data.eval_fingerprint,
    }


def _said(scores: Scores) -> str:
    return f"accuracy {scores.accuracy:.2%}, macro F1 {scores.macro_f1:.4f}, loss {scores.loss:.4f}"


def _save(config: RunConfig, loaded: LoadedModel, labels: Sequence[str]) -> None:
    save_adapter(config.output_dir / ADAPTER, loaded, config.adapter, notes={LABELS: json.dumps(list(labels))})


def _evaluate(
    loaded: LoadedModel, rows: Sequence[Labelled], config: RunConfig, display: Display, folder: RunFolder, step: int
) -> Scores:
    with display.bar("evaluating", len(rows)) as advance:
        found = evaluate_classes(loaded, rows, config.training.micro_batch_tokens or MICRO_BATCH_TOKENS, advance)
    folder.metric(step=step, eval_loss=found.loss, accuracy=found.accuracy, macro_f1=found.macro_f1)
    return found


def _train(
    config: RunConfig,
    loaded: LoadedModel,
    optimizer: torch.optim.Optimizer,
    labels: Sequence[str],
    rows: Sequence[Labelled],
    held_out: Sequence[Labelled],
    folder: RunFolder,
    display: Display,
) -> list[Step]:
    training, steps = config.training, list[Step]()
    total = total_steps(len(rows), training)
    where = config.output_dir / ADAPTER
    try:
        with display.bar("training", total) as advance:
            for step in train_classes(loaded, rows, training, optimizer):
                steps.append(step)
                folder.metric(**step.__dict__)
                advance(1, training_note(step.loss, step.tokens / step.seconds))
                if training.eval_steps and step.step % training.eval_steps == 0 and step.step < total:
                    display.say(
                        f"step {step.step}: {_said(_evaluate(loaded, held_out, config, display, folder, step.step))}"
                    )
    except BaseException as error:  # Ctrl-C and the like too: what was learned so far is kept
        if not steps:
            raise
        _save(config, loaded, labels)
        kept = f"{where} holds what was learned until step {len(steps)} of {total}"
        if isinstance(error, TrainingError):
            raise TrainingError(f"{error}. {kept}. A lower learning_rate is the usual cure.") from error
        display.say(f"stopped: {kept}")
        raise
    return steps


def _report(run: Run) -> Report:
    s = run.summary
    labels = s["labels"]
    figures = [
        [name, f"{s[f'{key}_before']:.4f}", f"{s[f'{key}_after']:.4f}"]
        for name, key in (("accuracy", "accuracy"), ("macro F1", "macro_f1"), ("loss", "eval_loss"))
    ]
    confusion = [
        [label, *(f"{count:,}" for count in row), f"{s['f1_after'][label]:.4f}"]
        for label, row in zip(labels, s["confusion_after"], strict=True)
    ]
    tables = [
        Table("Held-out rows", ("", "before", "after"), figures),
        Table("Confusion after training", ("true label", *labels, "F1"), confusion, "Columns are predicted labels."),
    ]
    return Report(f"{run.config.adapter.label} on {run.config.model.rpartition('/')[2]}", tables, samples=[])
