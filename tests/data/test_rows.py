"""Columns of every known kind become the same conversation; rows that lack something are named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lorafold.data.rows import FORMATS, Example, detect_format, to_examples
from lorafold.errors import ConfigError, DataError


@dataclass
class Table:
    """Rows without a file."""

    rows: list[dict[str, Any]]

    @property
    def columns(self) -> Sequence[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        return {name: self.rows[index].get(name) for name in self.columns}


def _turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


TURNS = (_turn("system", "be kind"), _turn("user", "hi"), _turn("assistant", "hello"))
SHARE_GPT = [
    {"from": "system", "value": "be kind"},
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello"},
]
# format -> rows and what they become
CASES: dict[str, list[tuple[dict[str, Any], Example]]] = {
    "messages": [({"messages": list(TURNS)}, Example(0, "messages", messages=TURNS))],
    "conversations": [
        ({"conversations": SHARE_GPT, "id": "x"}, Example(0, "messages", messages=TURNS)),
        ({"conversations": [{"from": "user", "value": "a"}, {"from": "assistant", "value": "b"}]},
         Example(0, "messages", messages=(_turn("user", "a"), _turn("assistant", "b")))),
    ],
    "prompt": [
        ({"prompt": "q", "completion": " a "}, Example(0, "prompt", prompt="q", completion=" a ")),
        ({"prompt": "q", "completion": 4}, Example(0, "prompt", prompt="q", completion="4")),
        ({"prompt": list(TURNS), "completion": [_turn("assistant", "more")]},
         Example(0, "messages", messages=(*TURNS, _turn("assistant", "more")), given=3)),
        ({"prompt": "q", "completion": [_turn("assistant", "a")]},
         Example(0, "messages", messages=(_turn("user", "q"), _turn("assistant", "a")), given=1)),
        ({"prompt": [_turn("user", "q")], "completion": "a"},
         Example(0, "messages", messages=(_turn("user", "q"), _turn("assistant", "a")), given=1)),
    ],
    "instruction": [
        ({"instruction": "i", "input": "", "output": "o"}, Example(0, "instruction", prompt="i", completion="o")),
        ({"instruction": "i", "input": None, "output": "o"}, Example(0, "instruction", prompt="i", completion="o")),
        ({"instruction": "i", "output": "o"}, Example(0, "instruction", prompt="i", completion="o")),
        ({"instruction": "i", "context": "c", "response": "o", "category": "x"},
         Example(0, "instruction", prompt="i", input="c", completion="o")),
        ({"instruction": "i", "output": None, "response": "o"}, Example(0, "instruction", prompt="i", completion="o")),
    ],
    "text": [({"text": "all of it", "label": 1}, Example(0, "text", text="all of it"))],
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_found_by_their_columns(name: str) -> None:
    for row, expected in CASES[name]:
        table = Table([row])
        assert detect_format(table.columns) == name
        assert to_examples(table) == [expected]


def test_indices_choose_rows_and_keep_their_numbers() -> None:
    table = Table([{"text": letter} for letter in "abc"])
    assert [(e.row, e.text) for e in to_examples(table, indices=[2, 0])] == [(2, "c"), (0, "a")]


def test_templates_put_columns_into_text() -> None:
    table = Table([{"name": "N{x}", "two words": "T", "n": 1.5, "tags": ["ä"], "none": None}])
    [example] = to_examples(
        table, prompt_template="{{{name}}} {two words}{none} {{}} {tags}", completion_template="{n}/{name}"
    )
    assert example == Example(0, "prompt", prompt='{N{x}} T {} ["ä"]', completion="1.5/N{x}")


def test_templates_go_before_known_formats() -> None:
    table = Table([{"text": "t", "label": "l"}])
    [example] = to_examples(table, prompt_template="{text}", completion_template="{label}")
    assert (example.prompt, example.completion) == ("t", "l")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{descripton}",
            r"no column 'descripton' \(did you mean 'description'\?\)\nthe columns are: name, description",
        ),
        ("{name.upper}", "no column 'name.upper'"),
        ("{name!r} {name:>9}", "no column 'name!r'.*\n.*no column 'name:>9'"),
        ("{}", "no column ''"),
        ("{name", "a single { at character 0: double it"),
        ("name}", "a single } at character 4"),
    ],
)
def test_templates_with_faults(template: str, message: str) -> None:
    table = Table([{"name": "a", "description": "b"}])
    with pytest.raises(DataError, match=message):
        to_examples(table, prompt_template=template, completion_template="{name}")
    with pytest.raises(DataError, match=message):
        to_examples(table, prompt_template="{name}", completion_template=template)


def test_templates_come_in_pairs_and_the_answer_differs_by_row() -> None:
    table = Table([{"a": "x"}])
    with pytest.raises(ConfigError, match="--completion is missing"):
        to_examples(table, prompt_template="{a}")
    with pytest.raises(ConfigError, match="--prompt is missing"):
        to_examples(table, completion_template="{a}")
    with pytest.raises(ConfigError, match="names no column"):
        to_examples(table, prompt_template="{a}", completion_template="yes")


def test_unknown_columns_list_what_is_known() -> None:
    with pytest.raises(DataError) as caught:
        to_examples(Table([{"question": "q", "answer": "a"}]))
    message = str(caught.value)
    assert "found: question, answer" in message
    assert "instruction, output or response, (input or context)" in message
    assert '--prompt "{question}" --completion "{answer}"' in message
    for row_format in FORMATS.values():
        assert row_format.describe() in message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": None}, "messages is empty"),
        ({"messages": "hi"}, "messages is not a list of turns"),
        ({"messages": ["hi"]}, "a turn that is not an object"),
        ({"messages": [_turn("user", "hi")]}, "no assistant turn to learn from"),
        ({"messages": [_turn("robot", "hi")]}, "the role 'robot'; known: system, user"),
        ({"messages": [_turn("user", None), _turn("assistant", "x")]}, "role 'user' whose content is not text"),
        ({"messages": [_turn("user", "hi"), _turn("assistant", " ")]}, "an empty assistant turn"),
        ({"messages": [{**_turn("assistant", "x"), "tool_calls": [1]}]}, "tool calls"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, r"the role \['gpt'\]"),
        ({"prompt": " ", "completion": "a"}, "prompt is empty"),
        ({"prompt": "q", "completion": None}, "completion is empty"),
        ({"prompt": "q", "completion": {"a": 1}}, "completion is an object, not text"),
        ({"prompt": list(TURNS), "completion": [_turn("user", "x")]}, "completion has no assistant turn"),
        ({"instruction": "", "output": "x"}, "instruction is empty"),
        ({"instruction": "x", "output": ""}, "output is empty"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_rows_that_lack_something_are_named(row: dict[str, Any], message: str) -> None:
    [(good, _), *_] = CASES[detect_format(list(row))]
    rows = [good, *([row] * 7), good]
    with pytest.raises(DataError, match=message) as caught:
        to_examples(Table(rows))
    assert "7 of 9 rows cannot be used (rows are counted from 0)" in str(caught.value)
    assert "7 rows (1, 2, 3, 4, 5, ...)" in str(caught.value)


def test_several_faults_are_listed_together() -> None:
    with pytest.raises(DataError, match=r"prompt is empty: 1 row \(0\)\n  - completion is empty: 2 rows \(1, 2\)"):
        to_examples(Table([{"prompt": "", "completion": "a"}, *([{"prompt": "a", "completion": ""}] * 2)]))


def test_templates_name_the_empty_columns() -> None:
    table = Table([{"q": "x", "note": None, "a": "y"}, {"q": "", "note": None, "a": "y"}, {"q": "x", "a": "  "}])
    with pytest.raises(DataError, match=r"prompt: nothing in 'q', 'note': 1 row \(1\)\n.*nothing in 'a': 1 row \(2\)"):
        to_examples(table, prompt_template="Q: {q} {note}", completion_template="A: {a}")
