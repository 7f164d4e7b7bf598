"""The preview shows every token once and what is learned in words and in colour."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from lorafold.data.preview import render
from lorafold.data.rows import Example
from lorafold.data.tokens import Tokens, tokenize
from tests.data.tiny_tokenizers import byte_level, sentencepiece


def _row(tokenizer: Any, prompt: str, completion: str, template: str = "auto") -> Tokens:
    [row] = tokenize([Example(0, "prompt", prompt=prompt, completion=completion)], tokenizer, template=template).rows
    return row


def test_learned_spans_survive_without_colour() -> None:
    found = render(_row(byte_level(), "the cat?", "the dog\nsat"), byte_level())
    assert found.plain == (
        "<|im_start|>user⏎\nthe cat?<|im_end|>⏎\n<|im_start|>assistant⏎\n⟦the dog⏎\nsat<|im_end|>⟧⏎\n"
    )


def test_neighbours_differ_in_shade_and_kinds_in_colour() -> None:
    row = _row(byte_level(), "the cat", "sat")
    spans = [span for span in render(row, byte_level()).spans if "on " in str(span.style)]
    styles = [str(span.style) for span in spans]
    assert len(spans) == len(row)
    assert all(a.split()[-1] != b.split()[-1] for a, b in itertools.pairwise(styles))
    special = set(byte_level().all_special_ids)
    for style, token, supervised in zip(styles, row.ids, row.supervised, strict=True):
        assert ("magenta" in style) == (token in special)
        assert ("green" in style) == (supervised and token not in special)


@pytest.mark.parametrize("tokenizer", [byte_level(), sentencepiece()], ids=["byte level", "sentencepiece"])
def test_no_character_and_no_space_is_lost(tokenizer: Any) -> None:
    text = "the  cat 한국어 😀 é"
    shown = render(_row(tokenizer, text, "ok", "raw"), tokenizer).plain
    shown = shown.replace("…", "").replace("<s> ", "")  # sentencepiece puts a space before every text
    assert shown == f"{text}⟦ok{tokenizer.eos_token}⟧"
    assert "�" not in shown


def test_a_row_cut_within_a_character_or_a_learned_span() -> None:
    tokenizer = byte_level()
    ids = tokenizer.encode("a한")
    found = render(Tokens(ids[:-1], [False] + [True] * (len(ids) - 2), 0), tokenizer)
    assert found.plain == "a⟦……⟧"
