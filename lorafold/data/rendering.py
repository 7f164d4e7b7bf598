"""An `Example` becomes one text, with the spans in it that are to be learned.

With a chat template the spans are found by rendering the conversation up to each answer, once with the words that
open the answer (the generation prompt) and once with the answer itself: what was added is what the model must write.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from lorafold.data.rows import Example, Message
from lorafold.data.templates import AUTO, CHAT, check_template, render_prompt
from lorafold.errors import ConfigError, DataError


@dataclass(frozen=True)
class Rendered:
    """Text of one row.

    Attributes:
        text: all of it.
        spans: (start, end) of what is to be learned, in characters, ascending.
        template: the template that wrote it, or `text` for a row that is text already.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    template: str

    @property
    def add_special_tokens(self) -> bool:
        """Whether the tokenizer must add its own; a chat template writes them itself."""
        return self.template != CHAT


def render(example: Example, tokenizer: Any, template: str = AUTO) -> Rendered:
    """Write an example as text.

    Args:
        example: the row.
        tokenizer: transformers' tokenizer, for its chat template and end-of-text token.
        template: `auto`, `chat` or one of `TEMPLATES`. `auto` is the chat template where the tokenizer has one, else
            `alpaca` for instructions and `plain` for the rest. In a chat, instruction and input become one user turn,
            joined by a blank line. Rows of kind `text` are never put into a template.

    Raises:
        ConfigError: the template does not exist, or the tokenizer lacks what it needs.
        DataError: the conversation does not fit the template; names row and template.
    """
    if example.kind == "text":
        text = example.text + _end(tokenizer)
        return Rendered(text, ((0, len(text)),), "text")
    name = resolve_template(template, tokenizer, example.kind)
    if name == CHAT:
        return _render_chat(example, tokenizer)
    return _render_plain(example, tokenizer, name)


def render_request(example: Example | Sequence[Message], tokenizer: Any, template: str = AUTO) -> Rendered:
    """Write what stands before the answer to be generated; `spans` is empty.

    Args:
        example: an example, whose last answer is left out, or the turns of a conversation that ends before an answer.
        tokenizer: as for `render`.
        template: as for `render`.

    Raises:
        ConfigError: as for `render`.
        DataError: as for `render`.
    """
    if not isinstance(example, Example):
        example = Example(0, "messages", messages=(*example, {"role": "assistant", "content": ""}))
    if example.kind == "text":
        return Rendered(example.text, (), "text")
    name = resolve_template(template, tokenizer, example.kind)
    if name == CHAT:
        messages = conversation(example)
        before = messages[: _last_answer(messages, example.row)]
        return Rendered(_apply(tokenizer, before, example.row, generation=True), (), name)
    pieces = _pieces(example, tokenizer, name)
    return Rendered("".join(pieces[:-1]), (), name)


def resolve_template(template: str, tokenizer: Any, kind: str) -> str:
    """`chat` or one of `TEMPLATES`, for rows of a kind.

    Raises:
        ConfigError: the template does not exist, or the tokenizer has no chat template.
    """
    check_template(template)
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if template == CHAT and not has_chat:
        raise ConfigError("the model's tokenizer has no chat template: use --template alpaca or --template plain")
    if template != AUTO:
        return template
    return CHAT if has_chat else "alpaca" if kind == "instruction" else "plain"


def conversation(example: Example) -> tuple[Message, ...]:
    """The turns of an example: its own, or its prompt (and input, after a blank line) and its completion."""
    if example.kind == "messages":
        return example.messages
    asked = "\n\n".join(part for part in (example.prompt, example.input) if part)
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": example.completion})


def _render_chat(example: Example, tokenizer: Any) -> Rendered:
    messages = conversation(example)
    full = _apply(tokenizer, messages, example.row)
    spans = []
    for i, message in enumerate(messages):
        if i < example.given or message["role"] != "assistant":
            continue
        head = _apply(tokenizer, messages[:i], example.row, generation=True)
        tail = full if i == len(messages) - 1 else _apply(tokenizer, messages[: i + 1], example.row)
        if not tail.startswith(head):
            raise _rewrites(example.row, i, "does not open an answer with the words of its own generation prompt")
        if not full.startswith(tail):
            raise _rewrites(example.row, i, "rewrites an answer when the conversation goes on after it")
        spans.append((len(head), max(len(head), len(tail.rstrip()))))
    return Rendered(full, tuple(spans), CHAT)


def _rewrites(row: int, turn: int, what: str) -> DataError:
    return DataError(
        f"row {row}, turn {turn} (from 0): the tokenizer's chat template {what}, so what is learned would differ from "
        f"what is asked for later. Make one row per answer, or use --template alpaca or --template plain"
    )


def _apply(tokenizer: Any, messages: Sequence[Message], row: int, generation: bool = False) -> str:
    if not messages:
        raise DataError(f"row {row}: the conversation begins with the assistant: put a user turn before it")
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generation)
    except (TemplateError, TypeError, ValueError) as error:
        raise DataError(f"row {row}: the tokenizer's chat template refuses the conversation: {error}") from error


def _last_answer(messages: Sequence[Message], row: int) -> int:
    for i in range(len(messages) - 1, -1, -1):
        if messages[i]["role"] == "assistant":
            return i
    raise DataError(f"row {row}: the conversation has no assistant turn")


def _render_plain(example: Example, tokenizer: Any, name: str) -> Rendered:
    pieces = _pieces(example, tokenizer, name)
    first = sum(m["role"] == "assistant" for m in example.messages[: example.given])
    spans, start = [], 0
    for i, piece in enumerate(pieces):
        if i % 2 and i // 2 >= first:
            spans.append((start, start + len(piece)))
        start += len(piece)
    return Rendered("".join(pieces), tuple(spans), name)


def _pieces(example: Example, tokenizer: Any, name: str) -> list[str]:
    """[prompt, answer, prompt, answer, ...]; every answer ends in the end-of-text token."""
    end = _end(tokenizer)
    if example.kind != "messages":
        return [render_prompt(name, example.prompt, example.input), example.completion + end]
    messages = list(example.messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise DataError(
            f"row {example.row}: the template {name!r} needs user and assistant by turns (after at most one system "
            f"turn), ending with the assistant; found: {', '.join(m['role'] for m in example.messages)}"
        )
    pieces = []
    for i in range(0, len(messages), 2):
        asked = render_prompt(name, messages[i]["content"], system=system if i == 0 else "")
        pieces += [asked, messages[i + 1]["content"] + end]
    return pieces


def _end(tokenizer: Any) -> str:
    if not tokenizer.eos_token:
        raise ConfigError(
            "the tokenizer has no end-of-text token (eos_token), without which a model cannot learn to stop: set it "
            "in tokenizer_config.json, or use --template chat"
        )
    return tokenizer.eos_token
