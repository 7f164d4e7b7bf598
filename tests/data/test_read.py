"""Every file format gives the same rows, and every broken file one clear message."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lorafold.data.read import READERS, read_rows, split_rows
from lorafold.errors import ConfigError, DataError

ROWS = [
    {"id": "007", "text": 'two "quoted" words, and a comma', "note": "date 2020-01-01"},
    {"id": "1", "text": "line one\nline two\ttabbed \u2028 한국어 😀", "note": "2020-01-01"},
    {"id": "", "text": "NA", "note": " spaces "},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def _lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _separated(delimiter: str) -> Callable[[list[dict[str, str]]], bytes]:
    def quoted(values: Any) -> str:
        return delimiter.join('"' + value.replace('"', '""') + '"' for value in values)

    return lambda rows: "".join(
        quoted(line) + "\r\n" for line in [rows[0].keys(), *(r.values() for r in rows)]
    ).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


WRITERS: dict[str, Callable[[list[Any]], bytes]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".parquet": _parquet,
}


def _file(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("suffix", READERS)
def test_every_format_keeps_every_value_as_it_stands(tmp_path: Path, suffix: str) -> None:
    rows = read_rows(_file(tmp_path, f"data{suffix}", WRITERS[suffix](ROWS)))
    assert list(rows) == ROWS
    assert (len(rows), rows.columns, rows[-1]) == (3, ("id", "text", "note"), ROWS[-1])


@pytest.mark.parametrize("suffix", [suffix for suffix in READERS if suffix != ".parquet"])
def test_gzip_and_byte_order_mark_and_capitals_do_not_matter(tmp_path: Path, suffix: str) -> None:
    content = gzip.compress(b"\xef\xbb\xbf" + WRITERS[suffix](ROWS), mtime=0)
    assert list(read_rows(_file(tmp_path, f"Data{suffix.upper()}.GZ", content))) == ROWS


def test_nested_and_mixed_values_come_back_exactly(tmp_path: Path) -> None:
    rows = [
        {"prompt": "text", "n": 1, "deep": [{"a": 1}, {"b": [2.5, None]}]},
        {"prompt": [{"role": "user", "content": "hi"}], "n": "one", "flag": True},
    ]
    found = read_rows(_file(tmp_path, "a.jsonl", _lines(rows)))
    assert found.columns == ("prompt", "n", "deep", "flag")
    assert found[0] == {**rows[0], "flag": None}
    assert found[1] == {**rows[1], "deep": None}


def test_json_object_with_one_list_and_json_lines_under_the_name_json(tmp_path: Path) -> None:
    assert list(read_rows(_file(tmp_path, "a.json", json.dumps({"version": 1, "data": ROWS})))) == ROWS
    assert list(read_rows(_file(tmp_path, "b.json", _lines(ROWS)))) == ROWS


def test_folder_reads_all_files_by_name_and_split_chooses(tmp_path: Path) -> None:
    _file(tmp_path, "b/train-1.csv", "a\n3\n")
    _file(tmp_path, "a/train-0.jsonl", _lines([{"a": "1"}, {"b": "2"}]))
    _file(tmp_path, "test.jsonl", _lines([{"a": "9"}]))
    _file(tmp_path, "README.md", "not data")
    _file(tmp_path, ".hidden/x.jsonl", "broken")
    rows = read_rows(tmp_path)
    assert [source.name for source in rows.sources] == ["train-0.jsonl", "train-1.csv", "test.jsonl"]
    assert list(rows)[1:3] == [{"a": None, "b": "2"}, {"a": "3", "b": None}]
    assert [row["a"] for row in read_rows(tmp_path, split="test")] == ["9"]
    with pytest.raises(DataError, match=r"begins with 'valid'.*\n.*train-0\.jsonl"):
        read_rows(tmp_path, split="valid")


def test_changed_content_is_read_again(tmp_path: Path) -> None:
    path = _file(tmp_path, "a.jsonl", _lines([{"a": "old"}]))
    before = read_rows(path)
    _file(tmp_path, "a.jsonl", _lines([{"a": "new"}]))
    after = read_rows(path)
    assert (before[0], after[0]) == ({"a": "old"}, {"a": "new"})
    assert before.fingerprint() != after.fingerprint()
    assert after.fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_rows_are_mapped_from_the_cache_and_written_there_once(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path, "a.jsonl", _lines(ROWS))
    written = []
    for _ in range(2):
        assert read_rows(path)[-1] == ROWS[-1]
        (table,) = Path(os.environ["HF_DATASETS_CACHE"]).rglob("*.arrow")
        written.append((table, table.stat().st_mtime_ns))
    assert written[0] == written[1]
    with pytest.raises(IndexError):
        read_rows(path)[len(ROWS)]
    monkeypatch.setitem(READERS, ".jsonl", lambda path: 1 / 0)
    copy = _file(tmp_path, "b.jsonl", _lines(ROWS))
    assert list(read_rows(copy)) == ROWS  # the same bytes are not read again under another name
    assert capfd.readouterr() == ("", "")


def test_many_rows_come_back_in_order_and_singly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafold.data.read._BLOCK", 50_000)
    expected = [{"n": i, "text": "x" * (i % 40) + str(i)} for i in range(3500)]
    said: list[str] = []
    monkeypatch.setattr("lorafold.data.read._LARGE", 1000)
    path = _file(tmp_path, "a.jsonl", _lines(expected))
    rows = read_rows(path, say=said.append)
    assert list(rows) == expected
    assert [rows[i] for i in range(0, 3500, 7)] == expected[::7]  # more than are read before pages are dropped
    assert rows.sizes().tolist() == [len(row["text"]) + len(str(row["n"])) for row in expected]
    assert said == ["reading 0 MB of data, which is remembered until they change ..."]
    read_rows(path, say=said.append)
    assert len(said) == 1


@pytest.mark.parametrize(
    ("late", "reads"),
    [
        ({"a": "x"}, 1),
        ({"a": None}, 1),
        ({"b": "x"}, 2),
        ({"a": 7}, 2),
        ({"a": "x", "b": {"c": [1]}}, 2),
    ],
)
def test_a_file_is_read_again_only_for_what_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: dict[str, Any], reads: int
) -> None:
    monkeypatch.setattr("lorafold.data.read._BLOCK", 1000)
    expected = [{"a": str(i)} for i in range(2500)]
    path = _file(tmp_path, "a.jsonl", _lines([*expected, late, {"a": "last"}]))
    read, begun = READERS[".jsonl"], []
    monkeypatch.setitem(READERS, ".jsonl", lambda path: begun.append(path) or read(path))
    rows = read_rows(path)
    missing = {"a": None} | ({"b": None} if "b" in late else {})
    assert list(rows) == [missing | row for row in [*expected, late, {"a": "last"}]]
    assert len(begun) == reads


def test_a_late_fault_leaves_nothing_behind(tmp_path: Path) -> None:
    _file(tmp_path, "a.jsonl", _lines([{"a": str(i)} for i in range(2500)]) + b"{\n")
    _file(tmp_path, "b.csv", "")
    with pytest.raises(DataError, match=r"a\.jsonl: (.*\n)*.*line 2501: broken JSON(.*\n)*.*b\.csv: empty"):
        read_rows(tmp_path)
    assert not [path for path in Path(os.environ["HF_DATASETS_CACHE"]).rglob("*") if path.is_file()]


def test_reading_imports_no_pandas(tmp_path: Path) -> None:
    """Where it is installed pyarrow would: 47 MB."""
    path = _file(tmp_path, "a.jsonl", _lines(ROWS))
    code = f"""
