"""Files become rows: an Arrow table, memory-mapped, there whole or not at all.

A file is parsed once, all its faults are found, and the table is filled on the way; a second time only where a row
after the first thousand has a column that none before it had, or the first value of one that is no text. The table
lies in the cache of data sets under the sha256 of the files, so that what did not change is not read again and what did
is never confused with its former content. Text columns are stored as text and all others as bytes of JSON, so that each
row comes back exactly as it stood in the file.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub.constants import HF_HOME
from pyarrow.lib import StringBuilder

from lorafold.data.readers import READERS, Row, check_utf8, known_suffixes, reader_of, suffix_of
from lorafold.errors import ConfigError, DataError, bullet_list
from lorafold.files import OutputError, replacing

__all__ = ["READERS", "Rows", "evaluation_split", "held_out_split", "read_rows", "split_rows", "training_split"]
_LAYOUT = 2  # of the stored table; raise it when the encoding of cells changes
_BATCH = 1000  # rows held at once
_BLOCK = 4 << 20
_WHITE = "".join(filter(str.isspace, map(chr, range(0x10000))))  # what str.strip takes away
_UNTIL_DROPPED = 16  # rows taken singly before their pages are dropped: each may map 2 MB
_LARGE = 50_000_000  # bytes; reading more takes seconds


class Rows(Sequence[Row]):
    """The rows of one or several files, in order; `rows[i]` is a dict with every column (None where missing).

    Pages of the file that were looked at count as memory of the process as long as they are mapped, though the system
    can take them at any time. They are dropped now and then, so that a large file costs no more than a small one.

    Attributes:
        columns: names of all columns, in order of first appearance.
        sources: the files, in order.
    """

    def __init__(self, table: Path, sources: Sequence[Path], fingerprint: str):
        with table.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with pa.ipc.open_stream(pa.py_buffer(self._map)) as stream:
            self._table = stream.read_all()
        self._is_text = [pa.types.is_string(field.type) for field in self._table.schema]
        self._fingerprint, self._taken = fingerprint, 0
        self.columns = tuple(self._table.column_names)
        self.sources = tuple(sources)
        self._drop_pages()

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]
        index = range(len(self))[index]
        self._taken += 1
        if self._taken % _UNTIL_DROPPED == 0:
            self._drop_pages()
        return self._row(self._cells(index, 1)[0])

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), _BATCH):
            yield from map(self._row, self._cells(start, _BATCH))
            self._drop_pages()

    def unsure(self, columns: Iterable[str]) -> np.ndarray:
        """Whether one of some columns has no text or nothing but white space in it, bool [N]."""
        found = np.zeros(len(self), bool)
        for name in columns:
            column = self._table.column(name)
            if not pa.types.is_string(column.type):
                return np.ones(len(self), bool)
            parts = []
            for part in column.chunks:
                parts.append(_is_blank(part))
                self._drop_pages()
            found |= np.concatenate(parts)
        return found

    def sizes(self) -> np.ndarray:
        """Bytes of all cells of each row as they are stored, int64 [N]."""
        total = np.zeros(len(self), np.int64)
        for column in self._table.columns:
            total += np.concatenate([_lengths(part) for part in column.chunks])
            self._drop_pages()
        return total

    def fingerprint(self) -> str:
        """sha256 (hex) over the bytes of the files, in order."""
        return self._fingerprint

    def _cells(self, start: int, count: int) -> list[tuple[Any, ...]]:
        """Of so many rows from one on, or as many as there are, the cells as they are stored."""
        return list(zip(*(column.to_pylist() for column in self._table.slice(start, count).columns), strict=True))

    def _row(self, cells: Iterable[Any]) -> Row:
        return {
            name: cell if is_text or cell is None else json.loads(cell)
            for name, is_text, cell in zip(self.columns, self._is_text, cells, strict=True)
        }

    def _drop_pages(self) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._map.madvise(mmap.MADV_DONTNEED)


def _is_blank(column: pa.Array) -> np.ndarray:
    options = pc.TrimOptions(characters=_WHITE)
    return _lengths(pc.call_function("utf8_trim", [column], options)) == 0


def _lengths(column: pa.Array) -> np.ndarray:
    """Bytes of each cell, 0 where there is none; from the offsets, as pyarrow's own way imports pandas if it can."""
    offsets = np.frombuffer(column.buffers()[1], np.int32)
    return np.diff(offsets[column.offset : column.offset + len(column) + 1])


