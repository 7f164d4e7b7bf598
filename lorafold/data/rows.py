"""A row of a file becomes an `Example`: a conversation, an instruction, a prompt with its completion, or plain text.

The columns decide which (`FORMATS`, the first that fits), or two templates that name columns do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypedDict

from lorafold.data.fill import columns_of, fill, filling, is_missing
from lorafold.errors import ConfigError, DataError, bullet_list

# spellings of a speaker -> the role that chat templates know
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
}
_SHOWN = 5  # rows listed per fault


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


class RowSource(Protocol):
    """What is needed of the rows; `read.Rows` has it."""

    @property
    def columns(self) -> Sequence[str]:
        """Names of all columns."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Example:
    """One row, ready to be rendered.

    Attributes:
        row: number of the row in its source, from 0.
        kind: which of the fields below are filled: `messages`; `instruction` (prompt, input, completion);
            `prompt` (prompt, completion); `text` (text).
        messages: turns in order, of which the assistant's are learned.
        given: so many of the first messages are context only, even where the assistant speaks.
        prompt: what is asked.
        input: what the instruction applies to; may be empty.
        completion: the answer to learn.
        text: learned as a whole.
    """

    row: int
    kind: Literal["messages", "instruction", "prompt", "text"]
    messages: tuple[Message, ...] = ()
    given: int = 0
    prompt: str = ""
    input: str = ""
    completion: str = ""
    text: str = ""


@dataclass(frozen=True)
class RowFormat:
    """A known set of columns.

    Attributes:
        required: columns that must be there, each with its aliases after it.
        optional: columns that may be there, each with its aliases after it.
        is_text: text in each required column is enough.
        convert: (row number, {column: value}) -> Example; the aliases are resolved to the first name, row by row.
    """

    required: tuple[tuple[str, ...], ...]
    convert: Callable[[int, dict[str, Any]], Example]
    optional: tuple[tuple[str, ...], ...] = ()
    is_text: bool = True

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether every required column, or an alias of it, is among the columns."""
        found = set(columns)
        return all(found.intersection(names) for names in self.required)

    def cells(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values of a row under the first name of each column; None where a column is missing."""
        return {
            names[0]: next((row[name] for name in names if not is_missing(row.get(name))), None)
            for names in self.required + self.optional
        }

    def describe(self) -> str:
        """The columns in words, for messages and documentation."""
        optional = [f"({' or '.join(names)})" for names in self.optional]
        return ", ".join([" or ".join(names) for names in self.required] + optional)


class _RowFault(Exception):
    """A row cannot become an example; the message names the column."""


@dataclass(frozen=True)
class Converter:
    """Makes examples of the rows of one source.

    Attributes:
        convert: (row number, cells) -> Example.
        columns: a row with text, and not only white space, in all of these is sound; None where more must hold.
    """

    convert: Callable[[int, dict[str, Any]], Example]
    columns: tuple[str, ...] | None


def to_examples(
    rows: RowSource,
    *,
    indices: Iterable[int] | None = None,
    prompt_template: str | None = None,
    completion_template: str | None = None,
) -> list[Example]:
    """Turn rows into examples.

    Args:
        rows: the source, with `columns` and `rows[i] -> dict`.
        indices: rows to take, in this order; all by default.
        prompt_template: text with column names in braces, such as `"Translate: {english}"`; doubled braces stand
            for themselves. Given together with `completion_template`, and then the columns may have any names.
        completion_template: the same for the answer, such as `"{french}"`.

    Raises:
        ConfigError: only one of the templates is given, or the completion names no column.
        DataError: a template names no known column, the columns fit no format, or rows lack required values; each
            fault with the number of rows and the first of them.
    """
    convert = converter(rows.columns, prompt_template, completion_template)
    chosen = range(len(rows)) if indices is None else map(int, indices)
    return list(_converted(((index, rows[index]) for index in chosen), convert, 0))


def converter(columns: Sequence[str], prompt_template: str | None, completion_template: str | None) -> Converter:
    """What turns the rows of a source with these columns into examples; as in `to_examples`."""
    if (prompt_template is None) != (completion_template is None):
        missing = "--completion" if completion_template is None else "--prompt"
        raise ConfigError(f"--prompt and --completion belong together, and {missing} is missing")
    if prompt_template is not None and completion_template is not None:
        return _by_templates(prompt_template, completion_template, columns)
    return _by_format(columns)


def check_rows(rows: Iterable[tuple[int, dict[str, Any]]], convert: Converter, sound: int) -> None:
    """Find every row, of numbers with rows, that cannot become an example.

    Args:
        sound: other rows, of which this is known.

    Raises:
        DataError: as `to_examples`.
    """
    deque(_converted(rows, convert, sound), maxlen=0)


def _converted(rows: Iterable[tuple[int, dict[str, Any]]], convert: Converter, good: int) -> Iterator[Example]:
    """Examples; the faults of all rows are raised after the last."""
    faults: dict[str, list[int]] = {}
    for index, row in rows:
        try:
            example = convert.convert(index, row)
        except _RowFault as fault:  # noqa: PERF203
            faults.setdefault(str(fault), []).append(index)
        else:
            good += 1
            yield example
    if faults:
        raise DataError(_fault_message(faults, good))


