"""What a model is trained to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lorafold.config.checks import refuse

TASKS = ("causal-lm", "classification")


@dataclass(frozen=True)
class TaskConfig:
    """What a model is trained to do.

    Attributes:
        task: `causal-lm` (continue a text) or `classification` (one label for each text).
        text: classification: template that makes the text from columns, such as "{title}: {body}".
        label_column: classification: column of the label, text or a whole number.
    """

    task: Literal["causal-lm", "classification"] = "causal-lm"
    text: str = "{text}"
    label_column: str = "label"

    def __post_init__(self) -> None:
        faults = []
        if self.task not in TASKS:
            faults.append(f"task is {self.task!r}; {' and '.join(TASKS)} are known")
        elif not self.classifies:
            faults += [
                f"{name} means nothing to --task causal-lm; leave it out, or use --task classification"
                for name in ("text", "label_column")
                if getattr(self, name) != getattr(TaskConfig, name)
            ]
        refuse(faults)

    @property
    def classifies(self) -> bool:
        """Whether each text gets a label."""
        return self.task == "classification"
