"""Rows that become tokens when they are wanted are the same rows, and their counts the same counts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lorafold.config import TrainingConfig
from lorafold.data import stream
from lorafold.data.read import Rows, read_rows
from lorafold.data.rows import converter, to_examples
from lorafold.data.stream import RowStream, row_batches
from lorafold.data.tokens import tokenize
from lorafold.errors import DataError
from lorafold.train.loop import epoch_batches
from tests.data.tiny_tokenizers import byte_level

COUNT, MAX_LENGTH = 60, 40
CONFIG = TrainingConfig(per_device_train_batch_size=4, seed=5)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(stream, "_SPREAD", 7)
    monkeypatch.setattr(stream, "_LONGEST", 3)
    monkeypatch.setattr(stream, "_BATCH", 16)


def _rows(folder: Path, lines: list[dict[str, Any]]) -> Rows:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_rows(path)


def _prompts() -> list[dict[str, str]]:
    """Every seventh row is cut; rows 20 to 31 have prompts so long that nothing is left to learn."""
    return [
        {"prompt": "a" * (60 if 20 <= i < 32 else 1 + i % 5), "completion": f"{i} the" + " cat" * (i % 7 == 0) * 50}
        for i in range(COUNT)
    ]


def _stream(rows: Rows, index: list[int] | range, template: str = "plain") -> RowStream:
    convert = converter(rows.columns, None, None)
    return RowStream(rows, np.array(index), convert, byte_level(), template, MAX_LENGTH, "completion")


def test_a_stream_gives_what_tokenizing_at_once_gives(tmp_path: Path) -> None:
    rows = _rows(tmp_path, _prompts())
    index = [i for i in range(COUNT) if i % 11]
    found = _stream(rows, index)
    expected = tokenize(to_examples(rows, indices=index), byte_level(), template="plain", max_length=MAX_LENGTH)
    for _ in range(2):  # what is met twice counts once
        assert list(found) == expected.rows
        assert (found.cut, found.cut_tokens) == (expected.cut, expected.cut_tokens)
        assert sorted(found.dropped) == expected.dropped
    assert len(found) == len(index) == len(expected.rows) + len(expected.dropped)
    assert f"{len(index)} of {len(index)} rows were tokenized. {expected.cut} rows longer" in found.describe_met()


def test_counts_are_of_the_rows_that_were_met(tmp_path: Path) -> None:
    found = _stream(_rows(tmp_path, _prompts()), range(COUNT))
    sampled = sum(found._met)
    assert 3 <= sampled < COUNT
    assert max(map(len, found.sample)) == MAX_LENGTH  # the longest are among the sample
    before = (found.cut, len(found.dropped))
    found.batch([1, 2, 33, 42])
    assert found._met.sum() <= sampled + 4
    assert found.cut - before[0] <= 1
    assert "60 rows, tokenized when they are needed. Of 7 tried: " in found.describe()
    assert "template: plain." in found.describe()


def test_batches_are_those_of_a_list(tmp_path: Path) -> None:
    """Against the order as it was drawn before there were streams, and rows tokenized at once."""
    rows = _rows(tmp_path, [line for line in _prompts() if len(line["prompt"]) < 60])
    found, count = _stream(rows, range(len(rows))), len(rows)
    kept = tokenize(to_examples(rows), byte_level(), template="plain", max_length=MAX_LENGTH).rows
    generator = torch.Generator().manual_seed(CONFIG.seed)
    orders = [torch.randperm(count, generator=generator).tolist() for _ in range(2)]
    expected = [[kept[i] for i in order[at : at + 4]] for order in orders for at in range(0, count, 4)]
    for source in (kept, found):
        assert list(row_batches(source, itertools.islice(epoch_batches(count, CONFIG), len(expected)))) == expected


def test_rows_with_nothing_to_learn_are_passed_over(tmp_path: Path) -> None:
    found = _stream(_rows(tmp_path, _prompts()), range(COUNT))
    assert [row.row for row in found.batch([3, 25, 40])] == [3, 40]
    assert [row.row for row in found.batch([20, 25])] == [32]
    last = _stream(_rows(tmp_path, _prompts()[:30]), range(30))
    assert [row.row for row in last.batch([28])] == [0]


def test_a_sample_with_nothing_to_learn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first 40 tokens hold no answer"):
        _stream(_rows(tmp_path, [{"prompt": "a" * 60, "completion": "b"}] * 20), range(20))


def test_a_row_that_a_template_refuses_is_named_when_it_is_met(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]
    lines = [{"messages": turns} for _ in range(40)]
    lines[17] = {"messages": turns[1:]}  # an answer to nothing, and not among the longest
    found = _stream(_rows(tmp_path, lines), range(40))
    coming = row_batches(found, [[1, 2], [16, 17], [3]])
    assert [row.row for row in next(coming)] == [1, 2]
    with pytest.raises(DataError, match="row 17: the template 'plain' needs user and assistant by turns"):
        next(coming)
