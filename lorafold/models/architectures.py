"""What a GGUF architecture is called in transformers: one row per architecture.

A row says how metadata becomes a transformers config, which tensor becomes which parameter, and
which values the converter changed on the way into the file: llama.cpp permutes the rows of q and k
for its rotary layout, and stores Gemma's norm weights with one added (llama.cpp,
convert_hf_to_gguf.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafold.errors import FormatError
from lorafold.models.gguf_file import GGUFFile

# file name (without its "blk.N." and its ".weight" or ".bias") -> name inside the transformers layer
_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QK_NORM = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA3 = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"  # Llama 3's divisors of the rotary frequencies, [head_dim / 2]


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model_type: transformers' name of the model family.
        layer: names inside a layer, file -> transformers.
        permuted: file names whose rows are in llama.cpp's rotary order.
        norm_shift: what the converter added to every norm weight.
        extra: further config entries, from (metadata reader, entries so far).
    """

    model_type: str
    layer: Mapping[str, str]
    permuted: tuple[str, ...] = ()
    norm_shift: float = 0.0
    extra: Callable[[_Metadata, dict[str, Any]], dict[str, Any]] = field(default=lambda _meta, _config: {})

    def module_name(self, tensor: str) -> str | None:
        """`"blk.3.attn_q"` -> `"model.layers.3.self_attn.q_proj"`; None for a name the row does not know."""
        if tensor in _TOP:
            return _TOP[tensor]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)", tensor)
        if match is None or match[2] not in self.layer:
            return None
        return f"model.layers.{match[1]}.{self.layer[match[2]]}"

    def row_order(self, tensor: str, rows: int, config: Mapping[str, Any]) -> Tensor | None:
        """Index [rows] that brings the file's rows into transformers' order, or None where they agree."""
        name = tensor.rpartition(".")[2]
        if name not in self.permuted:
            return None
        heads = config["num_attention_heads" if name == "attn_q" else "num_key_value_heads"]
        return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()


class _Metadata:
    """Reads `<architecture>.<key>` and collects what is missing or of the wrong type."""

    def __init__(self, file: GGUFFile):
        self.file = file
        self.faults: list[str] = []

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        full = f"{self.file.architecture}.{key}"
        value = self.file.metadata.get(full, default)
        if value is None:
            self.faults.append(f"{full} is missing")
        elif kind is int and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            self.faults.append(f"{full} is {value!r}, not a positive integer")
        elif kind is float and not (isinstance(value, int | float) and 0 < value < float("inf")):
            self.faults.append(f"{full} is {value!r}, not a positive number")
        else:
            return kind(value)
        return kind(1)  # keeps going, so that every fault is found


def _rope(meta: _Metadata, _: dict[str, Any]) -> dict[str, Any]:
    """Rotary scaling as one dictionary for all layers (linear, or none; Llama 3's factors are a tensor)."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": meta.get("rope.freq_base", float, 10000.0)}
    kind = meta.file.metadata.get(f"{meta.file.architecture}.rope.scaling.type", "none")
    if kind == "linear":
        rope |= {"rope_type": "linear", "factor": meta.get("rope.scaling.factor", float)}
    elif kind != "none":
        meta.faults.append(f"rope scaling {kind!r} is not supported yet (none, linear and Llama 3's factors are)")
    return {"rope_parameters": rope}


def _gemma3(meta: _Metadata, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma 3: five sliding layers to a full one, each kind with its own rotary base."""
    full = _rope(meta, config)["rope_parameters"]
    per_head = config["hidden_size"] // config["num_attention_heads"]
    is_27b = config["num_hidden_layers"] == 62  # as llama.cpp recognises the one size with another scale
    return {
        "rope_parameters": {
            "full_attention": full,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": meta.get("rope.freq_base_swa", float, 10000.0),
            },
        },
        "sliding_window": meta.get("attention.sliding_window", int),
        "query_pre_attn_scalar": per_head if is_27b else config["head_dim"],
        "hidden_activation": "gelu_pytorch_tanh",
    }


ARCHITECTURES = {
    "llama": Architecture("llama", _DECODER, permuted=("attn_q", "attn_k"), extra=_rope),
    "qwen2": Architecture("qwen2", _DECODER, extra=_rope),
    "qwen3": Architecture("qwen3", _DECODER | _QK_NORM, extra=_rope),
    "gemma3": Architecture("gemma3_text", _DECODER | _QK_NORM | _GEMMA3, norm_shift=1.0, extra=_gemma3),
}


def architecture_of(file: GGUFFile) -> Architecture:
    """The row for a file.

    Raises:
        FormatError: no row, naming those there are.
    """
    if not isinstance(file.architecture, str) or file.architecture not in ARCHITECTURES:
        raise FormatError(
            f"{file.path}: the architecture {file.architecture!r} is not supported yet; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[file.architecture]


def config_of(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """A transformers config, as keyword arguments, from the file's metadata and tensor shapes.

    Raises:
        FormatError: keys are missing or impossible; all of them are named.
    """
    meta = _Metadata(file)
    if "token_embd.weight" not in file.tensors:
        raise FormatError(f"{file.path}: the tensor token_embd.weight is missing")
    heads = meta.get("attention.head_count", int)
    hidden = meta.get("embedding_length", int)
    # Gemma and Qwen 3 state the head width themselves; Llama's is the rotary width
    head_dim = meta.get("attention.key_length", int, meta.get("rope.dimension_count", int, max(hidden // heads, 1)))
    config: dict[str, Any] = {
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.get("feed_forward_length", int),
        "num_hidden_layers": meta.get("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": meta.get("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.get("context_length", int),
        "rms_norm_eps": meta.get("attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.metadata.get("tokenizer.ggml.padding_token_id"),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
    }
    config |= architecture.extra(meta, config)
    meta.faults = meta.faults or _disagreements(file, config)
    if meta.faults:
        raise FormatError(f"{file.path} cannot be used:\n  - " + "\n  - ".join(meta.faults))
    return config


def _disagreements(file: GGUFFile, config: Mapping[str, Any]) -> list[str]:
    """Where metadata and tensor shapes tell different sizes; checked before a model of these sizes is laid out."""
    heads, kv_heads, width = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
    hidden = config["hidden_size"]
    layers = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    faults = []
    if width % 2:
        faults.append(f"the head width {width} is odd, and rotary positions need pairs")
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list) and len(tokens) > config["vocab_size"]:
        faults.append(f"token_embd.weight has {config['vocab_size']} rows for {len(tokens)} tokens")
    for key, full in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        index = config[f"{key}_token_id"]
        if index is not None and (type(index) is not int or not 0 <= index < config["vocab_size"]):
            faults.append(f"tokenizer.ggml.{full}_token_id is {index!r}, not a vocabulary entry")
    if len(layers) != config["num_hidden_layers"]:
        faults.append(f"block_count is {config['num_hidden_layers']}, and tensors of {len(layers)} blocks are there")
    if heads % kv_heads:
        faults.append(f"attention.head_count {heads} is not a multiple of attention.head_count_kv {kv_heads}")
    expected = {
        "token_embd.weight": (config["vocab_size"], hidden),
        "blk.0.attn_q.weight": (heads * width, hidden),
        "blk.0.attn_k.weight": (kv_heads * width, hidden),
        "blk.0.ffn_up.weight": (config["intermediate_size"], hidden),
    }
    for name, shape in expected.items():
        actual = file.tensors[name].shape if name in file.tensors else shape
        if actual != shape:
            faults.append(f"{name} has shape {list(actual)}, the metadata ask for {list(shape)}")
    return faults