def read_rows(path: str | Path, split: str | None = None, say: Callable[[str], None] | None = None) -> Rows:
    """Read a data file, or all data files of a folder.

    Args:
        path: a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file (all but the last also with .gz), or a folder;
            of a folder all such files below it are read, sorted by name.
        split: of a folder take only the files whose name, or the name of a folder on the way, begins with this.
        say: is told when this will take a while.

    Raises:
        DataError: nothing is there, a file is empty or broken, or rows are not objects; faults of all files at once.
    """
    files = _find(Path(path), split)
    try:
        fingerprint, sizes = _hash(files)
    except OSError:
        _raise_faults(files)  # names it among those of the others
        raise
    # of the names only what decides how the bytes are read
    key = json.dumps([_LAYOUT, fingerprint, sizes, [(suffix_of(f), f.suffix.lower() == ".gz") for f in files]])
    table = Path(_cache(), "lorafold", f"{hashlib.sha256(key.encode()).hexdigest()}.arrow")
    if not table.exists():
        if say and sum(sizes) > _LARGE:
            say(f"reading {sum(sizes) / 1e6:,.0f} MB of data, which is remembered until they change ...")
        _store(files, table)
    return Rows(table, files, fingerprint)


def split_rows(
    rows: Sized, fraction: float, seed: int = 0, limit: int | None = None, most: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers into (train, held out), both ascending and the same on every machine.

    Args:
        rows: anything with a length.
        fraction: share held out, in [0, 1); if it is not 0, each side gets at least one row.
        seed: chooses the rows that are held out.
        limit: use only the first so many rows.
        most: rows held out, at most.

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
        return np.arange(count), np.arange(0)
    if count < 2:
        raise DataError(f"cannot hold out a part of {count} row: give at least two rows, or a file of held-out data")
    wanted = min(max(1, round(count * fraction)), count - 1, most or count)
    order = heapq.nsmallest(wanted, range(count), key=lambda i: hashlib.sha256(f"{seed}:{i}".encode()).digest())
    held = np.sort(order)
    return np.delete(np.arange(count), held), held


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


def _has_split(folder: Path, split: str) -> bool:
    """Whether a folder has data files of a split; see `read_rows`."""
    return any(reader_of(file) and _in_split(folder, file, split) for file in folder.rglob("*") if file.is_file())


def training_split(data: Path) -> str | None:
    """Of a folder with files named train..., only those are trained on; None where all files are."""
    return "train" if data.is_dir() and _has_split(data, "train") else None


def held_out_split(data: Path) -> str | None:
    """The split of such a folder that is held out; None where a part of the training rows is."""
    if training_split(data) is None:
        return None
    return next((split for split in ("valid", "dev", "test") if _has_split(data, split)), None)


def evaluation_split(data: Path) -> str | None:
    """The split that is evaluated: what is held out, or else what is trained on; None where these are all files."""
    return held_out_split(data) or training_split(data)


def _in_split(folder: Path, file: Path, split: str) -> bool:
    parts = file.relative_to(folder).parts
    return any(part.startswith(split) for part in parts) and not any(part[0] in "._" for part in parts)


def _checked(files: list[Path]) -> Iterator[Row]:
    """The rows of all files. Raises the faults of all of them at once, after the last row."""
    faults = []
    for file in files:
        try:
            yield from _rows_in(file)
        except DataError as error:  # noqa: PERF203
            faults.append(str(error))
        except OSError as error:
            faults.append(f"{file}: cannot be opened: {error.strerror}")
    if faults:
        raise DataError("\n".join(faults))


def _raise_faults(files: list[Path]) -> None:
    for _ in _checked(files):
        pass


def _rows_in(file: Path) -> Iterator[Row]:
    count, size = 0, file.stat().st_size
    if size and suffix_of(file) != ".parquet":
        check_utf8(file)
    for row in _read(file) if size else ():
        count += 1
        yield row
    if not count:
        raise DataError(f"{file}: empty: it holds no row")


def _read(file: Path) -> Iterator[Row]:
    reader = reader_of(file)
    assert reader is not None
    return reader(file)


def _cache() -> str:
    """The folder in which the `datasets` library keeps its tables as well."""
    return os.environ.get("HF_DATASETS_CACHE") or os.path.join(HF_HOME, "datasets")


def _hash(files: list[Path]) -> tuple[str, list[int]]:
    """sha256 (hex) over the bytes of all files, and how many bytes each has."""
    digest, sizes = hashlib.sha256(), []
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
            sizes.append(stream.tell())
    return digest.hexdigest(), sizes


def _store(files: list[Path], table: Path) -> None:
    """Write all rows as an Arrow table. Raises the faults of all files at once."""
    is_text: dict[str, bool] = {}
    try:
        with replacing(table) as temporary:
            while not _write(files, is_text, temporary):
                pass  # with all columns known
    except OutputError as error:
        _raise_faults(files)  # no disk is made room on for nothing
        raise DataError(
            f"{files[0]}: the rows cannot be written to the cache {_cache()}: {error}. Make room there, "
            "or set HF_DATASETS_CACHE to a folder that can be written"
        ) from error
    pa.default_memory_pool().release_unused()


def _write(files: list[Path], is_text: dict[str, bool], path: Path) -> bool:
    """Write all rows, or tell that one has what neither the first thousand nor `is_text` have.

    Args:
        is_text: column -> whether all its values are text (or missing), as far as they are known; made complete.
    """
    rows = _checked(files)
    first = deque(islice(rows, _BATCH))
    _look_at(first, is_text)
    schema = pa.schema([(name, pa.string() if text else pa.binary()) for name, text in is_text.items()])
    known = dict(is_text)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        again = (first.popleft() for _ in range(len(first)))  # none is held longer than those after it
        for block in _blocks(chain(again, rows), is_text, schema):
            stream.write_table(block)
    if not is_text:
        raise DataError(f"{files[0]}: the rows have no columns")
    return is_text == known


def _blocks(rows: Iterator[Row], is_text: dict[str, bool], schema: pa.Schema) -> Iterator[pa.Table]:
    """Tables of `_BLOCK` bytes or more, as opening the file looks at the beginning of each, until a column is new."""
    known = dict(is_text)
    parts: list[pa.RecordBatch] = []
    while batch := list(islice(rows, _BATCH)):
        _look_at(batch, is_text)
        if is_text != known:
            parts = []
            continue
        for part in _stored(batch, known, schema):
            parts.append(part)
            if sum(part.nbytes for part in parts) >= _BLOCK:
                yield pa.Table.from_batches(parts).combine_chunks()
                parts = []
    if parts:
        yield pa.Table.from_batches(parts).combine_chunks()


def _stored(batch: list[Row], is_text: dict[str, bool], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Rows as they are stored, in halves where a column has more than the 2 GiB of an array."""
    columns = [_column(batch, *item) for item in is_text.items()]
    if all(len(column) == len(batch) for column in columns):
        yield pa.record_batch(columns, schema=schema)
        return
    if len(batch) == 1:
        raise DataError("a row has a cell of more than 2 GiB, which is more than can be stored")
    for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):
        yield from _stored(half, is_text, schema)


def _look_at(batch: Collection[Row], is_text: dict[str, bool]) -> None:
    """Add columns that are new, and what is no text."""
    for name in dict.fromkeys(chain.from_iterable(batch)):
        if is_text.get(name, True):
            is_text[name] = {type(row.get(name)) for row in batch} <= {str, type(None)}


def _column(batch: list[Row], name: str, is_text: bool) -> pa.Array:
    """One column as it is stored, with fewer cells where they would not fit.

    pyarrow's own way from a list is slower and imports pandas if it can. The builder says nothing where an array is
    full.
    """
    cells = StringBuilder()
    cells.append_values([_cell(row.get(name), is_text) for row in batch])
    return cells.finish() if is_text else cells.finish().cast(pa.binary())


def _cell(value: Any, is_text: bool) -> str | bytes | None:
    return value if is_text or value is None else json.dumps(value, ensure_ascii=False, default=str).encode()
