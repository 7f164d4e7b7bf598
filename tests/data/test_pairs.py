"""Pairs of texts are read by templates; what is no pair is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lorafold.data.pairs import pair_texts, tokenize_pairs
from lorafold.errors import DataError
from tests.tiny_classifier import tiny_bert

COLUMNS = ("q", "a", "no")


def test_templates_make_the_texts() -> None:
    rows = [{"q": "x", "a": "y", "no": None}, {"q": "z", "a": "w", "no": "n"}]
    found = pair_texts(enumerate(rows), COLUMNS, "ask {q}", "{a}", "{no}")
    assert found == [(0, "ask x", "y", ""), (1, "ask z", "w", "n")]
    assert pair_texts(enumerate(rows), COLUMNS, "{q}", "{a}", None)[1] == (1, "z", "w", "")


def test_empty_texts_and_columns_are_named() -> None:
    rows = [{"q": " ", "a": ""}, {"q": "x", "a": None}]
    with pytest.raises(DataError) as caught:
        pair_texts(enumerate(rows), ("q", "a"), "{q}", "{a}", None)
    assert "row 0: anchor and positive empty" in str(caught.value)
    assert "row 1: positive empty" in str(caught.value)
    with pytest.raises(DataError, match="no column 'aa'"):
        pair_texts([], ("q", "a"), "{q}", "{aa}", None)


def test_each_text_is_cut_by_itself(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path))
    rows = [(4, "good film", "the plot is odd", ""), (5, "a", "bad", "fine film")]
    first, second = tokenize_pairs(rows, tokenizer, 4)
    assert first.positive == tuple(tokenizer("the plot")["input_ids"])
    assert (first.negative, first.row, len(first)) == ((), 4, 8)
    assert second.negative == tuple(tokenizer("fine film")["input_ids"])
