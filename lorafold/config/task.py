"""What a model is trained to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from lorafold.config.checks import refuse

TASKS: Mapping[str, tuple[str, ...]] = {  # task -> the options that mean something to it
    "causal-lm": (),
    "classification": ("text", "label_column", "label_names"),
    "token-classification": ("words_column", "tags_column", "label_names"),
    "embedding": ("anchor", "positive", "negative", "scale"),
}


@dataclass(frozen=True)
class TaskConfig:
    """What a model is trained to do.

    Attributes:
        task: `causal-lm` (continue a text), `classification` (one label for each text), `token-classification` (one
            tag for each word) or `embedding` (vectors by which texts that belong together are found).
        text: classification: template that makes the text from columns, such as "{title}: {body}".
        label_column: classification: column of the label, text or a whole number.
        words_column: token-classification: column of the words, a list of texts.
        tags_column: token-classification: column of the tags, a list of texts or whole numbers, one for each word.
        label_names: labels or tags in the order of their numbers, such as `O B-PER I-PER`; without it those of the
            model's head, or those that the training rows have.
        anchor: embedding: template of the text that is asked with, such as "{question}".
        positive: embedding: template of the text that belongs to it.
        negative: embedding: template of a text that looks like it and does not; rows may have none.
        scale: embedding: cosines are multiplied by this before the softmax; 1 / temperature.
    """

    task: Literal["causal-lm", "classification", "token-classification", "embedding"] = "causal-lm"
    text: str = "{text}"
    label_column: str = "label"
    words_column: str = "tokens"
    tags_column: str = "ner_tags"
    label_names: tuple[str, ...] = ()
    anchor: str = "{anchor}"
    positive: str = "{positive}"
    negative: str | None = None
    scale: float = 20.0

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            refuse([f"task is {self.task!r}; {', '.join(TASKS)} are known"])
            return
        faults = []
        for name in (f.name for f in fields(self) if f.name != "task"):
            if name not in TASKS[self.task] and getattr(self, name) != getattr(TaskConfig, name):
                takers = " or ".join(task for task, options in TASKS.items() if name in options)
                faults.append(f"{name} means nothing to --task {self.task}; leave it out, or use --task {takers}")
        if not 0 < self.scale < math.inf:
            faults.append(f"scale is {self.scale}; it must be positive")
        if len(set(self.label_names)) < len(self.label_names) or len(self.label_names) == 1:
            faults.append(f"label_names are {', '.join(self.label_names)}; give at least two, and each once")
        refuse(faults)

    @property
    def continues(self) -> bool:
        """Whether texts are continued, token by token."""
        return self.task == "causal-lm"
