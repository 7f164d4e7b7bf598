"""How many positions a model has, and rows that would need more."""

from __future__ import annotations

from torch import nn

from lorafold.errors import ConfigError
from lorafold.models.load import LoadedModel


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


def learned_positions(loaded: LoadedModel) -> int | None:
    """How many positions a language model with a learned table of them has (GPT-2, OPT), and None without one.

    Rotary positions are computed, and go on after those that were trained.
    """
    count, tokens = positions(loaded), loaded.model.get_input_embeddings()
    tables = (m for m in loaded.model.modules() if isinstance(m, nn.Embedding) and m is not tokens)
    held = any(count <= table.num_embeddings <= count + 2 for table in tables)  # OPT's begins with two rows of its own
    return count if count and held else None


def check_positions(loaded: LoadedModel, max_length: int) -> None:
    """Refuse rows of `max_length` tokens where a learned table of positions does not reach so far.

    Raises:
        ConfigError: with the length that it reaches.
    """
    count = learned_positions(loaded)
    if count is not None and max_length > count:
        raise ConfigError(
            f"rows may be {max_length:,} tokens long (max_length), and {loaded.path.name} has learned {count:,} "
            f"positions; give --max-length {count}, which cuts longer rows"
        )
