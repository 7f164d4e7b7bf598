"""What a fold did to the updates, in figures, and whether it may be written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lorafold.adapters.fold import LEAST_KEPT
from lorafold.errors import FoldError
from lorafold.files import size_on_disk

DENSE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did.

    Attributes:
        kind: `exact` (the trained weights themselves), `near` (rounded, 99 % kept) or `lossy`.
        layers: matrices written, and vectors that were trained.
        kept: smallest share of a layer's update that survived.
        mean_kept: the same over all layers, weighted alike.
        error_steps: largest rounding error, in quantization steps (nan for dense types).
        size_before, size_after: bytes of base and result.
    """

    kind: str
    layers: int
    kept: float
    mean_kept: float
    error_steps: float
    size_before: int
    size_after: int

    def describe(self) -> str:
        """One sentence."""
        grown = self.size_after - self.size_before
        size = "same size" if not grown else f"{grown:+,} bytes"
        what = {
            "exact": "it holds the trained weights exactly",
            "near": f"every layer keeps {self.kept:.2%} of its update or more",
            "lossy": f"{self.mean_kept:.1%} of the update is left on average, {self.kept:.1%} in the worst layer",
        }[self.kind]
        if self.kind == "exact" and self.kept < LEAST_KEPT:
            what += f" (offsets in coarse steps, which hold {self.kept:.1%} of the worst layer's update)"
        return f"{self.kind} fold of {self.layers} layers, {size}: {what}"


def sized(report: FoldReport, path: Path) -> FoldReport:
    """The report with the bytes of the result that lies at a path."""
    return FoldReport(**{**report.__dict__, "size_after": size_on_disk(path)})


def refuse_loss(report: FoldReport, lossy: bool, otherwise: str = ", or choose --to f32") -> None:
    """Refuse a fold that loses some of the update, unless that was asked for.

    Args:
        otherwise: another way out, as the end of the message.

    Raises:
        FoldError: it does.
    """
    if report.kind == "lossy" and not lossy:
        raise FoldError(
            f"this fold would keep {report.mean_kept:.1%} of the update on average ({report.kept:.1%} in the worst "
            f"layer); pass --lossy to write it all the same{otherwise}"
        )


def dense_report(kept: list[float], size: int) -> FoldReport:
    """The report of weights that are written as plain numbers: what is left of each update, and the base's bytes."""
    kind = "near" if min(kept) >= LEAST_KEPT else "lossy"
    return FoldReport(kind, len(kept), min(kept), sum(kept) / len(kept), float("nan"), size, 0)


def joined(report: FoldReport, kept: list[float], exact: bool) -> FoldReport:
    """The report of quantized layers, and of what is held as plain numbers beside them.

    Args:
        kept: the share of each plain update that is left.
        exact: nothing of them was rounded.
    """
    if not kept:
        return report
    whole = dense_report(kept, report.size_before)
    count = report.layers + whole.layers
    if report.kind == "exact":
        if exact:
            return replace(report, layers=count)
        report = replace(report, kept=1.0, mean_kept=1.0)  # whatever steps offsets move in, training saw them
    return replace(
        report,
        kind=report.kind if exact else max(report.kind, whole.kind, key=("exact", "near", "lossy").index),
        layers=count,
        kept=min(report.kept, whole.kept),
        mean_kept=(report.layers * report.mean_kept + whole.layers * whole.mean_kept) / count,
    )
