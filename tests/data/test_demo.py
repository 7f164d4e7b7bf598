"""The embedded data is fit for a demonstration: enough of it, of one kind, and nothing of it twice."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

from lorafold.data.demo import DEMO_COMPLETION, DEMO_PROMPT, demo_file
from lorafold.data.read import read_rows
from lorafold.data.rows import to_examples

PARTS = ("train", "held_out")


def _records() -> dict[str, list[dict[str, Any]]]:
    return {part: [json.loads(line) for line in demo_file(part).read_text("utf-8").splitlines()] for part in PARTS}


def test_records_are_many_complete_and_of_even_length() -> None:
    records = list(itertools.chain(*_records().values()))
    assert len(records) >= 300
    for record in records:
        assert set(record) == {"name", "category", "description"}
        assert all(value == value.strip() != "" for value in record.values())
        assert 40 <= len(record["description"].split()) <= 90, record["name"]


def test_names_are_unique_and_the_parts_disjoint() -> None:
    names = {part: {record["name"].lower() for record in records} for part, records in _records().items()}
    assert [len(names[part]) for part in PARTS] == [len(_records()[part]) for part in PARTS]
    assert not names["train"] & names["held_out"]
    assert {r["category"] for r in _records()["held_out"]} <= {r["category"] for r in _records()["train"]}


def test_no_two_descriptions_share_eight_words() -> None:
    owners: dict[tuple[str, ...], str] = {}
    for record in itertools.chain(*_records().values()):
        words = re.findall(r"\w+", record["description"].lower())
        for start in range(len(words) - 7):
            assert owners.setdefault(tuple(words[start : start + 8]), record["name"]) == record["name"]


def test_demo_columns_fill_the_demo_templates(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for part in PARTS:
        rows = read_rows(demo_file(part))
        example = to_examples(rows, prompt_template=DEMO_PROMPT, completion_template=DEMO_COMPLETION)[0]
        assert (
            example.prompt == f"Write a product description.\nName: {rows[0]['name']}\nCategory: {rows[0]['category']}"
        )
        assert example.completion == rows[0]["description"]
