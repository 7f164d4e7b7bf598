"""Models that give a text one of several labels: transformers' own, with a new head if need be.

A folder is loaded as it is. A quantized language model stays packed, and a head is put on it.

The head computes in float32 whatever the rest computes in: it is small, and it is trained from nothing. Dropout of
attention weights is not computed, as nowhere here: with it torch has no fused attention, and steps take half as long
again.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from lorafold.adapters.whole import head
from lorafold.errors import AdapterError, FormatError
from lorafold.files import replacing_folder
from lorafold.models.adapter_files import WEIGHTS
from lorafold.models.bnb_folder import is_bnb
from lorafold.models.layout import BAD_CONFIG, empty_parameters
from lorafold.models.load import LoadedModel, load, resolve
from lorafold.models.mlx_folder import is_mlx
from lorafold.models.tensors import NUMBERS

LABELS = "labels"  # in the header of an adapter's tensors: a JSON list
_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # what configurations call it


def known_labels(model: str | Path) -> list[str] | None:
    """The labels of a folder that holds a trained classifier; None for other models.

    Raises:
        FormatError: there is no model in any known format.
    """
    if is_quantized(model):
        return None
    config = _config(_folder(model))
    classifies = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return [config.id2label[i] for i in sorted(config.id2label)] if classifies else None


def load_classifier(
    model: str | Path, labels: Sequence[str], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LoadedModel:
    """A model with a head for these labels, frozen and in evaluation mode; a new head is drawn from torch's generator.

    Args:
        model: as for `load`; a transformers folder may have a trained head.
        labels: in the order of the head's outputs.

    Raises:
        FormatError: the model is missing, damaged or of an architecture without such a head.
    """
    if is_quantized(model):
        return _on_packed(load(model, dtype, device), labels)
    path = _folder(model)
    config = _config(path)
    config.id2label = dict(enumerate(labels))  # num_labels follows
    config.label2id = {label: i for i, label in enumerate(labels)}
    for key in _ATTENTION_DROPOUT:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    reported = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers lists what is new, which is what is wanted here
    try:
        made, info = AutoModelForSequenceClassification.from_pretrained(path, **options)  # type: ignore[misc]
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError, SafetensorError) as error:
        raise FormatError(f"transformers cannot load {path} as a classifier: {error}") from error
    finally:
        logging.set_verbosity(reported)
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    lacking = [name for name in absent if not _may_be_new(made, name)]
    if lacking:
        raise FormatError(f"{path} lacks weights, or has them in other shapes: {', '.join(lacking[:10])}")
    _see_to_padding(made, tokenizer, path)
    made.requires_grad_(False).eval()
    for name in head(made):
        in_float32(made.get_submodule(name))
    nn.Module.to(made, device)
    return LoadedModel(made, tokenizer, path, dtype)


def is_quantized(model: str | Path) -> bool:
    """Whether the weights of a model are packed."""
    path = resolve(model)
    return not path.is_dir() or is_mlx(path) or is_bnb(path)


def _on_packed(loaded: LoadedModel, labels: Sequence[str]) -> LoadedModel:
    """A packed language model with a new linear head in the place of its own."""
    config = loaded.model.config
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    try:
        with empty_parameters():
            made = AutoModelForSequenceClassification.from_config(config)
    except (*BAD_CONFIG, KeyError) as error:
        raise FormatError(f"{loaded.path}: transformers has no classifier of {config.model_type}: {error}") from error
    setattr(made, made.base_model_prefix, loaded.model.base_model)
    for name in head(made):
        new = made.get_submodule(name).to_empty(device=loaded.device)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=getattr(config, "initializer_range", 0.02))
        in_float32(new)
    return replace(loaded, model=made.eval())


def in_float32(module: nn.Module) -> None:
    """Let a module compute in float32, whatever it is given."""
    module.float()
    module.register_forward_pre_hook(lambda _, given: (given[0].float(), *given[1:]))


def new_modules(loaded: LoadedModel) -> list[str]:
    """Names of the modules that are trained whole whatever the method: the head, and a pooler that the folder lacks."""
    stored: set[str] = set()
    for file in loaded.path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            stored |= set(tensors.keys())
    poolers = [n for n, m in loaded.model.named_modules() if n.endswith("pooler") and any(True for _ in m.parameters())]
    absent = [n for n in poolers if not any(".pooler." in f".{key}" for key in stored)]
    return [*head(loaded.model), *absent]


def adapter_labels(folder: Path) -> list[str] | None:
    """The labels that an adapter was trained for; None for adapters of other tasks.

    Raises:
        AdapterError: its file cannot be read.
    """
    if not (folder / WEIGHTS).is_file():
        return None
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            header = file.metadata() or {}
        return json.loads(header[LABELS]) if LABELS in header else None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from None


def stored_type(path: Path) -> torch.dtype:
    """The type that most numbers of a folder are stored in."""
    counts: Counter[torch.dtype] = Counter()
    for source in path.glob("*.safetensors"):
        with safe_open(source, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                stored = file.get_slice(key)
                if stored.get_dtype() in NUMBERS:
                    counts[NUMBERS[stored.get_dtype()]] += math.prod(stored.get_shape())
    return counts.most_common(1)[0][0]


def save_classifier(model: Any, loaded: LoadedModel, labels: Sequence[str], dtype: torch.dtype, path: Path) -> None:
    """Write a merged classifier as a transformers folder with its tokenizer.

    Raises:
        OutputError: it cannot be written.
    """
    original = _config(loaded.path)
    for key in _ATTENTION_DROPOUT:
        if hasattr(original, key):
            setattr(model.config, key, getattr(original, key))
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {v: i for i, v in enumerate(labels)}
    with replacing_folder(path) as temporary:
        model.to(dtype).save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)


def _folder(model: str | Path) -> Path:
    path = resolve(model)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise FormatError(f"{path} is no model in transformers format: config.json and .safetensors files are needed")
    return path


def _config(path: Path) -> Any:
    try:
        return AutoConfig.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError) as error:
        raise FormatError(f"transformers cannot read the configuration of {path}: {error}") from error


def _may_be_new(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the head or to a pooler, which many folders lack."""
    return any(name.startswith(f"{part}.") for part in head(model)) or re.search(r"(^|\.)pooler\.", name) is not None


def _see_to_padding(model: Any, tokenizer: Any, path: Path) -> None:
    """Rows of a batch are filled up on the right, and decoders find a row's end by the padding token."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise FormatError(f"{path}: the tokenizer has neither a padding nor an end token to fill up rows with")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
