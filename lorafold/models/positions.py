"""How many positions a model has, and rows that would need more."""

from __future__ import annotations

from collections.abc import Iterable, Sized

import torch
from torch import nn

from lorafold.errors import ConfigError
from lorafold.models.load import LoadedModel

_BUFFERS = ("embed_positions", "pos_encoding")  # tables that are computed once, by transformers' names


def positions(loaded: LoadedModel) -> int:
    """How many positions the model has; 0 if its configuration does not say."""
    return getattr(loaded.model.config, "max_position_embeddings", None) or 0


def longest_row(loaded: LoadedModel, max_length: int) -> int:
    """`max_length`, or what the model has positions for if that is less.

    Where the table of positions has a row for padding, rows begin after it (RoBERTa, MPNet).
    """
    tables = (m for n, m in loaded.model.named_modules() if n.endswith("position_embeddings"))
    first = next((m.padding_idx + 1 for m in tables if isinstance(m, nn.Embedding) and m.padding_idx is not None), 0)
    return min(max_length, max(positions(loaded) - first, 0) or max_length)


def table_of_positions(loaded: LoadedModel) -> int | None:
    """How many positions a language model with a table of them has (GPT-2, OPT, GPT-J); None without one.

    Rotary positions are computed as a rule, and go on after those that were trained.
    """
    count, model = positions(loaded), loaded.model
    tokens = model.get_input_embeddings()
    own = next((name for name, module in model.named_modules() if module is tokens), "")
    rows = [
        len(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and not f"{name}.".startswith(f"{own}.")  # an adapter has it within
    ]
    rows += [len(table) for name, table in model.named_buffers() if name.rpartition(".")[2] in _BUFFERS]
    held = any(count <= number <= count + 2 for number in rows)  # OPT's begins with two rows of its own
    return count if count and held else None


def tokens_at_once(loaded: LoadedModel, most: int) -> int:
    """`most`, or what the model has room for at once if that is less: GPT-Neo holds a square of what sees what."""
    squares = (b.shape for n, b in loaded.model.named_buffers() if n.endswith(".bias") and b.dtype == torch.bool)
    return min([most, *(shape[-1] for shape in squares)])


def check_positions(loaded: LoadedModel, rows: Iterable[Sized]) -> None:
    """Refuse rows that reach beyond a table of positions.

    Raises:
        ConfigError: with the length that it reaches.
    """
    count, longest = table_of_positions(loaded), max(map(len, rows))
    if count is not None and longest > count:
        raise ConfigError(
            f"a row has {longest:,} tokens, and {loaded.path.name} {count:,} positions; give --max-length {count}, "
            "which cuts longer rows"
        )
