"""Labels are found, ordered and numbered; what cannot be a label is named."""

from __future__ import annotations

import pytest

from lorafold.data.labels import label_names, numbered, texts_and_labels
from lorafold.errors import DataError


def test_labels_are_text_in_the_end() -> None:
    rows = enumerate([{"t": "a", "y": 1}, {"t": "b", "y": "1 "}, {"t": "c", "y": True}])
    assert texts_and_labels(rows, ("t", "y"), "{t}!", "y") == [(0, "a!", "1"), (1, "b!", "1"), (2, "c!", "true")]


def test_numbers_come_by_value_and_before_words() -> None:
    assert label_names(["b", "10", "9", "-1", "a", "a"]) == ["-1", "9", "10", "a", "b"]


def test_a_head_without_names_takes_numbers() -> None:
    assert numbered(["1", "LABEL_0"], ["LABEL_0", "LABEL_1"], "rows") == [1, 0]
    with pytest.raises(DataError, match=r"rows have labels that the model does not: '2' \(2 rows\)"):
        numbered(["2", "0", "2"], ["LABEL_0", "LABEL_1"], "rows")


def test_every_bad_row_is_named() -> None:
    rows = [{"t": "a", "y": None}, {"t": " ", "y": "x"}, {"t": "c", "y": 0.5}, *({"t": "d", "y": []} for _ in range(9))]
    with pytest.raises(DataError) as caught:
        texts_and_labels(enumerate(rows), ("t", "y"), "{t}", "y")
    message = str(caught.value)
    assert "row 0: the label is None" in message
    assert "row 1: the text is empty" in message
    assert "row 2: the label is 0.5" in message
    assert "and 2 more" in message
