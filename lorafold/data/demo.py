"""The embedded data: products with name, category and description, written for this project.

`train` and `held_out` share no product and no sentence of eight words.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

FOLDER = Path(__file__).parent / "demo"
DEMO_PROMPT = "Write a product description.\nName: {name}\nCategory: {category}"
DEMO_COMPLETION = "{description}"


def demo_file(part: Literal["train", "held_out"]) -> Path:
    """The JSONL file of one part; each record has the text fields `name`, `category` and `description`."""
    return FOLDER / f"{part}.jsonl"
