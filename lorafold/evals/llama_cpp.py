"""llama.cpp as an oracle: the runtime that executes a GGUF file says what the file computes.

The `xllamacpp` wheel carries llama.cpp as a shared library whose C interface (`llama.h`) is
exported. Its Python classes give the best few log-probabilities only; a comparison of
distributions needs whole rows of logits, so this file, and no other, calls the C functions through
ctypes. Two structs cross the border by value; of their fields only the first three of
`llama_context_params` are set, and those are checked against their documented defaults first, so
that a library with another layout is refused instead of misread.
"""

# T tokens, V vocabulary entries

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from lorafold.errors import FormatError, MissingExtraError

_DEFAULTS = (512, 2048, 512)  # llama.h: n_ctx, n_batch, n_ubatch of llama_context_default_params()
_STRUCT_BYTES = 512  # more than any by-value parameter struct of llama.h takes
_DECODE_TOKENS = 512  # tokens whose logits are held at once: 512 x V x 4 bytes


class _Params(ctypes.Structure):
    _fields_ = [("first", ctypes.c_uint32 * 3), ("rest", ctypes.c_uint8 * (_STRUCT_BYTES - 12))]


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_LOG_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_MESSAGES: list[str] = []  # what llama.cpp logged since the last call, for error messages


@_LOG_CALLBACK
def _keep_message(_level: int, text: bytes, _data: int) -> None:
    _MESSAGES.append(text.decode("utf-8", "replace").strip())
    del _MESSAGES[:-20]


@cache
def _library() -> ctypes.CDLL:
    """Load llama.cpp from the `xllamacpp` wheel and declare the functions used here."""
    try:
        import xllamacpp.xllamacpp as extension
    except ImportError:
        raise MissingExtraError("xllamacpp", "llama-cpp", "Running a file in llama.cpp") from None
    lib = ctypes.CDLL(extension.__file__)
    pointer, text, int32 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32
    ids = ctypes.POINTER(int32)
    signatures = {
        "llama_model_default_params": (_Params, []),
        "llama_context_default_params": (_Params, []),
        "llama_model_load_from_file": (pointer, [text, _Params]),
        "llama_model_free": (None, [pointer]),
        "llama_init_from_model": (pointer, [pointer, _Params]),
        "llama_free": (None, [pointer]),
        "llama_model_get_vocab": (pointer, [pointer]),
        "llama_vocab_n_tokens": (int32, [pointer]),
        "llama_vocab_is_eog": (ctypes.c_bool, [pointer, int32]),
        "llama_set_n_threads": (None, [pointer, int32, int32]),
        "llama_get_memory": (pointer, [pointer]),
        "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
        "llama_batch_init": (_Batch, [int32, int32, int32]),
        "llama_batch_free": (None, [_Batch]),
        "llama_decode": (int32, [pointer, _Batch]),
        "llama_get_logits": (ctypes.POINTER(ctypes.c_float), [pointer]),
        "llama_tokenize": (int32, [pointer, text, int32, ids, int32, ctypes.c_bool, ctypes.c_bool]),
        "llama_adapter_lora_init": (pointer, [pointer, text]),
        "llama_set_adapters_lora": (
            int32,
            [pointer, ctypes.POINTER(pointer), ctypes.c_size_t, ctypes.POINTER(ctypes.c_float)],
        ),
        "llama_log_set": (None, [_LOG_CALLBACK, pointer]),
    }
    missing = [name for name in signatures if not hasattr(lib, name)]
    if missing:
        raise FormatError(f"the installed xllamacpp lacks {', '.join(missing)}; install the version in constraints.txt")
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    if tuple(lib.llama_context_default_params().first) != _DEFAULTS:
        raise FormatError(
            "the installed xllamacpp lays out llama_context_params differently from what this version of LoraFold "
            "knows; install the version named in constraints.txt"
        )
    lib.llama_log_set(_keep_message, None)
    return lib


def available() -> bool:
    """Whether llama.cpp can be loaded here."""
    try:
        _library()
    except MissingExtraError:
        return False
    return True


