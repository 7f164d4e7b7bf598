"""Tiny models, as transformers objects and as the GGUF files that llama.cpp's converter would write of them.

`tiny_gguf` writes a file and `tiny_model` gives transformers' model with the very weights which that file
decodes to; both are functions of the same options and of nothing else. What the converter changes on the way
(names, the order of q and k rows, norms plus one, rope factors) is repeated here from convert_hf_to_gguf.py
with gguf-py's own name tables and quantizers, so nothing of LoraFold's is used to test LoraFold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from gguf.quants import dequantize, quantize
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.auto import AutoModelForCausalLM

from tests.ggml_quantizer import GGML_ONLY, ggml_quantize

TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
ARCHITECTURES = ("llama", "llama3", "qwen2", "qwen3", "gemma3")  # llama3: llama with Llama 3's rope factors

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# result = left + right, in the order of their rank; \u0120 is a leading space in byte-level spelling
MERGES = """Ġ t|h e|Ġt he|i n|r e|o n|Ġ a|n d|Ġa nd|in g|e r|a t|Ġ w|o r|Ġw or|l d|Ġwor ld|Ġ c|Ġc at|l l|e ll
h ell|hell o|Ġ Ġ|ĠĠ ĠĠ|Ċ Ċ|1 2|12 3|Ġ i|Ġi s|' s|i s|e d|Ġ m|Ġm at|o u|y ou|Ġ q|u est|e s|t i|q u|es t""".replace(
    "\n", "|"
)
_UNREACHABLE = "zebra"  # in the vocabulary, but no merge leads there: a word for `ignore_merges`
_CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_USER_DEFINED = ("<think>",)

Metadata = dict[str, Any]
Tensors = dict[str, tuple[np.ndarray, str]]  # name -> (data as stored, ggml type)
Edit = Callable[[Metadata, Tensors], object]


