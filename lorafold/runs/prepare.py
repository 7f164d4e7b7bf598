"""From a data configuration to tokens: read, hold out, tokenize, and say aloud what was cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from lorafold.config import DataConfig, RowsConfig
from lorafold.data.read import Rows, evaluation_split, held_out_split, read_rows, split_rows, training_split
from lorafold.data.rows import Example, check_rows, converter, to_examples
from lorafold.data.stream import KEPT_BYTES, KEPT_ROWS, RowStream
from lorafold.data.tokens import Tokenized, tokenize
from lorafold.errors import ConfigError, DataError
from lorafold.runs.display import Display
from lorafold.runs.folder import CONFIG, Run, read_run

HELD_OUT_ROWS = 2000  # at most, of a part of the data, where nobody says more


@dataclass(frozen=True)
class PreparedData:
    """Tokens of a run.

    Attributes:
        train, held_out: tokenized rows; a stream where there are many.
        examples: held-out rows before tokenization, for samples; the first of them where there are many.
        fingerprint: sha256 of the training file(s).
        eval_fingerprint: sha256 of the held-out file(s); None when a part of the data was held out.
    """

    train: Tokenized | RowStream
    held_out: Tokenized | RowStream
    examples: Sequence[Example]
    fingerprint: str
    eval_fingerprint: str | None


def prepare(config: DataConfig, tokenizer: Any, seed: int, display: Display) -> PreparedData:
    """Read and tokenize training and held-out rows.

    Raises:
        DataError: whatever is wrong with the files, rows or templates.
    """
    rows = read_rows(config.data, training_split(config.data), display.say)
    other = other_rows(config, display)
    if other is None:
        train, held = _split(rows, config, seed)
        _check(rows, np.concatenate([train, held]), config, display)  # one count of faults over both parts
    else:
        train, held = _first(rows, config.limit), _first(other, config.eval_limit)
    if config.eval_limit is None and len(held) >= HELD_OUT_ROWS:
        display.say(f"held out are {len(held):,} rows; their loss is measured before and after: see --eval-limit")
    held_source = rows if other is None else other
    examples = _examples(held_source, held[:KEPT_ROWS], config)
    tokenized = _tokenize(rows, train, tokenizer, config, display, checked=other is None)
    held_out = _tokenize(held_source, held, tokenizer, config, display, checked=other is None)
    for label, part, source in (("training", tokenized, rows), ("held-out", held_out, other)):
        names = f" ({', '.join(path.name for path in source.sources)})" if config.data.is_dir() and source else ""
        display.say(f"{label} data{names}: {part.describe()}")
    return PreparedData(tokenized, held_out, examples, rows.fingerprint(), other.fingerprint() if other else None)


def held_out_rows(run: Run, tokenizer: Any, data: Path | None = None) -> Tokenized | RowStream:
    """The held-out rows of a run, or all rows of another file read in the same way.

    Raises:
        DataError: as `prepare`, or the run's data have changed since.
    """
    return _tokenize(*_held_out(run, data), tokenizer, run.config.data, Display(quiet=True))


def held_out_examples(run: Run, data: Path | None = None) -> Sequence[Example]:
    """The same before tokenization."""
    return _examples(*_held_out(run, data), run.config.data)


def _held_out(run: Run, data: Path | None) -> tuple[Rows, np.ndarray]:
    config = run.config.data if data is None else replace(run.config.data, eval_data=data)
    rows = other_rows(config)
    if rows is None:
        rows = read_rows(config.data, training_split(config.data))
        index = _split(rows, config, run.config.training.seed)[1]
    else:
        index = _first(rows, config.eval_limit)
    if data is None:
        _refuse_changed(rows, run.summary.get("eval_data_sha256") or run.summary.get("data_sha256"))
    return rows, index


def _trained_on(run: Run) -> tuple[Rows, np.ndarray]:
    config = run.config.data
    rows = read_rows(config.data, training_split(config.data))
    _refuse_changed(rows, run.summary.get("data_sha256"))
    if config.eval_data is not None or held_out_split(config.data):
        return rows, _first(rows, config.limit)
    return rows, _split(rows, config, run.config.training.seed)[0]


def _refuse_changed(rows: Rows, fingerprint: str | None) -> None:
    if fingerprint not in (None, rows.fingerprint()):
        raise DataError(
            f"{', '.join(map(str, rows.sources[:3]))}: changed since the run was trained, so its rows are no longer "
            "known; put the old file back, or give other rows with --data"
        )


def evaluation_rows(config: RowsConfig, tokenizer: Any, display: Display | None = None) -> Tokenized | RowStream:
    """Rows of the data (up to `limit`), tokenized; of a run or a folder with splits those that training holds out.

    Raises:
        DataError: as `prepare`.
        ConfigError: of a run folder rows are asked for that it has not, or that are read in another way.
    """
    display = display or Display(quiet=True)
    if run := _texts_of_run(config):
        rows, index = _held_out(run, None)
        return _tokenize(rows, index[: config.limit], tokenizer, run.config.data, display)
    return _rows_of_files(config, evaluation_split(config.data), tokenizer, display)


def training_rows(config: RowsConfig, tokenizer: Any, display: Display | None = None) -> Tokenized | RowStream:
    """The same, but those that are trained on.

    Raises:
        DataError, ConfigError: as `evaluation_rows`.
    """
    display = display or Display(quiet=True)
    if run := _texts_of_run(config):
        rows, index = _trained_on(run)
        return _tokenize(rows, index[: config.limit], tokenizer, run.config.data, display)
    return _rows_of_files(config, training_split(config.data), tokenizer, display)


def run_as_data(config: RowsConfig) -> Run | None:
    """The run whose folder is given as data.

    Raises:
        ConfigError: beside it stands how its rows are to be read, which the run has settled.
    """
    if not (config.data / CONFIG).is_file():
        return None
    settled = ("prompt", "completion", "template", "max_length", "supervise")
    given = [f.name for f in fields(RowsConfig) if f.name in settled and getattr(config, f.name) != f.default]
    if given:
        raise ConfigError(
            f"{config.data} is a run, whose rows are read as it read them; leave out {', '.join(given)}, or give the "
            "data themselves"
        )
    return read_run(config.data)


def _texts_of_run(config: RowsConfig) -> Run | None:
    """The same, if its rows are texts to continue; otherwise they are refused as a ConfigError."""
    run = run_as_data(config)
    if run is not None and not run.config.task.continues:
        task = run.config.task.task
        raise ConfigError(
            f"{run.path} is a run of --task {task}, whose rows are no texts to continue; they are for lorafold eval "
            f"--task {task}"
        )
    return run


def read_split(data: Path, split: str | None, display: Display) -> Rows:
    """Rows of a file, or of a folder's files of a split, whose names are said."""
    rows = read_rows(data, split, display.say)
    if data.is_dir():
        display.say(f"rows of {', '.join(path.name for path in rows.sources)}")
    return rows


