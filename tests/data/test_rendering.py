"""The text of an example, and exactly which characters of it are learned."""

from __future__ import annotations

import copy

import pytest

from lorafold.data.rendering import Rendered, render, render_request
from lorafold.data.rows import Example, Message
from lorafold.errors import ConfigError, DataError
from tests.data.tiny_tokenizers import CHATML, FORGETFUL, STRICT, byte_level, needs_smollm2, smollm2

U1: Message = {"role": "user", "content": "one?"}
A1: Message = {"role": "assistant", "content": " first \n"}
U2: Message = {"role": "user", "content": "two?"}
A2: Message = {"role": "assistant", "content": "second"}
S: Message = {"role": "system", "content": "be kind"}
TALK = Example(7, "messages", messages=(S, U1, A1, U2, A2))
INSTRUCTION = Example(0, "instruction", prompt="Sort", input="b a", completion="a b")
PROMPT = Example(0, "prompt", prompt="Q", completion="A")
TEXT = Example(0, "text", text="whole")


def _learned(rendered: Rendered) -> list[str]:
    return [rendered.text[a:b] for a, b in rendered.spans]


def test_chat_of_several_turns() -> None:
    found = render(TALK, byte_level())
    assert found.template == "chat"
    assert found.text == (
        "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\none?<|im_end|>\n"
        "<|im_start|>assistant\n first \n<|im_end|>\n<|im_start|>user\ntwo?<|im_end|>\n"
        "<|im_start|>assistant\nsecond<|im_end|>\n"
    )
    assert _learned(found) == [" first \n<|im_end|>", "second<|im_end|>"]


@needs_smollm2
def test_chat_with_a_default_system_prompt() -> None:
    found = render(Example(0, "messages", messages=(U1, A1, U2, A2)), smollm2())
    assert found.text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert _learned(found) == [" first \n<|im_end|>", "second<|im_end|>"]


def test_chat_turns_that_are_given_are_not_learned() -> None:
    given = Example(0, "messages", messages=TALK.messages, given=3)
    assert _learned(render(given, byte_level())) == ["second<|im_end|>"]
    given = Example(0, "messages", messages=(U1, A1, U2, A2), given=2)
    assert _learned(render(given, byte_level(), "plain")) == ["second<|endoftext|>"]


def test_chat_of_instruction_and_prompt_rows() -> None:
    assert render(INSTRUCTION, byte_level()).text == (
        "<|im_start|>user\nSort\n\nb a<|im_end|>\n<|im_start|>assistant\na b<|im_end|>\n"
    )
    assert render(PROMPT, byte_level()).text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"


def test_auto_without_a_chat_template() -> None:
    bare = byte_level(None)
    assert [render(e, bare).template for e in (INSTRUCTION, PROMPT, TALK, TEXT)] == ["alpaca", "plain", "plain", "text"]
    assert render(PROMPT, bare) == Rendered("Q\nA<|endoftext|>", ((2, 16),), "plain")
    assert _learned(render(INSTRUCTION, bare)) == ["a b<|endoftext|>"]
    assert render(INSTRUCTION, bare).text.endswith("### Input:\nb a\n\n### Response:\na b<|endoftext|>")


def test_text_rows_are_learned_whole_whatever_the_template() -> None:
    for template in ("auto", "chat", "alpaca"):
        assert render(TEXT, byte_level(), template) == Rendered("whole<|endoftext|>", ((0, 18),), "text")


def test_conversation_in_a_template_without_roles() -> None:
    found = render(TALK, byte_level(), "plain")
    assert found.text == "be kind\n\none?\n first \n<|endoftext|>two?\nsecond<|endoftext|>"
    assert _learned(found) == [" first \n<|endoftext|>", "second<|endoftext|>"]


@pytest.mark.parametrize("messages", [(U1, U2, A2), (A1, U1, A2), (S, S, U1, A1), (U1, A1, U2), (S,)])
def test_conversation_that_does_not_alternate_needs_a_chat_template(messages: tuple[Message, ...]) -> None:
    with pytest.raises(DataError, match="row 3: the template 'plain' needs user and assistant by turns"):
        render(Example(3, "messages", messages=messages), byte_level(), "plain")


def test_request_ends_where_the_answer_begins() -> None:
    for template in ("auto", "alpaca", "plain", "raw"):
        for example in (TALK, INSTRUCTION, PROMPT):
            whole, asked = render(example, byte_level(), template), render_request(example, byte_level(), template)
            assert asked.text == whole.text[: whole.spans[-1][0]]
            assert asked.template == whole.template
    assert render_request(TEXT, byte_level()).text == "whole"
    assert render_request([S, U1, A1, U2], byte_level()) == render_request(TALK, byte_level())
    assert render_request([S, U1, A1, U2], byte_level(), "plain") == render_request(TALK, byte_level(), "plain")


def test_template_that_rewrites_earlier_answers_is_refused() -> None:
    thought: Message = {"role": "assistant", "content": "<think>hm</think>yes"}
    rewriting = byte_level(FORGETFUL)
    assert _learned(render(Example(0, "messages", messages=(U1, thought)), rewriting)) == [
        thought["content"] + "<|im_end|>"
    ]
    with pytest.raises(DataError, match=r"row 4, turn 1 .*rewrites an answer .*one row per answer.*--template"):
        render(Example(4, "messages", messages=(U1, thought, U2, A2)), rewriting)


def test_template_whose_generation_prompt_is_other_than_its_turns_is_refused() -> None:
    other = byte_level(CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif"))
    with pytest.raises(DataError, match=r"row 7, turn 2 .*does not open an answer"):
        render(TALK, other)


def test_template_that_refuses_a_conversation_is_quoted() -> None:
    with pytest.raises(DataError, match=r"row 7: the tokenizer's chat template refuses .*no system turns here"):
        render(TALK, byte_level(STRICT))
    with pytest.raises(DataError, match="row 0: the conversation begins with the assistant"):
        render(Example(0, "messages", messages=(A1, U1, A2)), byte_level())


def test_what_the_tokenizer_lacks_is_named() -> None:
    with pytest.raises(ConfigError, match="no chat template: use --template alpaca"):
        render(PROMPT, byte_level(None), "chat")
    with pytest.raises(ConfigError, match="no template 'plane'"):
        render(PROMPT, byte_level(), "plane")
    endless = copy.copy(byte_level())
    endless._special_tokens_map = {**endless._special_tokens_map, "eos_token": None}
    with pytest.raises(ConfigError, match=r"no end-of-text token \(eos_token\)"):
        render(TEXT, endless)
