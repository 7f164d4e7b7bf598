"""Models that make one vector of a text: transformers' own without a head, also from sentence-transformers folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel

from lorafold.errors import FormatError
from lorafold.models.classifier import is_quantized
from lorafold.models.load import LoadedModel
from lorafold.models.transformers_folder import config_of_folder, folder_of, load_folder

_KNOWN = ("Transformer", "Pooling", "Normalize")  # modules of a sentence-transformers folder that are computed here


def load_encoder(model: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """A model without a head, frozen and in evaluation mode.

    A pooler, which BERT has for the first token, is left out: nothing here reads it.

    Raises:
        FormatError: the model is missing, damaged or quantized, or its folder says that it pools in another way.
    """
    if is_quantized(model):
        raise FormatError(f"{model} is quantized; embeddings are of models in transformers format so far")
    path = folder_of(model)
    _check_pooling(path)
    loaded = load_folder(path, AutoModel, config_of_folder(path), dtype, lambda _, name: ".pooler." in f".{name}")
    if isinstance(getattr(loaded.model, "pooler", None), nn.Module):
        loaded.model.register_module("pooler", None)
    nn.Module.to(loaded.model, device)
    return loaded


def _check_pooling(path: Path) -> None:
    """Refuse a sentence-transformers folder that does something else than mean and normalization."""
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        kinds = {str(m["type"]).rpartition(".")[2]: path / m["path"] / "config.json" for m in modules}
        pooling = json.loads(kinds["Pooling"].read_text(encoding="utf-8")) if "Pooling" in kinds else {}
    except FileNotFoundError:
        return  # no such folder, or none that says how it pools
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: modules.json, or what it names, is damaged: {error!r}") from None
    others = [f"has a module {kind}" for kind in kinds if kind not in _KNOWN]
    others += [f"pools by {key}" for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    wrong = [what for what in others if what != "pools by pooling_mode_mean_tokens"]
    if wrong:
        raise FormatError(f"{path} {' and '.join(wrong)}; only the mean of the tokens is known here")
