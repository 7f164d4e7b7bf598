"""Models that give a text, or each of its words, one of several labels: transformers' own, with a new head if need be.

A folder is loaded as it is. A quantized language model stays packed, and a head is put on it.

The head computes in float32 whatever the rest computes in: it is small, and it is trained from nothing.
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
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from lorafold.adapters.whole import head
from lorafold.errors import AdapterError, FormatError
from lorafold.files import replacing_folder
from lorafold.models.adapter_files import CONFIG, WEIGHTS
from lorafold.models.bnb_folder import is_bnb
from lorafold.models.layout import BAD_CONFIG, empty_parameters
from lorafold.models.load import LoadedModel, load, resolve
from lorafold.models.mlx_folder import is_mlx
from lorafold.models.peft_format import FEATURES
from lorafold.models.tensors import NUMBERS
from lorafold.models.transformers_folder import ATTENTION_DROPOUT, config_of_folder, folder_of, load_folder

LABELS = "labels"  # in the header of an adapter's tensors: a JSON list
KINDS: dict[str, Any] = {  # task -> transformers' class
    "classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
}
_ENDINGS = {"classification": "ForSequenceClassification", "token-classification": "ForTokenClassification"}


def known_labels(model: str | Path, task: str = "classification") -> list[str] | None:
    """The labels of a folder that holds a trained classifier for this task; None for other models.

    Raises:
        FormatError: there is no model in any known format.
    """
    if is_quantized(model):
        return None
    config = config_of_folder(folder_of(model))
    classifies = any(name.endswith(_ENDINGS[task]) for name in config.architectures or ())
    return [config.id2label[i] for i in sorted(config.id2label)] if classifies else None


def load_classifier(
    model: str | Path,
    labels: Sequence[str],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    task: str = "classification",
) -> LoadedModel:
    """A model with a head for these labels, frozen and in evaluation mode; a new head is drawn from torch's generator.

    Args:
        model: as for `load`; a transformers folder may have a trained head.
        labels: in the order of the head's outputs.
        task: one of `KINDS`.

    Raises:
        FormatError: the model is missing, damaged or of an architecture without such a head.
    """
    if is_quantized(model):
        return _on_packed(load(model, dtype, device), labels, KINDS[task])
    path = folder_of(model)
    config = config_of_folder(path)
    config.id2label = dict(enumerate(labels))  # num_labels follows
    config.label2id = {label: i for i, label in enumerate(labels)}
    loaded = load_folder(path, KINDS[task], config, dtype, _may_be_new)
    for name in head(loaded.model):
        in_float32(loaded.model.get_submodule(name))
    nn.Module.to(loaded.model, device)
    return loaded


def is_quantized(model: str | Path) -> bool:
    """Whether the weights of a model are packed."""
    path = resolve(model)
    return not path.is_dir() or is_mlx(path) or is_bnb(path)


def _on_packed(loaded: LoadedModel, labels: Sequence[str], kind: Any) -> LoadedModel:
    """A packed language model with a new linear head in the place of its own."""
    config = loaded.model.config
    config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
    try:
        with empty_parameters():
            made = kind.from_config(config)
    except (*BAD_CONFIG, KeyError) as error:
        what = f"transformers has no {kind.__name__} of {config.model_type}"
        raise FormatError(f"{loaded.path}: {what}: {error}") from error
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


def adapter_labels(folder: Path, task: str | None = None) -> list[str] | None:
    """The labels that an adapter was trained for; None for adapters of other tasks.

    Args:
        task: one of `KINDS`; None for any of them.

    Raises:
        AdapterError: its files cannot be read.
    """
    if not (folder / WEIGHTS).is_file() or task not in (None, adapter_task(folder)):
        return None
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            header = file.metadata() or {}
        return json.loads(header[LABELS]) if LABELS in header else None
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{folder / WEIGHTS} cannot be read: {error}") from None


def adapter_task(folder: Path) -> str | None:
    """The task that an adapter's configuration names, as `config/task.py` calls it; None for others.

    Raises:
        AdapterError: it cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return None
    names = {"SEQ_CLS": "classification", "TOKEN_CLS": "token-classification", FEATURES: "embedding"}
    try:
        return names.get(json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("task_type"))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG} cannot be read: {error}") from None


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
    original = config_of_folder(loaded.path)
    for key in ATTENTION_DROPOUT:
        if hasattr(original, key):
            setattr(model.config, key, getattr(original, key))
    model.config.id2label, model.config.label2id = dict(enumerate(labels)), {v: i for i, v in enumerate(labels)}
    with replacing_folder(path) as temporary:
        model.to(dtype).save_pretrained(temporary)
        loaded.tokenizer.save_pretrained(temporary)


def _may_be_new(model: nn.Module, name: str) -> bool:
    """Whether a parameter belongs to the head or to a pooler, which many folders lack."""
    return any(name.startswith(f"{part}.") for part in head(model)) or re.search(r"(^|\.)pooler\.", name) is not None