def tiny_gguf(
    folder: Path,
    architecture: str = "llama",
    types: str | Mapping[str, str] = "Q4_1",
    *,
    tied: bool = True,
    bias: bool = False,
    seed: int = 0,
    vocabulary: str = "bpe",
    edit: Edit | None = None,
    name: str = "tiny.gguf",
    wide: bool = False,
) -> Path:
    """Write a tiny model as GGUF and return the file's path.

    Args:
        folder: where to write; created if missing.
        architecture: one of `ARCHITECTURES`.
        types: ggml type of every matrix, or {part of a tensor's name: type} with `""` for the rest, the first
            match counting: `{"attn_v": "Q8_0", "": "Q4_1"}`. Vectors are F32, as the converter writes them.
        tied: no `output.weight`; the embedding serves as head.
        bias: llama only: attention biases (Qwen 2 always has them).
        seed: of the weights.
        vocabulary: `"bpe"` (byte level, with the architecture's pre-tokenizer) or `"spm"` (sentencepiece).
        edit: called with metadata (key -> value) and tensors (name -> (data, type)) before they are written, to
            change, add or remove any.
        name: of the file.
        wide: rows of 256 and 512, which K-quants need.
    """
    model, tensors = _rounded(architecture, types, tied, bias, seed, wide)
    metadata = gguf_metadata(model.config, architecture) | _VOCABULARIES[vocabulary](architecture)
    if edit is not None:
        edit(metadata, tensors)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    writer = GGUFWriter(path, metadata.pop("general.architecture", "none"))
    for key, value in metadata.items():
        kind = GGUFValueType.get_type(value)
        if kind == GGUFValueType.INT32 and value >= 0:
            kind = GGUFValueType.UINT32
        writer.add_key_value(key, value, kind)
    for tensor, (data, kind) in tensors.items():
        writer.add_tensor(tensor, data, raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_model(
    architecture: str = "llama",
    types: str | Mapping[str, str] = "Q4_1",
    *,
    tied: bool = True,
    bias: bool = False,
    seed: int = 0,
    wide: bool = False,
) -> PreTrainedModel:
    """transformers' own float32 model with the weights that `tiny_gguf` of the same options decodes to."""
    return _rounded(architecture, types, tied, bias, seed, wide)[0]


def tiny_config(architecture: str = "llama", tied: bool = True, bias: bool = False, wide: bool = False) -> Any:
    """The transformers config: 3 layers (Gemma 3: 6, of which the last is the full one) of width 64, or 256."""
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.075 if wide else 0.15,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    if wide:
        common |= {"hidden_size": 256, "intermediate_size": 512}
    if architecture == "llama":
        return LlamaConfig(**common, attention_bias=bias)
    if architecture == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
        rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
        return LlamaConfig(**common | {"rope_parameters": rope}, attention_bias=bias)
    if architecture == "qwen2":
        return Qwen2Config(**common)
    if architecture == "qwen3":
        return Qwen3Config(**common, head_dim=32)  # wider than hidden / heads, as in Qwen3-0.6B
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    return Gemma3TextConfig(
        **common | {"num_hidden_layers": 6, "rope_parameters": rope},
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=8,
    )


def _rounded(
    architecture: str, types: str | Mapping[str, str], tied: bool, bias: bool, seed: int, wide: bool
) -> tuple[PreTrainedModel, Tensors]:
    """The model with its weights rounded to the types, and those weights as the file stores them."""
    config = tiny_config(architecture, tied, bias, wide)
    gguf_arch = _gguf_arch(architecture)
    names = get_tensor_name_map(
        next(arch for arch, text in MODEL_ARCH_NAMES.items() if text == gguf_arch and isinstance(arch, MODEL_ARCH)),
        config.num_hidden_layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as constants, which would hide mistakes
                parameter.data += 0.2 * torch.randn_like(parameter)
    model.requires_grad_(False)
    tensors: Tensors = {}
    for hf_name, parameter in model.named_parameters():
        name = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert name is not None, hf_name
        value = parameter.detach().numpy()
        kind = "F32" if value.ndim == 1 else types if isinstance(types, str) else _first_match(types, name)
        stored = ggml_quantize(value, kind) if kind in GGML_ONLY else quantize(value, GGMLQuantizationType[kind])
        parameter.data = torch.from_numpy(dequantize(stored, GGMLQuantizationType[kind]).reshape(value.shape).copy())
        if gguf_arch == "llama" and ".attn_q." in name:
            stored = _permute(stored, config.num_attention_heads)
        if gguf_arch == "llama" and ".attn_k." in name:
            stored = _permute(stored, config.num_key_value_heads)
        if architecture == "gemma3" and hf_name.endswith("norm.weight"):
            stored = stored + np.float32(1)
            parameter.data = torch.from_numpy(stored - np.float32(1))  # what is left of it in float32
        tensors[name] = (np.ascontiguousarray(stored), kind)
    if architecture == "llama3":
        tensors["rope_freqs.weight"] = (_llama3_factors(config), "F32")
    return model, tensors


def _first_match(types: Mapping[str, str], name: str) -> str:
    return next(kind for part, kind in types.items() if part in name)


def _gguf_arch(architecture: str) -> str:
    return "llama" if architecture == "llama3" else architecture


def _permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """LlamaModel.permute of the converter; rows only, so it may be done to packed rows too."""
    shape = weights.shape
    return weights.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)


def _llama3_factors(config: Any) -> np.ndarray:
    """LlamaModel.generate_extra_tensors of the converter."""
    rope, dim = config.rope_parameters, config.hidden_size // config.num_attention_heads
    context = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def gguf_metadata(config: Any, architecture: str) -> Metadata:
    """What set_gguf_parameters of the converter writes."""
    arch = _gguf_arch(architecture)
    values: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    rope = config.rope_parameters
    if arch == "llama":
        values |= {"vocab_size": config.vocab_size, "rope.dimension_count": config.head_dim}
    if arch in ("qwen3", "gemma3"):
        values |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    if arch == "gemma3":
        rope = rope["full_attention"]
        values |= {"attention.sliding_window": config.sliding_window, "rope.scaling.type": rope["rope_type"]}
        values |= {"rope.scaling.factor": rope["factor"]}
    values["rope.freq_base"] = rope["rope_theta"]
    general = {"general.architecture": arch, "general.type": "model", "general.name": f"tiny {architecture}"}
    return general | {f"{arch}.{key}": value for key, value in values.items()}


def _bpe(architecture: str) -> Metadata:
    """A byte-level vocabulary: bytes, merges, an unreachable word, special tokens."""
    spelling = bytes_to_unicode()
    tokens = [spelling[i] for i in range(256)]
    tokens += [merge.replace(" ", "") for merge in MERGES.split("|")] + [_UNREACHABLE]
    types = [TokenType.NORMAL] * len(tokens)
    tokens += [*_CONTROL, *_USER_DEFINED]
    types += [TokenType.CONTROL] * len(_CONTROL) + [TokenType.USER_DEFINED] * len(_USER_DEFINED)
    pre = {"llama3": "llama-bpe", "qwen2": "qwen2", "qwen3": "qwen2"}.get(architecture, "gpt-2")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(t) for t in types],
        "tokenizer.ggml.merges": MERGES.split("|"),
        "tokenizer.ggml.bos_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": architecture in ("llama3", "gemma3"),
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def _spm(architecture: str) -> Metadata:
    """A sentencepiece vocabulary of the same size: unknown, <s>, </s>, 256 bytes, pieces with scores."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    pieces = [*["▁t", "he", "in", "▁the", "an", "▁a", "▁▁"], *"▁etaoinshrdlucmfwypvbgk"]
    scores = [0.0] * len(tokens) + [-float(i) for i in range(len(pieces))]
    types += [TokenType.NORMAL] * len(pieces)
    padding = VOCABULARY - len(tokens) - len(pieces)
    tokens += pieces + [f"<pad{i}>" for i in range(padding)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores + [-1000.0] * padding,
        "tokenizer.ggml.token_type": [int(t) for t in types] + [int(TokenType.UNUSED)] * padding,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": architecture != "gemma3",
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


_VOCABULARIES = {"bpe": _bpe, "spm": _spm}


VOCABULARY = len(_bpe("llama")["tokenizer.ggml.tokens"])  # tokens of every tiny model


def tiny_ids(tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids [rows, tokens] without special tokens."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.integers(0, 256 + len(MERGES.split("|")), (rows, tokens)))
