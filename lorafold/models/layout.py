"""An empty model is laid out, and packed matrices are put in the place of its linear layers and embedding."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME

from lorafold.errors import FormatError
from lorafold.models.bnb_folder import BnbFolder
from lorafold.models.mlx_folder import MLXFolder
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import QuantizedWeight

BAD_CONFIG = (
    ValueError,
    TypeError,
    RuntimeError,
    ZeroDivisionError,
    AssertionError,
    ImportError,
    StrictDataclassError,
)


def from_packed(folder: MLXFolder | BnbFolder, dtype: torch.dtype) -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a folder whose layers are packed."""
    path, config = folder.path, {key: value for key, value in folder.config.items() if key != "model_type"}
    kind = str(folder.config.get("model_type"))
    try:
        with empty_parameters():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**config, "dtype": dtype}))
        tokenizer = AutoTokenizer.from_pretrained(path)
        if (path / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError) as error:
        raise FormatError(f"{path}: its config or tokenizer describes no possible model: {error}") from error
    faults = _fill_packed(model, folder, dtype)
    if faults:
        raise FormatError(f"{path} does not fit its architecture:\n  - " + "\n  - ".join(sorted(faults)[:10]))
    return model, tokenizer


def _fill_packed(model: PreTrainedModel, folder: MLXFolder | BnbFolder, dtype: torch.dtype) -> list[str]:
    """Put every tensor of the folder in its module; returns what did not fit."""
    modules = dict(model.named_modules())
    wanted = {f"{p}.{k}" for p, m in modules.items() for k, v in m.named_parameters(recurse=False) if v.is_meta}
    faults: list[str] = []
    for name in sorted(folder.tensors):  # a bias before the weight it belongs to
        path, _, kind = name.rpartition(".")
        if name in folder.beside:
            continue
        expected = getattr(modules.get(path), kind, None)
        if not isinstance(expected, Tensor):
            faults.append(f"the tensor {name} has no place in the model")
        elif path in folder.quantized and kind == "weight":
            weight = folder.packed(path)
            if weight.shape != tuple(expected.shape):
                faults.append(f"{path} holds {weight.shape}, the config asks for {tuple(expected.shape)}")
            else:
                place(model, path, weight, dtype)
        elif folder.tensors[name].shape != tuple(expected.shape):
            faults.append(f"{name} has shape {folder.tensors[name].shape}, the config asks for {tuple(expected.shape)}")
        else:
            setattr(modules[path], kind, nn.Parameter(folder.dense(name).to(dtype), requires_grad=False))
    if model.config.tie_word_embeddings:
        embedding = model.get_input_embeddings()
        if isinstance(embedding, QuantEmbedding):
            model.lm_head = QuantLinear(embedding.packed)  # the same blocks
        else:
            model.lm_head.weight = embedding.weight
        wanted -= {"lm_head.weight"}
    return faults + [f"the tensor {name} is missing" for name in sorted(wanted - folder.tensors.keys())]


def place(model: nn.Module, target: str, weight: QuantizedWeight, dtype: torch.dtype) -> None:
    """Put a packed matrix where a dense layer was laid out."""
    old = model.get_submodule(target)
    if isinstance(old, nn.Embedding):
        new: nn.Module = QuantEmbedding(weight, dtype, scale=getattr(old, "scalar_embed_scale", 1.0))
    else:
        bias = old.bias if isinstance(old.bias, Tensor) and not old.bias.is_meta else None
        new = QuantLinear(weight, bias)
    model.set_submodule(target, new)


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """Inside, parameters are created on the meta device; buffers (rotary frequencies) are computed as usual."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
