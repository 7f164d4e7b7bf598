"""File formats: one reader per suffix, each an iterator over the rows of one file.

The readers use the standard library where its messages tell the line (JSON, CSV), and keep every value as it
stands: `007` in a CSV stays text, a date in a JSONL file stays text.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lorafold.errors import DataError, bullet_list

Row = dict[str, Any]
Reader = Callable[[Path], Iterator[Row]]
_SHOWN = 5  # faulty lines listed in a message
_CHUNK = 1 << 20


def suffix_of(path: Path) -> str:
    """The suffix that names the format, in lower case and without `.gz`: `.jsonl` for `Train.JSONL.gz`."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def reader_of(path: Path) -> Reader | None:
    """The reader for a file by its suffix, or None where the suffix is not known."""
    reader = READERS.get(suffix_of(path))
    return None if reader is _parquet and path.name.lower().endswith(".gz") else reader


def known_suffixes() -> str:
    """The suffixes that can be read, for messages."""
    return f"{', '.join(READERS)} (all but .parquet also with .gz)"


def check_utf8(path: Path) -> None:
    """Refuse a text file that is not UTF-8.

    Raises:
        DataError: names the byte position (in the uncompressed data), or says that the compression is damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    try:
        with _open(path) as file:
            while chunk := file.read(_CHUNK):
                read += len(chunk)
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        position = read - len(error.object) + error.start
        byte = error.object[error.start]
        raise DataError(
            f"{path}: not UTF-8: byte {position} is 0x{byte:02x} ({error.reason}). Save the file as UTF-8, for example "
            f"with  iconv -f ENCODING -t utf-8  (often latin1, cp949 or utf-16)"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: the gzip data is damaged or cut short: {error}") from None


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if path.name.lower().endswith(".gz"):
        with gzip.open(path, "rb") as file:
            yield file  # type: ignore[misc]
    else:
        with path.open("rb") as file:
            yield file


@contextmanager
def _text(path: Path, newline: str) -> Iterator[io.TextIOWrapper]:
    with _open(path) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline) as text:
        yield text


def _raise(path: Path, faults: list[str]) -> None:
    """Raise all faults of a file in one message, if there are any."""
    if faults:
        more = [f"and {len(faults) - _SHOWN:,} more"] if len(faults) > _SHOWN else []
        raise DataError(f"{path}: cannot be read:\n{bullet_list(faults[:_SHOWN] + more)}")


def _row_fault(row: Any, source: str) -> str | None:
    """What is wrong with a parsed JSON value as a row, or None; `source` is the text it was parsed from."""
    if not isinstance(row, dict):
        kind = {list: "a list", str: "text", type(None): "null", bool: "true or false"}.get(type(row), "a number")
        return f'{kind}, not an object with columns like {{"prompt": "...", "completion": "..."}}'
    if "\\ud" in source or "\\uD" in source:  # an escaped surrogate; only pairs make a character
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "half of a \\ud8xx\\udcxx pair, which is no character"
    return None


def _json_lines(path: Path) -> Iterator[Row]:
    faults = []
    with _text(path, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                faults.append(f"line {number}: broken JSON: {error}")
                continue
            if fault := _row_fault(row, line):
                faults.append(f"line {number}: {fault}")
            else:
                yield row
    if faults and faults[0].startswith("line 1:"):
        faults[0] += " (each line must be one object; a file that is one JSON document must be named .json)"
    _raise(path, faults)


def _json(path: Path) -> Iterator[Row]:
    with _text(path, newline="\n") as file:
        source = file.read()
    try:
        document = json.loads(source) if source.strip() else []
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under the name .json
            yield from _json_lines(path)
            return
        raise DataError(f"{path}: line {error.lineno}, column {error.colno}: broken JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: broken JSON: {error}") from None
    faults = []
    for number, row in enumerate(_list_in(document, path)):
        if fault := _row_fault(row, source):
            faults.append(f"item {number}: {fault}")
        else:
            yield row
    _raise(path, faults)


def _list_in(document: Any, path: Path) -> list[Any]:
    """The rows of a JSON document: the list that it is, or the only list in the object that it is."""
    if isinstance(document, list):
        return document
    lists = [key for key, value in document.items() if isinstance(value, list)] if isinstance(document, dict) else []
    if len(lists) == 1:
        return document[lists[0]]
    found = f"several lists ({', '.join(map(repr, lists))})" if lists else "no list"
    raise DataError(f"{path}: must hold a list of objects, or an object with one list of them; it holds {found}")


def _separated(delimiter: str) -> Reader:
    def read(path: Path) -> Iterator[Row]:
        csv.field_size_limit(2**31 - 1)  # the default refuses texts of more than 128 kB
        faults = []
        with _text(path, newline="") as file:
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                header = _header(next(lines, []), path)
                for cells in lines:
                    if len(cells) == len(header):
                        yield dict(zip(header, cells, strict=True))
                    elif cells:
                        faults.append(f"line {lines.line_num}: {len(cells)} fields, the header has {len(header)}")
            except csv.Error as error:
                faults.append(f"line {lines.line_num}: {error} (quotes inside a quoted field are doubled)")
        _raise(path, faults)

    return read


def _header(names: list[str], path: Path) -> list[str]:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if names and (repeated or not all(name.strip() for name in names)):
        what = f"the column {repeated[0]!r} stands there twice" if repeated and repeated[0] else "a name is empty"
        raise DataError(f"{path}: the first line must name the columns; {what}: {', '.join(map(repr, names))[:300]}")
    return names


def _parquet(path: Path) -> Iterator[Row]:
    try:
        with pq.ParquetFile(path, buffer_size=_CHUNK, pre_buffer=False) as file:  # not a whole group of rows at once
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a sound Parquet file: {error}") from None


# suffix -> reader; the suffix .gz may follow all but .parquet
READERS: dict[str, Reader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}