class LlamaCpp:
    """A GGUF file loaded in llama.cpp, optionally with a LoRA adapter applied at run time.

    Args:
        path: the model file.
        adapter: a GGUF adapter file, applied with scale 1 (the file's own alpha / r).
        n_ctx: positions of the context, in tokens.

    Raises:
        FormatError: llama.cpp refuses the file or the adapter; its own words are quoted.
        MissingExtraError: `xllamacpp` is not installed.
    """

    def __init__(self, path: str | Path, adapter: str | Path | None = None, n_ctx: int = 2048):
        self._lib = _library()
        self._context = self._model = None
        try:
            self._open(path, adapter, n_ctx)
        except BaseException:
            self.close()
            raise

    def _open(self, path: str | Path, adapter: str | Path | None, n_ctx: int) -> None:
        lib = self._lib
        _MESSAGES.clear()
        self._model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
        if not self._model:
            raise FormatError(f"llama.cpp does not load {path}: {_last_words()}")
        params = lib.llama_context_default_params()
        params.first[:] = [n_ctx, _DECODE_TOKENS, _DECODE_TOKENS]
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise FormatError(f"llama.cpp makes no context for {path}: {_last_words()}")
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        lib.llama_set_n_threads(self._context, threads, threads)
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocab_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.n_ctx = n_ctx
        if adapter is not None:
            self._apply(adapter)

    def _apply(self, adapter: str | Path) -> None:
        handle = self._lib.llama_adapter_lora_init(self._model, os.fsencode(adapter))
        if not handle:
            raise FormatError(f"llama.cpp does not load the adapter {adapter}: {_last_words()}")
        handles, scales = (ctypes.c_void_p * 1)(handle), (ctypes.c_float * 1)(1.0)
        if self._lib.llama_set_adapters_lora(self._context, handles, 1, scales):
            raise FormatError(f"llama.cpp does not apply the adapter {adapter}: {_last_words()}")

    def close(self) -> None:
        """Free the context and the model (and with it any adapter)."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokenize(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids as llama.cpp's own tokenizer forms them; special tokens in the text are recognised."""
        raw = text.encode()
        room = (ctypes.c_int32 * (len(raw) + 16))()
        count = self._lib.llama_tokenize(self._vocab, raw, len(raw), room, len(room), add_special, True)
        return list(room[:count])

    def _decode(self, ids: Sequence[int], start: int, every: bool) -> np.ndarray:
        """Logits [T, V] (or [1, V] of the last token) for `ids` placed at position `start`."""
        batch = self._lib.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, start + i, 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = every or i == len(ids) - 1
            status = self._lib.llama_decode(self._context, batch)
        finally:
            self._lib.llama_batch_free(batch)
        if status:
            raise FormatError(f"llama_decode returned {status}: {_last_words()}")
        rows = len(ids) if every else 1
        flat = np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (rows * self.vocab_size,))
        return flat.reshape(rows, self.vocab_size).copy()

    def _fresh(self, needed: int) -> None:
        if needed > self.n_ctx:
            raise FormatError(f"{needed} tokens do not fit the context of {self.n_ctx}")
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def logits(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first position, logits [T, V] float32) for the sequence, at most 512 positions at a time."""
        self._fresh(len(ids))
        for start in range(0, len(ids), _DECODE_TOKENS):
            yield start, self._decode(ids[start : start + _DECODE_TOKENS], start, every=True)

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Greedy continuation, without the end token."""
        if not ids:
            raise FormatError("there is no token to continue from")
        self._fresh(len(ids) + max_new_tokens)
        last = np.empty((1, self.vocab_size), np.float32)
        for start in range(0, len(ids), _DECODE_TOKENS):
            last = self._decode(ids[start : start + _DECODE_TOKENS], start, every=False)
        out: list[int] = []
        while len(out) < max_new_tokens:
            token = int(last[0].argmax())
            if self._lib.llama_vocab_is_eog(self._vocab, token):
                break
            out.append(token)
            last = self._decode([token], len(ids) + len(out) - 1, every=False)
        return out


def _last_words() -> str:
    return " / ".join(m for m in _MESSAGES[-4:] if m) or "no reason given"
