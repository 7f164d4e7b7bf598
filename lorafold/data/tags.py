"""Words with tags, as for names in text: read from two columns of lists, and turned into tokens.

words      Ada     Lovelace        wrote
tags       B-PER   I-PER           O
tokens     ada     love ##lace     wrote     between the special tokens of the model
places     1       2               4         the first token of a word has its tag, the others have none
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from lorafold.data.labels import label_of, refuse_rows
from lorafold.errors import DataError, FormatError, bullet_list, nearest

Words = tuple[int, list[str], list[str]]  # number of the row, its words and their tags


@dataclass(frozen=True)
class Tagged:
    """One row as tokens.

    Attributes:
        ids: token ids, special tokens included.
        places: of those words that have a token, the place of the first in `ids`.
        labels: numbers of the tags of these words, among those of the model.
        row: number of the row in the file.
        cut: words that lie beyond the last token that is kept.
        without: words before it of which the tokenizer makes no token, such as a control character.
    """

    ids: list[int]
    places: list[int]
    labels: list[int]
    row: int
    cut: int
    without: int

    def __len__(self) -> int:
        return len(self.ids)


def words_and_tags(
    rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Sequence[str], words_column: str, tags_column: str
) -> list[Words]:
    """(number, words, tags) of each row; whole numbers are tags as JSON writes them.

    Raises:
        DataError: a column is missing, or a row has no words, not as many tags as words, or values of other types; up
            to ten rows are named.
    """
    options = {"--words-column": words_column, "--tags-column": tags_column}
    absent = [
        f"no column {name!r}{nearest(name, columns)} ({key})" for key, name in options.items() if name not in columns
    ]
    if absent:
        raise DataError(f"{bullet_list(absent)}\nthe columns are: {', '.join(columns)}")
    found, faults, kinds = [], [], set()
    for number, row in rows:
        words, tags = row[words_column], row[tags_column]
        fault = _fault(words, tags)
        if fault:
            faults.append(f"row {number}: {fault}")
        else:
            found.append((number, words, [str(label_of(tag)) for tag in tags]))
            kinds |= {type(tag) for tag in tags}
    refuse_rows("rows that are no words with one tag each", faults)
    if len(kinds) > 1:
        raise DataError(f"tags in {tags_column!r} are text and whole numbers; give all of them one kind")
    return found


def _fault(words: Any, tags: Any) -> str | None:
    """What is wrong with the words and tags of a row."""
    for name, value in (("words", words), ("tags", tags)):
        if not isinstance(value, list):
            return f"the {name} are {value!r:.60}, not a list (JSONL, JSON and Parquet files hold lists)"
    if not words:
        return "it has no words"
    if len(words) != len(tags):
        return f"{len(words)} words and {len(tags)} tags"
    odd = [word for word in words if not isinstance(word, str)]
    if odd:
        return f"the word {odd[0]!r} is no text"
    odd = [tag for tag in tags if label_of(tag) is None or isinstance(tag, bool)]
    if odd:
        return f"the tag {odd[0]!r} is neither text nor a whole number"
    below = [tag for tag in tags if isinstance(tag, int) and tag < 0]
    return f"the tag {below[0]} is below 0 (-100 marks what has no tag); leave such words out" if below else None


def tokenize_tagged(rows: Sequence[Words], numbers: Iterable[int], tokenizer: Any, max_length: int) -> list[Tagged]:
    """Rows as tokens, cut on the right to `max_length` special tokens included.

    The words are joined with spaces, and what is whose follows from the characters that a token stands for: tokenizers
    that put the space before a word into its first token see the text that they know.

    Args:
        numbers: of all tags, row after row.

    Raises:
        FormatError: the tokenizer does not say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise FormatError("this model's tokenizer does not say which characters a token stands for, so words are lost")
    texts = [" ".join(words) for _, words, _ in rows]
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_offsets_mapping=True)
    left = iter(numbers)
    return [
        _tagged(row, [next(left) for _ in row[1]], ids, spans)
        for row, ids, spans in zip(rows, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _tagged(row: Words, labels: list[int], ids: list[int], spans: Sequence[tuple[int, int]]) -> Tagged:
    number, words, _ = row
    first: dict[int, int] = {}
    end = 0
    owner = _owners(words)
    for place, (start, stop) in enumerate(spans):
        word = next((owner[at] for at in range(start, stop) if owner[at] is not None), None)
        if word is not None:
            first.setdefault(word, place)
        end = max(end, stop)
    starts = [0, *accumulate(len(word) + 1 for word in words)]
    cut = sum(starts[i] >= end for i in range(len(words)) if i not in first)
    places = [first[i] for i in sorted(first)]
    return Tagged(ids, places, [labels[i] for i in sorted(first)], number, cut, len(words) - len(first) - cut)


def _owners(words: Sequence[str]) -> list[int | None]:
    """The number of the word that each character of the joined text belongs to; None for the spaces between."""
    return list(_characters(words))[:-1]


def _characters(words: Sequence[str]) -> Iterator[int | None]:
    for number, word in enumerate(words):
        yield from (number for _ in word)
        yield None
