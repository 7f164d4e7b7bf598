"""Rows: where they come from, and how they become tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorafold.config.checks import not_positive, refuse


@dataclass(frozen=True)
class RowsConfig:
    """Rows, and how they become tokens.

    Attributes:
        data: JSONL, JSON, CSV, TSV or Parquet file, or a folder of them.
        prompt: template that makes the prompt from columns, such as "Describe {name}.".
        completion: template that makes the completion from columns.
        template: `chat` (the model's own), `alpaca`, `plain`, or `auto`: chat where the model has one.
        max_length: tokens kept of a row; longer rows are cut on the right and counted.
        supervise: `completion` (completions or assistant turns) or `all` tokens.
        limit: use the first N rows of data only.
    """

    data: Path
    prompt: str | None = None
    completion: str | None = None
    template: str = "auto"
    max_length: int = 1024
    supervise: Literal["completion", "all"] = "completion"
    limit: int | None = None

    def __post_init__(self) -> None:
        refuse(self.faults())

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        faults = []
        if (self.prompt is None) != (self.completion is None):
            faults.append("prompt and completion templates go together; one of them is missing")
        if self.supervise not in ("completion", "all"):
            faults.append(f"supervise is {self.supervise!r}; completion and all are known")
        return faults + not_positive(self, "max_length", "limit")


@dataclass(frozen=True)
class DataConfig(RowsConfig):
    """What is learned from, and what is held out.

    Attributes:
        eval_data: held-out rows; without it a validation or test split of a data folder, or else a part of the data.
        eval_fraction: the part held out when there are no other held-out rows; at most 2,000 rows, if eval_limit is not
            given.
        eval_limit: use the first N held-out rows only.
    """

    eval_data: Path | None = None
    eval_fraction: float = 0.1
    eval_limit: int | None = None

    def faults(self) -> list[str]:
        """What is wrong with the values."""
        faults = super().faults()
        if not 0 < self.eval_fraction < 1:
            faults.append(f"eval_fraction is {self.eval_fraction}; it must lie between 0 and 1")
        return faults + not_positive(self, "eval_limit")