import sys
from lorafold.data.read import read_rows
before = set(sys.modules)
assert len(read_rows({str(path)!r})) == {len(ROWS)}
print(sorted(name for name in set(sys.modules) - before if name.startswith("pandas")))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_rows_without_text_are_seen(tmp_path: Path) -> None:
    """White space as `str.strip` has it."""
    cells = ["a", "", None, " \t\n", "\x1c\u3000\x85", " a", "\u200b", "한"]
    rows = read_rows(_file(tmp_path, "a.jsonl", _lines([{"a": cell, "b": "b", "n": 1} for cell in cells])))
    expected = [cell is None or not cell.strip() for cell in cells]
    assert rows.unsure(["b", "a"]).tolist() == expected == [False, True, True, True, True, False, False, False]
    assert rows.unsure(["b"]).tolist() == [False] * 8
    assert rows.unsure(["b", "n"]).tolist() == [True] * 8  # not text
    assert rows.sizes().tolist() == [len((cell or "").encode()) + 2 for cell in cells]


def test_a_file_that_cannot_be_opened_is_named_with_the_faults_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _file(tmp_path, "a.jsonl", "{")
    closed, opened = _file(tmp_path, "b.jsonl", _lines(ROWS)), Path.open

    def refuse(path: Path, *arguments: Any, **options: Any) -> Any:
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"a\.jsonl: (.*\n)*.*b\.jsonl: cannot be opened: Permission denied"):
        read_rows(tmp_path)


