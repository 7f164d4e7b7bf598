"""Which tokens are learned, and that generation begins from the very tokens that training saw."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

from lorafold.data.rows import Example, Message
from lorafold.data.tokens import Tokenized, Tokens, prompt_ids, tokenize
from lorafold.errors import ConfigError, DataError
from tests.data.tiny_tokenizers import byte_level, needs_smollm2, sentencepiece, smollm2

TALK: tuple[Message, ...] = (
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "sat"},
    {"role": "user", "content": "on?"},
    {"role": "assistant", "content": " the mat"},
)


def _prompt(prompt: str, completion: str, row: int = 0) -> Example:
    return Example(row, "prompt", prompt=prompt, completion=completion)


def _learned(tokens: Tokens, tokenizer: Any) -> str:
    return tokenizer.decode([i for i, s in zip(tokens.ids, tokens.supervised, strict=True) if s])


@needs_smollm2
def test_chat_of_several_turns_against_a_mask_written_by_hand() -> None:
    tokenizer = smollm2()
    [found] = tokenize([Example(5, "messages", messages=TALK)], tokenizer).rows
    shown = [(tokenizer.decode([i]), s) for i, s in zip(found.ids, found.supervised, strict=True)]
    start = next(i for i, (text, _) in enumerate(shown) if text == "user") - 1
    assert found.row == 5
    assert not any(s for _, s in shown[:start])  # the default system prompt
    assert shown[start:] == [
        ("<|im_start|>", False), ("user", False), ("\n", False), ("the", False), (" cat", False), ("?", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("ass", False), ("istant", False), ("\n", False),
        ("sat", True), ("<|im_end|>", True), ("\n", False),
        ("<|im_start|>", False), ("user", False), ("\n", False), ("on", False), ("?", False),
        ("<|im_end|>", False), ("\n", False),
        ("<|im_start|>", False), ("ass", False), ("istant", False), ("\n", False), (" the", True), (" mat", True),
        ("<|im_end|>", True), ("\n", False),
    ]  # fmt: skip


PROMPTS = [
    "Q",
    "Label:",
    "Label: ",
    "Text:\n",
    "two\n\n",
    "three\n\n\n",
    "spaces   ",
    "\n",
    "das caf\u00e9 ",
    "\u2028",
    "😀",
]
ANSWERS = ["positive", " positive", "\npositive", "  indented", "한국어", "\n\n", "é", "a b\n"]
PAIRS = list(itertools.product(PROMPTS, ANSWERS))
TOKENIZERS = {
    "byte level": byte_level,
    "byte level with ends": lambda: byte_level(ends=True),
    "sentencepiece": sentencepiece,
    "smollm2": smollm2,
}


@pytest.mark.parametrize("template", ["auto", "alpaca", "plain", "raw"])
@pytest.mark.parametrize("name", [*itertools.islice(TOKENIZERS, 3), pytest.param("smollm2", marks=needs_smollm2)])
def test_a_row_begins_with_exactly_the_tokens_it_is_generated_from(name: str, template: str) -> None:
    tokenizer = TOKENIZERS[name]()
    examples = [_prompt(prompt, answer, row) for row, (prompt, answer) in enumerate(PAIRS)]
    found = tokenize(examples, tokenizer, template=template)
    assert len(found.rows) == len(PAIRS)
    end = "<|im_end|>" if found.templates == ("chat",) else tokenizer.eos_token
    for tokens, example in zip(found.rows, examples, strict=True):
        asked = prompt_ids(example, tokenizer, template)
        assert tokens.ids[: len(asked)] == asked
        assert tokens.supervised.index(True) == len(asked)
        learned = _learned(tokens, tokenizer)
        # sentencepiece decodes a first token without its leading space
        assert learned.lstrip(" ") == (example.completion + end).lstrip(" ")
        assert name == "sentencepiece" or learned == example.completion + end


def test_a_token_across_the_border_is_split_there() -> None:
    tokenizer = byte_level()
    [row] = tokenize([_prompt("the cat", "s", 0)], tokenizer, template="raw").rows
    [spaced] = tokenize([_prompt("a ", "the")], tokenizer, template="raw").rows
    assert [tokenizer.decode([i]) for i in spaced.ids][:3] == ["a", " ", "t" if len(spaced.ids) > 4 else "the"]
    assert spaced.supervised[:3] == [False, False, True]
    assert row.ids == tokenizer.encode("the cat") + tokenizer.encode("s") + [tokenizer.eos_token_id]


def test_special_tokens_of_the_tokenizer() -> None:
    bos, eos = sentencepiece().bos_token_id, sentencepiece().eos_token_id
    [row] = tokenize([_prompt("the", "cat")], sentencepiece(), template="raw").rows
    assert (row.ids[0], row.ids[-1], row.ids.count(bos), row.ids.count(eos)) == (bos, eos, 1, 1)
    assert row.supervised[0] is False
    closing = byte_level(ends=True)
    [row] = tokenize([_prompt("the", "cat")], closing, template="raw").rows
    assert [row.ids[0], row.ids[-1]] == [closing.eos_token_id] * 2
    assert row.ids[-2] != closing.eos_token_id  # the end that the tokenizer would add is not doubled
    assert prompt_ids(_prompt("the", "x"), closing, "raw")[-1] != closing.eos_token_id
    [chat] = tokenize([_prompt("the", "cat")], closing).rows
    assert closing.eos_token_id not in chat.ids  # a chat template writes its own


def test_text_rows_learn_everything_but_the_first_token() -> None:
    [row] = tokenize([Example(0, "text", text="the cat sat")], byte_level()).rows
    assert row.supervised == [False] + [True] * (len(row) - 1)
    assert row.ids[-1] == byte_level().eos_token_id


def test_supervise_all_changes_the_mask_only() -> None:
    examples = [_prompt("a ", "the"), Example(1, "messages", messages=TALK)]
    for template in ("chat", "raw"):
        some = tokenize(examples, byte_level(), template=template).rows
        every = tokenize(examples, byte_level(), template=template, supervise="all").rows
        assert [row.ids for row in some] == [row.ids for row in every]
        assert all(row.supervised == [False] + [True] * (len(row) - 1) for row in every)


def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [_prompt(prompt, answer, row) for row, (prompt, answer) in enumerate(PAIRS)]
    examples.insert(3, Example(99, "text", text="the"))
    calls = []
    whole = tokenize(examples, byte_level(), template="raw")
    monkeypatch.setattr("lorafold.data.tokens._BATCH", 10)
    assert tokenize(examples, byte_level(), template="raw", progress=lambda *call: calls.append(call)) == whole
    assert calls[0] == (10, len(examples))
    assert calls[-1] == (len(examples), len(examples))


def test_long_rows_are_cut_and_rows_without_an_answer_left_are_dropped() -> None:
    examples = [_prompt("a", "the" * 50, 10), _prompt("a" * 60, "the", 11), _prompt("a", "the", 12)]
    lengths = [len(row) for row in tokenize(examples, byte_level(), template="raw").rows]
    found = tokenize(examples, byte_level(), template="raw", max_length=20)
    assert [row.row for row in found.rows] == [10, 12]
    assert (found.cut, found.cut_tokens, found.dropped) == (1, lengths[0] - 20, [11])
    assert len(found.rows[0]) == 20
    said = found.describe()
    assert said.startswith("2 rows of 2")
    assert f"1 row longer than 20 tokens was cut ({lengths[0] - 20} tokens lost)" in said
    assert "1 row dropped, with nothing left to learn: 11." in said


def test_description_of_rows_without_loss() -> None:
    found = Tokenized([Tokens([1, 2, 3, 4], [False, False, False, True], 0)] * 1500, 0, 0, [], 8, ("chat",))
    assert found.describe() == "1,500 rows of 6,000 tokens, 1,500 of them supervised (25%); template: chat."


def test_nothing_left_to_learn_says_why() -> None:
    examples = [_prompt("a" * 60, "the"), _prompt("a" * 80, "the")]
    with pytest.raises(DataError, match=r"first 8 tokens hold no answer. .* token 61 to 81: raise --max-length"):
        tokenize(examples, byte_level(), template="raw", max_length=8)
    alone = byte_level(None).__class__(tokenizer_object=byte_level().backend_tokenizer, eos_token="<|endoftext|>")
    with pytest.raises(DataError, match="none of the 1 row has a token to predict"):
        tokenize([Example(0, "text", text="")], alone)
    with pytest.raises(DataError, match="no rows to tokenize"):
        tokenize([], byte_level())


def test_options_that_are_not_allowed() -> None:
    examples = [_prompt("a", "b")]
    with pytest.raises(ConfigError, match="must be 'completion' or 'all'"):
        tokenize(examples, byte_level(), supervise="everything")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        tokenize(examples, byte_level(), max_length=1)
    with pytest.raises(ConfigError, match="no template 'alpacca'"):
        tokenize(examples, byte_level(), template="alpacca")
    with pytest.raises(ConfigError, match=r"slow one.*tokenizer\.json"):
        tokenize(examples, SimpleNamespace(is_fast=False))


def test_prompt_ids_of_turns_equal_those_of_the_example() -> None:
    example = Example(0, "messages", messages=TALK)
    for template in ("chat", "plain"):
        ids = prompt_ids(example, byte_level(), template)
        assert ids == prompt_ids(TALK[:3], byte_level(), template)
        [row] = tokenize([example], byte_level(), template=template).rows
        assert row.ids[: len(ids)] == ids
