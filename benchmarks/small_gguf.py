"""Write the model of `benchmarks/small_model.py` as a GGUF file in a type that llama.cpp's own quantizer makes.

    python -m benchmarks.small_gguf FOLDER --type Q4_K -o small-Q4_K.gguf

All matrices have the type, the embedding too; norms are F32. llama.cpp's quantizer is called through the library in the
`xllamacpp` wheel, and metadata are written as by llama.cpp's converter, both by the helpers of the tests.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFValueType, GGUFWriter, TokenType, get_tensor_name_map
from gguf.quants import quantize
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.ggml_quantizer import GGML_ONLY, ggml_quantize
from tests.tiny import gguf_metadata


def main() -> None:
    """Convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--type", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    config = AutoConfig.from_pretrained(args.model)
    tokenizer = json.loads((args.model / "tokenizer.json").read_text(encoding="utf-8"))
    words = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {entry["content"] for entry in tokenizer["added_tokens"] if entry["special"]}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    metadata = gguf_metadata(config, "qwen3") | {
        "general.name": "small qwen3",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL if w in special else TokenType.NORMAL) for w in words],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    writer = GGUFWriter(args.output, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        kind = GGUFValueType.get_type(value)
        writer.add_key_value(key, value, GGUFValueType.UINT32 if kind == GGUFValueType.INT32 else kind)
    names = get_tensor_name_map(MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, tensor in load_file(args.model / "model.safetensors").items():
        stored = names.get_name(name, try_suffixes=(".weight",))
        assert stored is not None, name
        value, kind = tensor.float().numpy(), "F32" if tensor.dim() == 1 else args.type
        data = ggml_quantize(value, kind) if kind in GGML_ONLY else quantize(value, GGMLQuantizationType[kind])
        writer.add_tensor(stored, np.ascontiguousarray(data), raw_dtype=GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
