"""Files become rows: Arrow-backed and memory-mapped by the `datasets` library, checked before it sees them.

Every file is read twice: once to find all faults and the columns, once to fill the Arrow table. The table lies in
the `datasets` cache under the sha256 of the files, so that an unchanged file is not written again and a changed one
is never confused with its former content. Text columns are stored as text and all others as JSON, so that each
row comes back exactly as it stood in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import config as datasets_config
from datasets.exceptions import DatasetGenerationError

from lorafold.data.readers import READERS, Row, check_utf8, known_suffixes, reader_of, suffix_of
from lorafold.errors import ConfigError, DataError, bullet_list

__all__ = ["READERS", "Rows", "has_split", "read_rows", "split_rows"]
_LAYOUT = 1  # of the stored table; raise it when the encoding of cells changes


class Rows(Sequence[Row]):
    """The rows of one or several files, in order; `rows[i]` is a dict with every column (None where missing).

    Attributes:
        columns: names of all columns, in order of first appearance.
        sources: the files, in order.
    """

    def __init__(self, table: datasets.Dataset, kinds: dict[str, bool], sources: Sequence[Path], fingerprint: str):
        self.columns = tuple(kinds)
        self.sources = tuple(sources)
        self._table, self._kinds, self._fingerprint = table, kinds, fingerprint

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        stored = self._table[index]
        return {
            name: value if is_text or value is None else json.loads(value)
            for (name, is_text), value in zip(self._kinds.items(), stored.values(), strict=True)
        }

    def fingerprint(self) -> str:
        """sha256 (hex) over the bytes of the files, in order."""
        return self._fingerprint


def read_rows(path: str | Path, split: str | None = None) -> Rows:
    """Read a data file, or all data files of a folder.

    Args:
        path: a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (all but the last also with .gz), or a folder;
            of a folder all such files below it are read, sorted by name.
        split: of a folder take only the files whose name, or the name of a folder on the way, begins with this.

    Raises:
        DataError: nothing is there, a file is empty or broken, or rows are not objects; faults of all files at once.
    """
    files = _find(Path(path), split)
    kinds = _scan(files)
    fingerprint = _hash(files)
    return Rows(_store(files, kinds, fingerprint), kinds, files, fingerprint)


def split_rows(rows: Sized, fraction: float, seed: int = 0, limit: int | None = None) -> tuple[list[int], list[int]]:
    """Split row numbers into (train, held out), both ascending and the same on every machine.

    Args:
        rows: anything with a length.
        fraction: share held out, in [0, 1); if it is not 0, each side gets at least one row.
        seed: chooses the rows that are held out.
        limit: use only the first so many rows.

    Raises:
        ConfigError: `fraction` or `limit` is out of range.
        DataError: fewer than two rows to split.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction is {fraction}; it must be at least 0 and below 1, for example 0.1")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit is {limit}; it must be at least 1 row")
    count = len(rows) if limit is None else min(limit, len(rows))
    if fraction == 0:
        return list(range(count)), []
    if count < 2:
        raise DataError(f"cannot hold out a part of {count} row: give at least two rows, or a file of held-out data")
    held = min(max(1, round(count * fraction)), count - 1)
    order = sorted(range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    return sorted(order[held:]), sorted(order[:held])


def _find(path: Path, split: str | None) -> list[Path]:
    if path.is_dir():
        return _find_below(path, split)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if split is not None:
        raise DataError(f"{path}: split={split!r} chooses files of a folder, and this is a single file: leave it out")
    if reader_of(path) is None:
        raise DataError(f"{path}: the suffix tells the format, and {path.suffix!r} is not known: {known_suffixes()}")
    return [path]


def _find_below(folder: Path, split: str | None) -> list[Path]:
    found = sorted(file for file in folder.rglob("*") if file.is_file())
    files = [file for file in found if reader_of(file) and _in_split(folder, file, "")]
    if not files:
        raise DataError(f"{folder}: no data file in this folder; known suffixes: {known_suffixes()}")
    if split is None:
        return files
    chosen = [file for file in files if _in_split(folder, file, split)]
    if not chosen:
        names = bullet_list(str(file.relative_to(folder)) for file in files[:10])
        raise DataError(f"{folder}: no file or folder below it begins with {split!r}; the data files:\n{names}")
    return chosen


def has_split(folder: Path, split: str) -> bool:
    """Whether a folder has data files of a split; see `read_rows`."""
    return any(reader_of(file) and _in_split(folder, file, split) for file in folder.rglob("*") if file.is_file())


def _in_split(folder: Path, file: Path, split: str) -> bool:
    parts = file.relative_to(folder).parts
    return any(part.startswith(split) for part in parts) and not any(part[0] in "._" for part in parts)


def _scan(files: list[Path]) -> dict[str, bool]:
    """Column -> whether all its values are text (or missing). Raises the faults of all files at once."""
    kinds: dict[str, bool] = {}
    faults = []
    for file in files:
        try:
            _scan_file(file, kinds)
        except DataError as error:  # noqa: PERF203
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{file}: cannot be opened: {error.strerror}")
    if not faults and not kinds:
        faults = [f"{files[0]}: the rows have no columns"]
    if faults:
        raise DataError("\n".join(faults))
    return kinds


def _scan_file(file: Path, kinds: dict[str, bool]) -> None:
    if file.stat().st_size and suffix_of(file) != ".parquet":
        check_utf8(file)
    count = 0
    for row in _read(file) if file.stat().st_size else ():
        count += 1
        for name, value in row.items():
            kinds[name] = kinds.get(name, True) and (value is None or isinstance(value, str))
    if not count:
        raise DataError(f"{file}: empty: it holds no row")


def _read(file: Path) -> Iterator[Row]:
    reader = reader_of(file)
    assert reader is not None
    return reader(file)


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _store(files: list[Path], kinds: dict[str, bool], fingerprint: str) -> datasets.Dataset:
    features = datasets.Features(dict.fromkeys(kinds, datasets.Value("string")))
    # all of this is hashed into the name of the cache entry
    key = {"files": [str(f.resolve()) for f in files], "kinds": kinds, "fingerprint": fingerprint, "layout": _LAYOUT}
    try:
        with _no_progress_bars():
            return datasets.Dataset.from_generator(_stored_rows, features=features, gen_kwargs=key)  # type: ignore
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise DataError(
            f"{files[0]}: the rows cannot be written to the cache {datasets_config.HF_DATASETS_CACHE}: {cause}. Make "
            f"room there, or set HF_DATASETS_CACHE to a folder that can be written"
        ) from error


def _stored_rows(files: list[str], kinds: dict[str, bool], fingerprint: str, layout: int) -> Iterator[Row]:  # noqa: ARG001
    for file in files:
        for row in _read(Path(file)):
            yield {name: _cell(row.get(name), is_text) for name, is_text in kinds.items()}


def _cell(value: Any, is_text: bool) -> str | None:
    return value if is_text or value is None else json.dumps(value, ensure_ascii=False, default=str)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