def _rows_of_files(config: RowsConfig, split: str | None, tokenizer: Any, display: Display) -> Tokenized | RowStream:
    rows = read_split(config.data, split, display)
    return _tokenize(rows, _first(rows, config.limit), tokenizer, config, display)


def _split(rows: Rows, config: DataConfig, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rows to train on, and of those that are held out."""
    most = HELD_OUT_ROWS if config.eval_limit is None else None
    train, held = split_rows(rows, config.eval_fraction, seed, config.limit, most)
    return train, held[: config.eval_limit]


def other_rows(config: DataConfig, display: Display | None = None) -> Rows | None:
    """Held-out rows that do not come from the training rows: eval_data, or the split of a folder."""
    say = display.say if display else None
    if config.eval_data is not None:
        return read_rows(config.eval_data, say=say)
    split = held_out_split(config.data)
    return read_rows(config.data, split, say) if split else None


def _first(rows: Rows, limit: int | None) -> np.ndarray:
    return np.arange(len(rows))[:limit]


def _examples(rows: Rows, index: np.ndarray, config: RowsConfig) -> Sequence[Example]:
    return to_examples(rows, indices=index, prompt_template=config.prompt, completion_template=config.completion)


def _tokenize(
    rows: Rows, index: np.ndarray, tokenizer: Any, config: RowsConfig, display: Display, checked: bool = False
) -> Tokenized | RowStream:
    """Few rows are tokenized, many are checked and tokenized when they are wanted."""
    options: dict[str, Any] = {
        "template": config.template,
        "max_length": config.max_length,
        "supervise": config.supervise,
    }
    if len(index) <= KEPT_ROWS and rows.sizes()[index].sum() <= KEPT_BYTES:
        return tokenize(_examples(rows, index, config), tokenizer, **options)
    if not checked:
        _check(rows, index, config, display)
    convert = converter(rows.columns, config.prompt, config.completion)
    return RowStream(rows, index, convert, tokenizer, **options)


def _check(rows: Rows, index: np.ndarray, config: RowsConfig, display: Display) -> None:
    """Look at each row, or of many at each that is not seen to be sound at once."""
    convert = converter(rows.columns, config.prompt, config.completion)
    if len(index) <= KEPT_ROWS:
        check_rows(((int(at), rows[int(at)]) for at in np.sort(index)), convert, 0)
        return
    wanted = np.zeros(len(rows), bool)
    wanted[index] = True
    if convert.columns is not None:
        wanted &= rows.unsure(convert.columns)
    if not wanted.any():
        return
    with display.bar("checking rows", len(rows)) as advance:
        check_rows(_chosen(rows, wanted, advance), convert, len(index) - int(wanted.sum()))


def _chosen(rows: Rows, wanted: np.ndarray, advance: Callable[[int], None]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Wanted rows with their numbers."""
    for number, row in enumerate(rows):
        if wanted[number]:
            yield number, row
        if (number + 1) % 1000 == 0:
            advance(1000)