def detect_format(columns: Sequence[str]) -> str:
    """Name of the first of `FORMATS` that fits the columns.

    Raises:
        DataError: none fits; the message lists the columns, the formats and how to use templates.
    """
    for name, row_format in FORMATS.items():
        if row_format.fits(columns):
            return name
    known = bullet_list(row_format.describe() for row_format in FORMATS.values())
    first, last = columns[0], columns[-1]
    raise DataError(
        f"the columns fit no known format; found: {', '.join(columns)}\nknown formats (aliases after 'or', optional "
        f"columns in parentheses):\n{known}\nor say what is asked and what is to be answered, for example  "
        f'--prompt "{{{first}}}" --completion "{{{last}}}"'
    )


def _by_format(columns: Sequence[str]) -> Converter:
    row_format = FORMATS[detect_format(columns)]
    first = tuple(next(name for name in names if name in columns) for names in row_format.required)
    return Converter(
        lambda index, row: row_format.convert(index, row_format.cells(row)), first if row_format.is_text else None
    )


def _by_templates(prompt: str, completion: str, columns: Sequence[str]) -> Converter:
    asked, answered = columns_of(prompt, columns), columns_of(completion, columns)
    if not answered:
        raise ConfigError(f"the completion {completion!r} names no column: every row would have the same answer")

    def convert(index: int, row: dict[str, Any]) -> Example:
        for option, names in (("prompt", asked), ("completion", answered)):
            if names and not any(filling(row[name]).strip() for name in names):
                raise _RowFault(f"{option}: nothing in {', '.join(map(repr, dict.fromkeys(names)))}")
        return Example(index, "prompt", prompt=fill(prompt, row), completion=fill(completion, row))

    return Converter(convert, tuple({*asked, *answered}))


def _fault_message(faults: dict[str, list[int]], good: int) -> str:
    bad = sum(map(len, faults.values()))
    lines = []
    for fault, found in list(faults.items())[:20]:
        shown = ", ".join(map(str, found[:_SHOWN])) + (", ..." if len(found) > _SHOWN else "")
        lines.append(f"{fault}: {len(found):,} row{'s' if len(found) > 1 else ''} ({shown})")
    return (
        f"{bad:,} of {bad + good:,} rows cannot be used (rows are counted from 0):\n{bullet_list(lines)}\n"
        f"complete these rows or take them out"
    )


def _text(cells: Mapping[str, Any], column: str, required: bool = True) -> str:
    value = cells[column]
    if isinstance(value, (list, dict)):
        raise _RowFault(f"{column} is {'a list' if isinstance(value, list) else 'an object'}, not text")
    text = filling(value)
    if required and not text.strip():
        raise _RowFault(f"{column} is empty")
    return text


def _turns(value: Any, column: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        what = "is empty" if value is None or value in ([], "") else "is not a list of turns"
        raise _RowFault(f"{column} {what}")
    return tuple(_turn(turn, column) for turn in value)


def _turn(turn: Any, column: str) -> Message:
    if not isinstance(turn, dict):
        raise _RowFault(f"{column} holds a turn that is not an object with role and content")
    role = turn.get("from") if turn.get("role") is None else turn["role"]
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise _RowFault(f"{column} has the role {role!r}; known: {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise _RowFault(f"{column} has a turn of role {role!r} whose content is not text")
    if turn.get("tool_calls"):
        raise _RowFault(f"{column} has tool calls, which are not supported: write them into the content")
    if ROLES[role] == "assistant" and not content.strip():
        raise _RowFault(f"{column} has an empty assistant turn")
    return {"role": ROLES[role], "content": content}


def _conversation(index: int, messages: tuple[Message, ...], column: str, given: int = 0) -> Example:
    if not any(message["role"] == "assistant" for message in messages[given:]):
        raise _RowFault(f"{column} has no assistant turn to learn from")
    return Example(index, "messages", messages=messages, given=given)


def _messages(index: int, cells: dict[str, Any]) -> Example:
    return _conversation(index, _turns(cells["messages"], "messages"), "messages")


def _share_gpt(index: int, cells: dict[str, Any]) -> Example:
    return _conversation(index, _turns(cells["conversations"], "conversations"), "conversations")


def _prompt_completion(index: int, cells: dict[str, Any]) -> Example:
    if not any(isinstance(cells[column], list) for column in ("prompt", "completion")):
        return Example(index, "prompt", prompt=_text(cells, "prompt"), completion=_text(cells, "completion"))
    turns = {}
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        is_list = isinstance(cells[column], list)
        turns[column] = _turns(cells[column], column) if is_list else ({"role": role, "content": _text(cells, column)},)
    messages = turns["prompt"] + turns["completion"]
    return _conversation(index, messages, "completion", given=len(turns["prompt"]))


def _instruction(index: int, cells: dict[str, Any]) -> Example:
    instruction, output = _text(cells, "instruction"), _text(cells, "output")
    extra = _text(cells, "input", required=False)
    return Example(index, "instruction", prompt=instruction, input=extra, completion=output)


def _plain_text(index: int, cells: dict[str, Any]) -> Example:
    return Example(index, "text", text=_text(cells, "text"))


# name -> columns and converter; the first whose columns are all there is taken
FORMATS: dict[str, RowFormat] = {
    "messages": RowFormat((("messages",),), _messages, is_text=False),
    "conversations": RowFormat((("conversations",),), _share_gpt, is_text=False),
    "prompt": RowFormat((("prompt",), ("completion",)), _prompt_completion),
    # the aliases are the columns of databricks-dolly
    "instruction": RowFormat(
        (("instruction",), ("output", "response")), _instruction, optional=(("input", "context"),)
    ),
    "text": RowFormat((("text",),), _plain_text),
}
