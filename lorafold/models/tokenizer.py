"""The tokenizer a GGUF file carries, built by transformers' own converter.

What is added: the pre-tokenizers that its table lacks and the beginning-of-text token where the
file asks for it. An unknown pre-tokenizer is refused rather than guessed, since text cut otherwise than in
pre-training quietly costs quality (llama.cpp refuses it too).
"""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, convert_gguf_tokenizer

from lorafold.errors import FormatError
from lorafold.models.gguf_file import GGUFFile

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
# names of llama-vocab.cpp that cut text as GPT-2 does, some after taking digits one by one
PRE_TOKENIZERS = {
    "gpt-2": _GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2]),
}
# names for which llama.cpp takes a whole word from the vocabulary before it tries merges, and begins with BOS
IGNORE_MERGES = {
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "falcon-h1",
    "pixtral",
    "midm-2.0",
    "lfm2",
    "jina-v5-nano",
    "tekken",
}
_FIELDS = {
    "model": "tokenizer_type",
    "pre": "pre_tokenizer_type",
    "tokens": "tokens",
    "scores": "scores",
    "token_type": "token_type",
    "merges": "merges",
    "add_space_prefix": "add_prefix_space",
}
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def load_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Tokenizer with special tokens and chat template from the file's metadata.

    Raises:
        FormatError: the vocabulary is missing or damaged, or the pre-tokenizer is not known.
    """
    meta = file.metadata
    fields: dict[str, Any] = {
        name: meta[f"tokenizer.ggml.{key}"] for key, name in _FIELDS.items() if f"tokenizer.ggml.{key}" in meta
    }
    tokens = fields.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise FormatError(f"{file.path}: tokenizer.ggml.tokens is missing or not a list of text")
    kind, pre = fields.get("tokenizer_type"), fields.get("pre_tokenizer_type", "gpt-2")
    template = meta.get("tokenizer.chat_template")
    for key, value in (("tokenizer.ggml.pre", pre), ("tokenizer.chat_template", template or "")):
        if not isinstance(value, str):
            raise FormatError(f"{file.path}: {key} is not text")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS and pre not in GGUF_PRE_TOKENIZER_SPLITS:
        known = sorted({*PRE_TOKENIZERS, *GGUF_PRE_TOKENIZER_SPLITS})
        raise FormatError(f"{file.path}: the pre-tokenizer {pre!r} is not supported yet; supported: {', '.join(known)}")
    special = {}
    for name, key in _SPECIAL.items():
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            if not isinstance(index, int) or not 0 <= index < len(tokens):
                raise FormatError(f"{file.path}: tokenizer.ggml.{key}_token_id is {index!r}, not a vocabulary entry")
            special[name] = tokens[index]
    try:
        backend, _ = convert_gguf_tokenizer(file.architecture, fields)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged vocabulary
        raise FormatError(f"{file.path}: the tokenizer cannot be built: {error}") from error
    if kind == "gpt2" and pre in PRE_TOKENIZERS:
        backend.pre_tokenizer = PRE_TOKENIZERS[pre]
    if kind == "gpt2" and pre in IGNORE_MERGES:
        backend.model.ignore_merges = True  # type: ignore[attr-defined]
    if kind == "llama" and meta.get("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.pre_tokenizer = None
    if meta.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in IGNORE_MERGES) and "bos_token" in special:
        _prepend(backend, special["bos_token"])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=template,
        model_max_length=meta.get(f"{file.architecture}.context_length", int(1e30)),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _prepend(backend: Tokenizer, token: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, backend.token_to_id(token))]
    )
