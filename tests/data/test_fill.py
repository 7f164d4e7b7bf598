"""Braces name columns and nothing else."""

from __future__ import annotations

import json

import pytest

from lorafold.data.fill import columns_of, fill
from lorafold.errors import DataError


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("plain", "plain"),
        ("{a}{a}", "11"),
        ("{{a}}", "{a}"),
        ("{{{a}}}", "{1}"),
        ("{{}}{b}", "{}{a}"),  # what a value contains is not filled again
        ("{c}|{d}|{e}", "|[1, 2]|true"),
    ],
)
def test_fill(template: str, text: str) -> None:
    assert fill(template, {"a": 1, "b": "{a}", "c": None, "d": [1, 2], "e": True}) == text


def test_what_is_no_number_is_missing() -> None:
    """As tables have it where a number is missing, in files and in memory."""
    assert fill("[{a}{b}]", {"a": float("nan"), "b": json.loads("NaN")}) == "[]"


def test_columns_are_listed_and_all_faults_told_at_once() -> None:
    assert columns_of("{b} {a} {b}", ["a", "b"]) == ["b", "a", "b"]
    with pytest.raises(DataError, match=r"no column 'x'.*\n.*a single } at character 3.*\nthe columns are: a, b"):
        columns_of("{x}}", ["a", "b"])
