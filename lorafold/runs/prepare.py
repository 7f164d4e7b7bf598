"""From a data configuration to tokens: read, hold out, tokenize, and say aloud what was cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafold.config import DataConfig, RowsConfig
from lorafold.data.read import Rows, has_split, read_rows, split_rows
from lorafold.data.rows import Example, to_examples
from lorafold.data.tokens import Tokenized, tokenize
from lorafold.errors import DataError
from lorafold.runs.display import Display
from lorafold.runs.folder import CONFIG, Run, read_run


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
    rows = read_rows(config.data, _training_split(config))
    other = _other_rows(config)
    if other is None:
        train, held_index = split_rows(rows, config.eval_fraction, seed, config.limit)
        held = _examples(rows, held_index[: config.eval_limit], config)
    else:
        train, held = _first(rows, config.limit), _examples(other, _first(other, config.eval_limit), config)
    tokenized = _tokenize(_examples(rows, train, config), tokenizer, config)
    held_out = _tokenize(held, tokenizer, config)
    for label, part, source in (("training", tokenized, rows), ("held-out", held_out, other)):
        names = f" ({', '.join(path.name for path in source.sources)})" if config.data.is_dir() and source else ""
        display.say(f"{label} data{names}: {part.describe()}")
    return PreparedData(tokenized, held_out, held, rows.fingerprint(), other.fingerprint() if other else None)


def held_out_rows(run: Run, tokenizer: Any, data: Path | None = None) -> Tokenized:
    """The held-out rows of a run, or all rows of another file read in the same way.

    Raises:
        DataError: as `prepare`, or the run's data have changed since.
    """
    return _tokenize(held_out_examples(run, data), tokenizer, run.config.data)


def held_out_examples(run: Run, data: Path | None = None) -> Sequence[Example]:
    """The same before tokenization."""
    config = run.config.data if data is None else replace(run.config.data, eval_data=data)
    rows = _other_rows(config)
    if rows is None:
        rows = read_rows(config.data, _training_split(config))
        index = split_rows(rows, config.eval_fraction, run.config.training.seed, config.limit)[1][: config.eval_limit]
    else:
        index = _first(rows, config.eval_limit)
    trained_on = run.summary.get("eval_data_sha256") or run.summary.get("data_sha256")
    if data is None and trained_on not in (None, rows.fingerprint()):
        raise DataError(
            f"{', '.join(map(str, rows.sources[:3]))}: changed since the run was trained, so its held-out rows are no "
            "longer known; put the old file back, or give other rows with --data"
        )
    return _examples(rows, index, config)


def all_rows(config: RowsConfig, tokenizer: Any) -> Tokenized:
    """All rows of the data (up to `limit`), tokenized; of a run folder its held-out rows, as the run read them.

    Raises:
        DataError: as `prepare`.
    """
    if (config.data / CONFIG).is_file():
        return held_out_rows(read_run(config.data), tokenizer)
    rows = read_rows(config.data)
    return _tokenize(_examples(rows, _first(rows, config.limit), config), tokenizer, config)


def _training_split(config: DataConfig) -> str | None:
    """Of a folder with files named train..., only those are trained on."""
    return "train" if config.data.is_dir() and has_split(config.data, "train") else None


def _other_rows(config: DataConfig) -> Rows | None:
    """Held-out rows that do not come from the training rows: eval_data, or the split of a folder."""
    if config.eval_data is not None:
        return read_rows(config.eval_data)
    if _training_split(config):
        for split in ("valid", "dev", "test"):
            if has_split(config.data, split):
                return read_rows(config.data, split)
    return None


def _first(rows: Rows, limit: int | None) -> list[int]:
    return list(range(len(rows)))[:limit]


def _examples(rows: Rows, index: Sequence[int], config: RowsConfig) -> Sequence[Example]:
    return to_examples(rows, indices=index, prompt_template=config.prompt, completion_template=config.completion)


def _tokenize(examples: Sequence[Example], tokenizer: Any, config: RowsConfig) -> Tokenized:
    return tokenize(
        examples, tokenizer, template=config.template, max_length=config.max_length, supervise=config.supervise
    )
