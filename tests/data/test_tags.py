"""Words with tags: the first token of a word has its tag, and what is lost is counted."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lorafold.data.read import read_rows
from lorafold.data.tags import tokenize_tagged, words_and_tags
from lorafold.errors import DataError
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.tokenizer import load_tokenizer
from tests.tiny import tiny_gguf
from tests.tiny_classifier import tiny_bert

COLUMNS = ("tokens", "tags")
WORDS = ["good", "films!?", "the", "U.S.", "bad.plot", "New York", "is"]  # several tokens, and a space in a word


def test_tags_are_text_in_the_end() -> None:
    for tags, wanted in (([0, 3], ["0", "3"]), (["O", "B-X "], ["O", "B-X"])):
        rows = [{"tokens": ["a", "b"], "tags": tags}]
        assert words_and_tags(enumerate(rows), COLUMNS, "tokens", "tags") == [(0, ["a", "b"], wanted)]


def test_every_bad_row_is_named() -> None:
    good = ["O"]
    rows = [
        {"tokens": None, "tags": good},
        {"tokens": [], "tags": []},
        {"tokens": ["a"], "tags": ["O", "O"]},
        {"tokens": [None], "tags": good},
        {"tokens": ["a"], "tags": [0.5]},
        {"tokens": ["a"], "tags": "O"},
    ]
    with pytest.raises(DataError) as caught:
        words_and_tags(enumerate(rows), COLUMNS, "tokens", "tags")
    message = str(caught.value)
    for wanted in (
        "row 0: the words are None, not a list",
        "row 1: it has no words",
        "row 2: 1 words and 2 tags",
        "row 3: the word None is no text",
        "row 4: the tag 0.5 is neither text nor a whole number",
        "row 5: the tags are 'O', not a list",
    ):
        assert wanted in message
    with pytest.raises(DataError, match=r"'tag' \(did you mean 'tags'\?\) \(--tags-column\)"):
        words_and_tags([], COLUMNS, "tokens", "tag")


def test_places_are_those_of_transformers(tmp_path: Path) -> None:
    """With a tokenizer that splits at spaces they are `word_ids` of the same words."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path))
    encoded = tokenizer(WORDS, is_split_into_words=True)
    numbers = encoded.word_ids()
    first = [numbers.index(i) for i in range(len(WORDS))]
    (row,) = tokenize_tagged([(3, WORDS, ["O"] * 7)], range(7), tokenizer, 100)
    assert row.ids == encoded["input_ids"]
    assert row.places == first
    assert (row.labels, row.row, row.cut, row.without) == ([*range(7)], 3, 0, 0)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_words_begin_at_their_first_token(architecture: str, tmp_path: Path) -> None:
    """Whatever a tokenizer does with spaces, the token at a word's place begins with the word's first character."""
    tokenizer = load_tokenizer(GGUFFile(tiny_gguf(tmp_path, architecture)))
    words = ["hello", "world", "Zoë", "한국어", "a", "quest123"]
    (row,) = tokenize_tagged([(0, words, ["O"] * 6)], range(6), tokenizer, 1000)
    spans = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
    text = " ".join(words)
    assert row.labels == [*range(6)]
    for word, place in zip(words, row.places, strict=True):
        assert text[slice(*spans[place])].strip()[0] == word[0]
        start = spans[place][1] - len(text[slice(*spans[place])].strip())
        assert text[start:].startswith(word[:1])
        assert start == 0 or text[start - 1] == " "


def test_what_is_lost_is_counted(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert(tmp_path))
    words = ["good", "\x00", "is", "films!?", "the", "plot"]
    (row,) = tokenize_tagged([(0, words, ["O"] * 6)], range(6), tokenizer, 6)  # [CLS] good is films ! [SEP]
    assert (row.labels, row.places) == ([0, 2, 3], [1, 2, 3])
    assert (row.cut, row.without) == (2, 1)


def test_lists_of_parquet_files(tmp_path: Path) -> None:
    """As the `datasets` library writes them: tags as whole numbers of 64 bits."""
    table = pa.table({"tokens": [["a", "b"], ["c"]], "ner_tags": pa.array([[0, 3], [1]], pa.list_(pa.int64()))})
    pq.write_table(table, tmp_path / "rows.parquet")
    rows = read_rows(tmp_path / "rows.parquet")
    found = words_and_tags(enumerate(rows), rows.columns, "tokens", "ner_tags")
    assert found == [(0, ["a", "b"], ["0", "3"]), (1, ["c"], ["1"])]
