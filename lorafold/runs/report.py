"""`report.html`: one file without outside references, with the figures, the loss curve and the samples."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lorafold.files import write_text
from lorafold.runs.folder import REPORT, Run

_BLUE, _ORANGE = "#0969da", "#bc4c00"


@dataclass(frozen=True)
class Table:
    """A table of a report; the first column is text, the others are numbers already formatted."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: str = ""


@dataclass
class Report:
    """What a report shows beside the run's own figures."""

    title: str
    tables: list[Table] = field(default_factory=list)
    samples: list[dict[str, str]] | None = None


def write_report(run: Run, report: Report | None = None, path: Path | None = None) -> Path:
    """Write the report of a run and return its path (`report.html` in the run folder by default)."""
    s = run.summary
    tables = [rank_table(s["ranks"])] if "ranks" in s else []
    report = report or Report(f"{run.config.adapter.label} on {Path(run.config.model).name}", tables)
    tiles = [
        ("held-out loss before", f"{s['eval_loss_before']:.4f}"),
        ("held-out loss after", f"{s['eval_loss_after']:.4f}"),
        ("trainable parameters", f"{s['trainable_parameters']:,}"),
        ("samples per second", f"{s['samples_per_second']:.2f}"),
        ("tokens per second", f"{s['tokens_per_second']:.0f}"),
        ("peak memory", f"{s['peak_memory_bytes'] / 1e9:.2f} GB"),
        ("wall time", _duration(s["wall_seconds"])),
    ]
    environment = Environment(loader=PackageLoader("lorafold.runs"), autoescape=True)
    html = environment.get_template("report.html.jinja").render(
        title=report.title,
        subtitle=f"{run.config.adapter.label}, {s['train_rows']} rows, {s['steps']} steps of {s['rows_per_step']} rows",
        tiles=tiles,
        plot=loss_plot(run.metrics),
        tables=report.tables,
        samples=report.samples if report.samples is not None else run.samples,
        config=run.config.to_dict()
        | {"base_weights_sha256": s["base_weights_sha256"], "data_sha256": s["data_sha256"]},
    )
    path = path or run.path / REPORT
    write_text(path, html)
    return path


def rank_table(ranks: Mapping[str, int]) -> Table:
    """Ranks that layers have kept: a row for each block, a column for each kind of layer."""
    cells: dict[str, dict[str, int]] = {}
    for path, rank in ranks.items():
        block = re.match(r"(.*\.\d+)\.", path)
        cells.setdefault(block[1] if block else path, {})[path.rpartition(".")[2]] = rank
    kinds = list(dict.fromkeys(kind for row in cells.values() for kind in row))
    rows = [[name, *(str(row.get(kind, "")) for kind in kinds)] for name, row in cells.items()]
    return Table("Ranks after training", ("", *kinds), rows, "Layers of rank 0 are not adapted.")


def loss_plot(metrics: Sequence[dict[str, Any]]) -> str:
    """Training and held-out loss over steps, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    steps = [m for m in metrics if "loss" in m]
    evals = [m for m in metrics if "eval_loss" in m]
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "lorafold"}):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([m["step"] for m in steps], [m["loss"] for m in steps], color=_BLUE, linewidth=1, label="training")
        axes.plot(
            [m["step"] for m in evals], [m["eval_loss"] for m in evals], color=_ORANGE, marker="o", label="held out"
        )
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats)")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
