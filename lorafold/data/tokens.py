"""Text becomes tokens, each marked as to be learned or not.

A row is tokenized as a whole, as a runtime does. Where that would merge the end of a prompt with the beginning of its
answer, the row is tokenized in two parts instead: a model that is asked later sees the prompt alone, tokenized
without the answer, and must have learned to go on from just these tokens.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lorafold.data.rendering import Rendered, render, render_request
from lorafold.data.rows import Example, Message
from lorafold.data.templates import AUTO
from lorafold.errors import ConfigError, DataError

_BATCH = 1000  # rows tokenized at once
_TAIL = 6  # tokens before a border that are tokenized again
_COMPARED = 2  # and of these the last so many must agree
# token ids [T] and the character at which each of them starts [T], ascending
_Encoded = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Tokens:
    """One row as tokens.

    Attributes:
        ids: token ids, [T].
        supervised: whether a token is to be predicted, [T]; never the first, which nothing precedes.
        row: number of the row in its source.
    """

    ids: list[int]
    supervised: list[bool]
    row: int

    def __post_init__(self) -> None:
        assert len(self.ids) == len(self.supervised)
        assert not any(self.supervised[:1])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Tokenized:
    """All rows as tokens, and what was lost.

    Attributes:
        rows: the rows that have something to learn, in order.
        cut: rows that were longer than `max_length`.
        cut_tokens: tokens that were cut off from them.
        dropped: numbers of the rows that had no supervised token (left).
        max_length: tokens per row, at most.
        templates: the templates used; `text` stands for rows without one.
    """

    rows: list[Tokens]
    cut: int
    cut_tokens: int
    dropped: list[int]
    max_length: int
    templates: tuple[str, ...]

    def describe(self) -> str:
        """Say what there is to learn and what was lost, in a sentence or two."""
        total = sum(map(len, self.rows))
        learned = sum(sum(row.supervised) for row in self.rows)
        said = (
            f"{_count(len(self.rows), 'row')} of {total:,} tokens, {learned:,} of them supervised "
            f"({learned / max(total, 1):.0%}); template: {', '.join(self.templates)}."
        )
        return said + describe_lost(self.cut, self.cut_tokens, self.dropped, self.max_length)


@dataclass(frozen=True)
class TokenizedRow:
    """What became of one example.

    Attributes:
        tokens: cut to `max_length`; nothing in it may be supervised.
        lost: tokens that were cut off.
        template: as in `Rendered`.
        answer: number, from 1, of the first supervised token of the whole row, if there is one.
    """

    tokens: Tokens
    lost: int
    template: str
    answer: int | None


def describe_lost(cut: int, cut_tokens: int, dropped: Sequence[int], max_length: int) -> str:
    """Sentences, each after a space, about the rows that were cut and those that were dropped; see `Tokenized`."""
    said = ""
    if cut:
        said += (
            f" {_count(cut, 'row')} longer than {max_length:,} tokens {'was' if cut == 1 else 'were'} cut "
            f"({_count(cut_tokens, 'token')} lost)."
        )
    if dropped:
        shown = ", ".join(map(str, dropped[:5])) + (", ..." if len(dropped) > 5 else "")
        said += f" {_count(len(dropped), 'row')} dropped, with nothing left to learn: {shown}."
    return said


def tokenize(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    template: str = AUTO,
    max_length: int = 1024,
    supervise: Literal["completion", "all"] = "completion",
    progress: Callable[[int, int], None] | None = None,
) -> Tokenized:
    """Tokenize examples and mark what is to be learned.

    Answers are supervised with the token that ends them, but not with the white space that a chat template writes
    after it. A token belongs to the side of a border on which it starts. Before an answer none crosses the border (the
    row is cut there if need be): what precedes the last answer is what `prompt_ids` gives for a row of one answer.

    Args:
        examples: the rows.
        tokenizer: transformers' fast tokenizer.
        template: `auto`, `chat` or one of `TEMPLATES`; see `rendering.render`.
        max_length: rows are cut on the right to so many tokens.
        supervise: `completion` (the answers) or `all` (every token but the first).
        progress: called with (rows done, rows in all).

    Raises:
        ConfigError: an option has a value that is not allowed, or the tokenizer cannot do what is needed.
        DataError: there are no rows, a conversation does not fit the template, or nothing is left to learn.
    """
    _check_options(tokenizer, max_length, supervise)
    if not examples:
        raise DataError("there are no rows to tokenize")
    rows, dropped, lost, needed, templates = [], [], [], [], {}
    same: dict[int, int] = {}  # one object for each token of the vocabulary, not one for each token of the rows
    for row in tokenize_each(examples, tokenizer, template, max_length, supervise, progress):
        templates[row.template] = True
        if any(row.tokens.supervised):
            rows.append(replace(row.tokens, ids=[same.setdefault(i, i) for i in row.tokens.ids]))
            lost.append(row.lost)
        else:
            dropped.append(row.tokens.row)
            needed += [row.answer] if row.answer else []
    if not rows:
        raise _nothing_left(len(examples), max_length, needed)
    return Tokenized(rows, sum(n > 0 for n in lost), sum(lost), dropped, max_length, tuple(templates))


def tokenize_each(
    examples: Sequence[Example],
    tokenizer: Any,
    template: str,
    max_length: int,
    supervise: str,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[TokenizedRow]:
    """Every example as tokens, those with nothing to learn as well; arguments as for `tokenize`."""
    for used, row, ids, mask in _tokenize_all(examples, tokenizer, template, progress):
        if supervise == "all":
            mask = [i > 0 for i in range(len(ids))]
        answer = mask.index(True) + 1 if True in mask else None
        tokens = Tokens(ids[:max_length], mask[:max_length], row)
        yield TokenizedRow(tokens, max(0, len(ids) - max_length), used, answer)


def prompt_ids(example: Example | Sequence[Message], tokenizer: Any, template: str = AUTO) -> list[int]:
    """Token ids to generate an answer from.

    Args:
        example: an example, whose last answer is left out, or turns of a conversation that end before an answer.
        tokenizer: transformers' fast tokenizer.
        template: as for `tokenize`.

    Raises:
        ConfigError: the template does not exist, or the tokenizer lacks what it needs.
        DataError: the conversation does not fit the template.
    """
    request = render_request(example, tokenizer, template)
    ids = _encode([request.text], tokenizer, request.add_special_tokens)[0][0]
    if not ids:
        raise DataError("the prompt is empty: there is nothing to go on from")
    return ids


def _check_options(tokenizer: Any, max_length: int, supervise: str) -> None:
    if supervise not in ("completion", "all"):
        raise ConfigError(f"supervise is {supervise!r}; it must be 'completion' or 'all'")
    if max_length < 2:
        raise ConfigError(f"max_length is {max_length}; it must be at least 2 tokens: one to see and one to predict")
    if not tokenizer.is_fast:
        raise ConfigError("the tokenizer is a slow one, which cannot tell where its tokens stand: add tokenizer.json")


def _nothing_left(count: int, max_length: int, needed: list[int]) -> DataError:
    if needed:
        return DataError(
            f"nothing is left to learn: in all {_count(count, 'row')} the first {max_length:,} tokens hold no answer. "
            f"The answers begin at token {min(needed):,} to {max(needed):,}: raise --max-length above that, or "
            f"shorten the prompts"
        )
    return DataError(
        f"nothing is left to learn: none of the {_count(count, 'row')} has a token to predict. Check with  lorafold "
        f"preview  that the answers are not empty, or use --template plain"
    )


def _tokenize_all(
    examples: Sequence[Example], tokenizer: Any, template: str, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, int, list[int], list[bool]]]:
    """Per example: the template used, row number, ids [T], whether each is part of an answer [T]."""
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        rendered = [render(example, tokenizer, template) for example in batch]
        for example, text, (ids, mask) in zip(batch, rendered, _tokenize_batch(rendered, tokenizer), strict=True):
            yield text.template, example.row, ids, mask
        if progress:
            progress(start + len(batch), len(examples))


def _tokenize_batch(rendered: list[Rendered], tokenizer: Any) -> Iterator[tuple[list[int], list[bool]]]:
    encoded: list[_Encoded] = [([], [])] * len(rendered)
    for special in (True, False):
        chosen = [i for i, r in enumerate(rendered) if r.add_special_tokens is special]
        for i, found in zip(chosen, _encode([rendered[i].text for i in chosen], tokenizer, special), strict=True):
            encoded[i] = found
    crossed = _crossed_borders(rendered, encoded, tokenizer)
    for i, (row, found) in enumerate(zip(rendered, encoded, strict=True)):
        ids, starts = _encode_parts(row, crossed[i], tokenizer) if i in crossed else found
        mask = [False] * len(ids)
        for a, b in row.spans:
            first, end = bisect.bisect_left(starts, a), bisect.bisect_left(starts, b)
            mask[first:end] = [True] * (end - first)
        mask[:1] = [False] * len(mask[:1])
        yield ids, mask


def _encode(texts: list[str], tokenizer: Any, special: bool) -> list[_Encoded]:
    """Tokenize texts; special tokens that the tokenizer adds at the end are left out, as an answer brings its own."""
    if not texts:
        return []
    found = tokenizer(
        texts,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    encoded = []
    for ids, offsets, added in zip(
        found["input_ids"], found["offset_mapping"], found["special_tokens_mask"], strict=True
    ):
        end = len(ids)
        while special and end > 1 and added[end - 1] and offsets[end - 1] == (0, 0):
            end -= 1
        encoded.append((list(ids[:end]), [start for start, _ in offsets[:end]]))
    return encoded


def _crossed_borders(rendered: list[Rendered], encoded: list[_Encoded], tokenizer: Any) -> dict[int, list[int]]:
    """Row -> beginnings of answers before which the whole row's tokens are not those of the prompt alone.

    The few tokens before each border are tokenized again by themselves; most rows share these few.
    """
    tails: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for i, (row, (ids, starts)) in enumerate(zip(rendered, encoded, strict=True)):
        for border, _ in row.spans:
            end = bisect.bisect_left(starts, border)
            first = max(0, end - _TAIL)
            if border > 0 and end > 0:
                tail = row.text[starts[first] : border]
                tails.setdefault((tail, tuple(ids[first:end][-_COMPARED:])), []).append((i, border))
    alone = _encode([tail for tail, _ in tails], tokenizer, special=False)
    crossed: dict[int, list[int]] = {}
    for ((_, together), places), (apart, _) in zip(tails.items(), alone, strict=True):
        compared = min(len(apart), len(together))  # a token put before the text may stand among those together
        if tuple(apart[len(apart) - compared :]) != together[len(together) - compared :]:
            for i, border in places:
                crossed.setdefault(i, []).append(border)
    return crossed


def _encode_parts(row: Rendered, borders: list[int], tokenizer: Any) -> _Encoded:
    """Tokenize a row in parts that begin at the borders."""
    ids: list[int] = []
    starts: list[int] = []
    edges = [0, *borders, len(row.text)]
    for first, last in itertools.pairwise(edges):
        special = row.add_special_tokens and first == 0
        part, offsets = _encode([row.text[first:last]], tokenizer, special)[0]
        ids += part
        starts += [first + offset for offset in offsets]
    return ids, starts


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
