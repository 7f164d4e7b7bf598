"""The questions of `bits_methods.py`: rows of GSM8K, and of ARC-Easy with the answers to choose among."""

from __future__ import annotations

import gzip
import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Question:
    """One row of either task: what is asked, what can be answered, and which of these is right."""

    prompt: str
    choices: tuple[str, ...]
    right: int = 0


def read_questions(task: str, path: Path, count: int) -> list[Question]:
    """The first rows of a file."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    if task == "gsm8k":
        return [Question(row["question"], (row["answer"],)) for row in rows]
    questions = []
    for row in rows:
        text, _, rest = (
            row["instruction"].removeprefix("Please choose the correct answer to the question: ").partition("\n\n")
        )
        choices = re.split(r"\s*Answer\d+: ", rest.partition("\n\nAnswer format")[0])[1:]
        right = int(row["answer"].removeprefix("answer")) - 1
        questions.append(Question(f"Question: {text}\nAnswer:", tuple(f" {c.strip()}" for c in choices), right))
    return questions
