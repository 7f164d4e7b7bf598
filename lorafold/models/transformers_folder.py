"""A transformers folder, loaded through one of transformers' classes for whole tasks, with parts that may be new.

Dropout of attention weights is not computed, as nowhere here: with it torch has no fused attention, and steps take half
as long again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from lorafold.errors import FormatError
from lorafold.models.layout import BAD_CONFIG
from lorafold.models.load import LoadedModel, resolve

ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # what configurations call it


def folder_of(model: str | Path) -> Path:
    """The folder that a MODEL argument means.

    Raises:
        FormatError: it holds no model in transformers format.
    """
    path = resolve(model)
    if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
        raise FormatError(f"{path} is no model in transformers format: config.json and .safetensors files are needed")
    return path


def config_of_folder(path: Path) -> Any:
    """The configuration of a folder.

    Raises:
        FormatError: transformers cannot read it.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError) as error:
        raise FormatError(f"transformers cannot read the configuration of {path}: {error}") from error


def load_folder(
    path: Path, kind: Any, config: Any, dtype: torch.dtype, may_be_new: Callable[[PreTrainedModel, str], bool]
) -> LoadedModel:
    """The model of a folder on the CPU, frozen and in evaluation mode.

    Args:
        kind: one of transformers' Auto classes.
        config: of the model that is wanted.
        may_be_new: whether a parameter that the folder lacks may be drawn from torch's generator.

    Raises:
        FormatError: the model is missing, damaged or of another architecture.
    """
    for key in ATTENTION_DROPOUT:
        if hasattr(config, key):
            setattr(config, key, 0.0)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # of a head for other labels; all others are named below
    reported = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers lists what is new, which is what is wanted here
    try:
        made, info = kind.from_pretrained(path, **options)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError, SafetensorError) as error:
        raise FormatError(f"transformers cannot load {path} with {kind.__name__}: {error}") from error
    finally:
        logging.set_verbosity(reported)
    absent = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    lacking = [name for name in absent if not may_be_new(made, name)]
    if lacking:
        raise FormatError(f"{path} lacks weights, or has them in other shapes: {', '.join(lacking[:10])}")
    _see_to_padding(made, tokenizer, path)
    return LoadedModel(made.requires_grad_(False).eval(), tokenizer, path, dtype)


def _see_to_padding(model: Any, tokenizer: Any, path: Path) -> None:
    """Rows of a batch are filled up on the right, and decoders find a row's end by the padding token."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise FormatError(f"{path}: the tokenizer has neither a padding nor an end token to fill up rows with")
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    tokenizer.padding_side = "right"
