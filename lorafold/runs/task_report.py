"""The tables of a task's report: figures before and after, who is taken for whom, and the entities of each type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorafold.evals.classes import Scores
from lorafold.evals.figures import SHOWN, written
from lorafold.runs.folder import Run
from lorafold.runs.report import Report, Table


def task_report(run: Run) -> Report:
    """What a report shows of a run of any task but language modelling."""
    s = run.summary
    figures = [
        [name, *(written(key, s[f"{key}_{when}"]) for when in ("before", "after"))]
        for key, (name, _) in SHOWN.items()
        if f"{key}_after" in s
    ]
    tables = [Table("Held-out rows", ("", "before", "after"), figures, _note(s))]
    if "entities_after" in s:
        tables.append(_entities(s["entities_after"]))
    if "confusion_after" in s:
        tables.append(_confusion(s["labels"], Scores(s["eval_loss_after"], s["confusion_after"])))
    return Report(f"{run.config.adapter.label} on {Path(run.config.model).name}", tables, samples=[])


def _note(summary: dict[str, Any]) -> str:
    if "candidates_after" not in summary:
        return ""
    return (
        f"Each anchor's positive is looked for among {summary['candidates_after']:,} texts, those of all held-out "
        "pairs; training knows the texts of one step, so its loss is lower."
    )


def _entities(found: dict[str, dict[str, Any]]) -> Table:
    heads = ("type", "precision", "recall", "F1", "predicted", "true")
    rows = [
        [kind, *(f"{f[key]:.4f}" for key in ("precision", "recall", "f1")), f"{f['predicted']:,}", f"{f['true']:,}"]
        for kind, f in found.items()
    ]
    text = "Right where type, first and last word are; all types together stand above."
    return Table("Entities after training", heads, rows, text)


def _confusion(labels: list[str], scores: Scores) -> Table:
    rows = [
        [label, *(f"{count:,}" for count in row), f"{f1:.4f}"]
        for label, row, f1 in zip(labels, scores.confusion, scores.f1, strict=True)
    ]
    heads = ("true label", *labels, "F1")
    return Table("Confusion after training", heads, rows, "Columns are predicted labels.")
