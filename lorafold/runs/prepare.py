"""From a data configuration to tokens: read, hold out, tokenize, and say aloud what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafold.config import DataConfig
from lorafold.data.read import Rows, read_rows, split_rows
from lorafold.data.rows import Example, to_examples
from lorafold.data.tokens import Tokenized, Tokens, tokenize
from lorafold.runs.display import Display


@dataclass(frozen=True)
class PreparedData:
    """Tokens of a run.

    Attributes:
        train, held_out: tokenized rows.
        examples: the held-out rows before tokenization, for samples.
        fingerprint: sha256 of the training file(s).
        eval_fingerprint: sha256 of the held-out file(s); None when a part of the data was held out.
    """

    train: Tokenized
    held_out: Tokenized
    examples: Sequence[Example]
    fingerprint: str
    eval_fingerprint: str | None


def prepare(config: DataConfig, tokenizer: Any, seed: int, display: Display) -> PreparedData:
    """Read and tokenize training and held-out rows.

    Raises:
        DataError: whatever is wrong with the files, rows or templates.
    """
    rows = read_rows(config.data)
    if config.eval_data is not None:
        train = list(range(len(rows)))[: config.limit]
        held_rows, held = read_rows(config.eval_data), None
        held_index = list(range(len(held_rows)))[: config.eval_limit]
        held = _examples(held_rows, held_index, config)
        eval_fingerprint = held_rows.fingerprint()
    else:
        train, held_index = split_rows(rows, config.eval_fraction, seed)
        train, held_index = list(train)[: config.limit], list(held_index)[: config.eval_limit]
        held, eval_fingerprint = _examples(rows, held_index, config), None
    tokenized = _tokenize(_examples(rows, train, config), tokenizer, config)
    held_out = _tokenize(held, tokenizer, config)
    for label, part in (("training", tokenized), ("held-out", held_out)):
        display.say(f"{label} data: {part.describe()}")
    return PreparedData(tokenized, held_out, held, rows.fingerprint(), eval_fingerprint)


def held_out_rows(config: DataConfig, tokenizer: Any, seed: int, data: Path | None = None) -> Tokenized:
    """Only the held-out rows of a run's data, or all rows of another file read in the same way.

    Raises:
        DataError: as `prepare`.
    """
    config = replace(config, eval_data=data) if data else config
    return _tokenize(held_out_examples(config, seed), tokenizer, config)


def held_out_examples(config: DataConfig, seed: int) -> Sequence[Example]:
    """The held-out rows of a run's data, before tokenization.

    Raises:
        DataError: as `prepare`.
    """
    rows = read_rows(config.eval_data or config.data)
    index = list(range(len(rows))) if config.eval_data else split_rows(rows, config.eval_fraction, seed)[1]
    return _examples(rows, list(index)[: config.eval_limit], config)


def tokenized_of(config: DataConfig, tokenizer: Any) -> Tokenized:
    """All rows of the data file (up to `limit`), tokenized; nothing is held out.

    Raises:
        DataError: as `prepare`.
    """
    rows = read_rows(config.data)
    return _tokenize(_examples(rows, list(range(len(rows)))[: config.limit], config), tokenizer, config)


def rows_of(config: DataConfig, tokenizer: Any, display: Display) -> list[Tokens]:
    """The same, with a word on what was cut."""
    tokenized = tokenized_of(config, tokenizer)
    display.say(f"data: {tokenized.describe()}")
    return tokenized.rows


def _examples(rows: Rows, index: Sequence[int], config: DataConfig) -> Sequence[Example]:
    return to_examples(rows, indices=index, prompt_template=config.prompt, completion_template=config.completion)


def _tokenize(examples: Sequence[Example], tokenizer: Any, config: DataConfig) -> Tokenized:
    return tokenize(
        examples, tokenizer, template=config.template, max_length=config.max_length, supervise=config.supervise
    )