def test_very_long_csv_fields_are_read(tmp_path: Path) -> None:
    assert read_rows(_file(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"))[0]["text"] == "x" * 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "empty: it holds no row"),
        ("a.jsonl", "\n \n", "empty: it holds no row"),
        ("a.json", "[]", "empty: it holds no row"),
        ("a.csv", "a,b\n", "empty: it holds no row"),
        ("a.parquet", "", "empty: it holds no row"),
        ("a.jsonl", "{}\n", "the rows have no columns"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "caf\xe9"}\n', "not UTF-8: byte 21 is 0xe9"),
        ("a.csv", b"a\n" + b"x" * 2_000_000 + b"\xc3\n", "not UTF-8: byte 2000002 is 0xc3"),
        ("a.jsonl.gz", gzip.compress(b'{"a": "\xff"}', mtime=0), "not UTF-8: byte 7 is 0xff"),
        ("a.jsonl.gz", b'{"a": 1}', "gzip data is damaged"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}' * 99, mtime=0)[:-9], "gzip data is damaged"),
        ("a.jsonl", '{"a": 1}\n{"a": \n{"a": 3}\n{b}\n', r"a\.jsonl: .*\n  - line 2: broken.*\n  - line 4: broken"),
        ("a.jsonl", "[\n{}\n]", r"line 1: broken JSON.*must be named \.json"),
        ("a.jsonl", "{x}\n" * 8, "line 5: broken.*\n  - and 3 more"),
        ("a.jsonl", '{"a": 1}\n"text"\n[1]\nnull\n3\n', "line 2: text, not.*\n.*3: a list.*\n.*null.*\n.*a number"),
        ("a.jsonl", '{"a": "\\ud83d"}', "line 1: half of a"),
        ("a.json", '[{"a": 1},\n{"a": }]', "line 2, column 7: broken JSON"),
        ("a.json", '[{"a": 1}, 3]', "item 1: a number, not an object"),
        ("a.json", '{"a": [], "b": []}', r"several lists \('a', 'b'\)"),
        ("a.json", '{"a": 1}', "it holds no list"),
        ("a.json", "[" * 100_000, "broken JSON"),
        ("a.csv", "a,b\n1,2\n1,2,3\n\n1\n", "line 3: 3 fields, the header has 2\n  - line 5: 1 fields"),
        ("a.csv", 'a\n"x" y\n', "line 2: .*quotes inside a quoted field are doubled"),
        ("a.csv", 'a\n"never closed\n', "unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", "'a' stands there twice"),
        ("a.tsv", "a\t\n1\t2\n", "a name is empty"),
        ("a.parquet", "no parquet", "not a sound Parquet file"),
        ("a.xlsx", "x", r"'.xlsx' is not known: \.jsonl, .*\.parquet"),
        ("a.parquet.gz", "x", r"not known: .*all but \.parquet"),
        ("a", "x", "'' is not known"),
    ],
)  # fmt: skip
def test_broken_files_name_file_and_place(tmp_path: Path, name: str, content: bytes | str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_rows(_file(tmp_path, name, content))
    assert str(tmp_path / name) in str(caught.value)


def test_faults_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    _file(tmp_path, "a.jsonl", "{")
    _file(tmp_path, "b.csv", "")
    with pytest.raises(DataError, match=r"a\.jsonl: (.*\n)*.*b\.csv: empty"):
        read_rows(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        read_rows(tmp_path / "missing.jsonl")
    with pytest.raises(DataError, match=r"no data file in this folder; known suffixes: \.jsonl"):
        read_rows(tmp_path)
    with pytest.raises(DataError, match="single file: leave it out"):
        read_rows(_file(tmp_path, "a.jsonl", _lines(ROWS)), split="train")


def test_columns_of_more_than_an_array_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow's builder drops what is more than 2 GiB without a word, and takes smaller cells after it."""

    class Full:
        def __init__(self) -> None:
            self.kept: list[str] = []

        def append_values(self, cells: list[str]) -> None:
            for cell in cells:
                if sum(map(len, self.kept)) + len(cell) <= 100:
                    self.kept.append(cell)

        def finish(self) -> pa.Array:
            return pa.array(self.kept, pa.string())

    monkeypatch.setattr("lorafold.data.read.StringBuilder", Full)
    expected = [{"a": "x" * (i % 60), "b": str(i)} for i in range(300)]
    assert list(read_rows(_file(tmp_path, "a.jsonl", _lines(expected)))) == expected
    with pytest.raises(DataError, match="a cell of more than 2 GiB"):
        read_rows(_file(tmp_path, "b.jsonl", _lines([{"a": "x" * 101}])))


def test_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(_file(tmp_path, "a file", "") / "cache"))
    with pytest.raises(DataError, match=r"cannot be written to the cache .*set HF_DATASETS_CACHE"):
        read_rows(_file(tmp_path, "a.jsonl", _lines(ROWS)))
    with pytest.raises(DataError, match="line 1: broken JSON"):  # which no room on a disk would mend
        read_rows(_file(tmp_path, "b.jsonl", b"{"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [({"HF_HOME": "home"}, "home/datasets"), ({"HF_HOME": "home", "HF_DATASETS_CACHE": "own"}, "own")],
)
def test_the_cache_is_where_the_hub_libraries_have_it(variables: dict[str, str], expected: str) -> None:
    """Read by the libraries when they are imported, so in a process of its own."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    code = "from lorafold.data.read import _cache; print(_cache())"
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | variables, check=True, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()) == Path(expected)


def test_split_is_complete_disjoint_and_pinned() -> None:
    train, held = split_rows(range(100), 0.1, seed=3)
    assert sorted([*train, *held]) == list(range(100))
    assert list(train) == sorted(train)
    assert list(held) == [5, 13, 22, 58, 62, 65, 85, 89, 92, 95]  # the same on every machine and version
    assert list(split_rows(range(100), 0.1, seed=4)[1]) != list(held)
    assert set(split_rows(range(100), 0.1, seed=3, most=4)[1]) < set(held)
    assert split_rows(range(100), 0.5, limit=4)[0][-1] < 4
    assert [list(part) for part in split_rows(range(3), 0.0)] == [[0, 1, 2], []]
    assert [len(part) for part in split_rows(range(2), 0.99)] == [1, 1]
    assert [len(part) for part in split_rows(range(9), 0.001)] == [8, 1]


def test_split_is_that_of_all_rows_sorted() -> None:
    """The held-out rows of older runs stay theirs; with `most` fewer of the same rows."""
    order = sorted(range(300), key=lambda i: hashlib.sha256(f"7:{i}".encode()).digest())
    for fraction, most in ((0.1, None), (0.9, None), (0.5, 20)):
        held = round(300 * fraction) if most is None else most
        assert [list(part) for part in split_rows(range(300), fraction, 7, most=most)] == [
            sorted(order[held:]),
            sorted(order[:held]),
        ]


def test_split_refuses_what_cannot_be_split() -> None:
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="at least 0 and below 1"):
            split_rows(range(9), fraction)
    with pytest.raises(ConfigError, match="at least 1 row"):
        split_rows(range(9), 0.1, limit=0)
    with pytest.raises(DataError, match="at least two rows"):
        split_rows(range(1), 0.5)
