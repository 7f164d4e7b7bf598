"""Runs of two workers: the same result as one, and one message when something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafold.train.distributed import Workers
from tests.cli.conftest import quick
from tests.practice import command, token_rows, write_data

ROOT = Path(__file__).parent.parent.parent
OPTIONS = quick("--save-steps", 2, "--eval-steps", 4, "--method", "lora", "--r", 4, "--max-grad-norm", 0.5)
SHARED = [("lora", ""), ("qa-lora", ""), ("lora", "again")]  # the last with blocks computed again
FALLING = ["--target-r", 2, "--tinit", 1]
ONE, TWO = ["--per-device-train-batch-size", 4], ["--per-device-train-batch-size", 2]


def environment(folder: Path) -> dict[str, str]:
    """Of a process that is started here."""
    values = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    return values | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_ports(count: int) -> list[str]:
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def arguments(tiny_file: Callable[..., Path], data: Path) -> list[object]:
    return [tiny_file("llama", "Q4_1"), "--data", data, *OPTIONS]


@pytest.fixture(scope="module")
def one(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    assert command("train", *arguments, *ONE, "--output-dir", folder) == 0
    return folder


@pytest.fixture(scope="module")
def two(arguments: list[object], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The run of two workers that torchrun has started, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "lorafold"]
    line += ["--", "train", *arguments, *TWO, "--output-dir", folder / "run"]
    done = subprocess.run(
        [str(a) for a in line], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run", done.stdout, done.stderr


def interrupted(run: Path, target: Path) -> Path:
    """A run as it was after its checkpoint of step 2."""
    shutil.copytree(run, target)
    for name in ("adapter", "checkpoint-4", "checkpoint-6"):
        shutil.rmtree(target / name)
    (target / "summary.json").unlink()
    return target


@pytest.fixture(scope="module")
def cases(
    arguments: list[object], one: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Name -> what each of two workers says of it."""
    folder = tmp_path_factory.mktemp("cases")
    interrupted(one, folder / "resumed")
    shutil.copyfile(data, folder / "rows-0.jsonl")
    (folder / "rows-1.jsonl").write_text('{"prompt": "a", "completion":\n')
    shutil.copyfile(data, folder / "other-0.jsonl")
    write_data(folder / "other-1.jsonl", 21)

    def train(output: str, *options: object) -> list[str]:
        return [str(a) for a in ("train", *arguments, *options, "--output-dir", folder / output)]

    def on(rows: str) -> list[str]:
        line = train(rows, *TWO)
        line[line.index("--data") + 1] = f"{folder}/{rows}-{{rank}}.jsonl"
        return line

    few = train("shared-few", "--per-device-train-batch-size", 1, "--limit", 13, "--gradient-checkpointing")
    listed = [
        ("gradients", "gradients", []),
        ("resumed", "said", [*train("resumed", *TWO), "--resume"]),
        ("rows per step", "said", [*train("resumed", *ONE), "--resume"]),
        ("finished", "said", [*train("resumed", *TWO), "--resume"]),
        ("few rows", "said", train("few", "--per-device-train-batch-size", 1, "--limit", 13)),
        *((f"shared {kind} {again}", "shared_out", [str(arguments[0]), kind, again]) for kind, again in SHARED),
        ("ranks", "falling_ranks", train("ranks", *TWO, *FALLING)),
        ("shared", "said", train("shared", *TWO, "--shard-base")),
        ("shared, few rows", "said", [*few, "--shard-base"]),
        ("shared, not finite", "a_loss_that_is_not_finite", train("shared-nan", *TWO, "--shard-base")),
        ("bad options", "said", train("none", "--seed", -1)),
        ("bad rows", "said", on("rows")),
        ("other rows", "said", on("other")),
        ("not finite", "a_loss_that_is_not_finite", train("diverged", *TWO)),
        ("full disk", "a_full_disk", train("full", *TWO)),
        ("a worker dies", "a_worker_dies", train("dead", *TWO)),
    ]
    (folder / "cases.json").write_text(json.dumps(listed))
    line = [sys.executable, "-m", "tests.cli.workers", str(folder), *free_ports(len(listed))]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    workers = [
        subprocess.Popen(line, cwd=ROOT, env={**environment(folder), **told, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert codes == [0, 9]
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in "01"]
    return {"folder": [folder], **{name: [r.get(name) for r in results] for name, *_ in listed}}  # type: ignore[dict-item]


def same_run(actual: Path, expected: Path) -> None:
    """Equal but for the order of sums in float32.

    Adam divides a gradient by its size, so a parameter whose gradient is nearly zero may move by a visible part of a
    step (0.01), as in tests/train/test_loop.py; losses are means over many and stay within 1e-4.
    """
    lines = [[json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()] for run in (actual, expected)]
    assert len(lines[0]) == len(lines[1])
    for ours, theirs in zip(*lines, strict=True):
        for key in theirs.keys() - {"seconds"}:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (key, theirs)
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (actual, expected))
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert (ours[key] - value).abs().max() < 2e-3, key
        assert (ours[key] - value).abs().mean() < 1e-5, key
    assert {p.name for p in actual.iterdir()} == {p.name for p in expected.iterdir()}


def test_two_workers_end_where_one_ends(two: tuple[Path, str, str], one: Path) -> None:
    run, out, err = two
    same_run(run, one)
    assert (json.loads((run / "summary.json").read_text())["workers"], out.count("held-out loss")) == (2, 1)
    assert err.count("held-out loss before: ") == 1
    assert "2 workers, 4 rows a step" in err


def test_the_first_step_is_the_same_to_the_last_digits(two: tuple[Path, str, str], one: Path) -> None:
    """Before Adam has divided by anything: loss and gradient norm to 1e-6, which is float32's sum in another order."""
    firsts = []
    for run in (two[0], one):
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        firsts.append(next(line for line in lines if "loss" in line))
    for key in ("loss", "grad_norm", "rows", "tokens", "supervised"):
        assert firsts[0][key] == pytest.approx(firsts[1][key], rel=1e-6)


def test_two_go_on_where_one_was_stopped(cases: dict[str, Any], one: Path) -> None:
    assert [worker["code"] for worker in cases["resumed"]] == [0, 0]
    same_run(cases["folder"][0] / "resumed", one)


def test_one_goes_on_where_two_were_stopped(
    two: tuple[Path, str, str], one: Path, arguments: list[object], tmp_path: Path
) -> None:
    run = interrupted(two[0], tmp_path / "run")
    assert command("train", *arguments, *ONE, "--output-dir", run, "--resume") == 0
    same_run(run, one)


def test_a_worker_may_have_no_rows(cases: dict[str, Any], arguments: list[object], tmp_path: Path) -> None:
    """In the last step of an epoch of 9 rows, two a step."""
    assert [worker["code"] for worker in cases["few rows"]] == [0, 0]
    options = ["--per-device-train-batch-size", 2, "--limit", 13, "--output-dir", tmp_path / "run"]
    assert command("train", *arguments, *options) == 0
    assert [worker["code"] for worker in cases["shared, few rows"]] == [0, 0]
    same_run(cases["folder"][0] / "few", tmp_path / "run")
    same_run(cases["folder"][0] / "shared-few", tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in lines if "rows" in line] == [2, 2, 2, 2, 1, 2]


@pytest.mark.parametrize(("method", "again"), SHARED)
def test_a_base_that_is_shared_out_computes_the_same(cases: dict[str, Any], method: str, again: str) -> None:
    """Bit for bit; each of two workers keeps half of the bytes, and one block is whole at a time."""
    for worker in cases[f"shared {method} {again}"]:
        assert worker["equal"]
        assert all(worker["equal"])
        assert worker["all"] / 2 <= worker["kept"] < 0.55 * worker["all"]  # tensors begin at multiples of 64 bytes
        assert worker["left"] == 0
        assert worker["whole"] == [True, False, False]  # the first block comes last in the backward pass


def test_a_run_on_a_base_that_is_shared_out_ends_the_same(cases: dict[str, Any], one: Path) -> None:
    assert [worker["code"] for worker in cases["shared"]] == [0, 0]
    assert "MB of its blocks on each worker" in cases["shared"][0]["err"]
    same_run(cases["folder"][0] / "shared", one)


def test_ranks_fall_alike_on_all_workers(cases: dict[str, Any], arguments: list[object], tmp_path: Path) -> None:
    """And as in one process, also one that takes two passes for a step."""
    first, second = cases["ranks"]
    assert (first["code"], second["code"]) == (0, 0)
    assert len(first["decided"]) == 6  # after steps 2 to 6, and at the end
    assert first["decided"] == second["decided"]
    options = [*TWO, *FALLING, "--gradient-accumulation-steps", 2]
    assert command("train", *arguments, *options, "--output-dir", tmp_path / "run") == 0
    same_run(tmp_path / "run", cases["folder"][0] / "ranks")
    summaries = [
        json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", cases["folder"][0] / "ranks")
    ]
    assert summaries[0]["ranks"] == summaries[1]["ranks"]
    assert sum(summaries[0]["ranks"].values()) == 2 * len(summaries[0]["ranks"])


def test_a_base_is_not_shared_out_alone(train: Callable[..., str]) -> None:
    assert "this process is alone" in train("--shard-base")


def test_gradients_are_added_and_none_is_made_up(cases: dict[str, Any]) -> None:
    for gradients, sums in cases["gradients"]:
        assert gradients == [[[3.0] * 3] * 2, [0.0, 1.0, 2.0, 3.0], None]
        assert sums == [2.0, 4.0]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("rows per step", "a step had 4 rows and would have 8 with 2 workers: give --per-device-train-batch-size 2 "),
        ("bad options", "seed is -1"),
        ("bad rows", "worker 1: "),
        ("other rows", "different training data"),
        ("not finite", "worker 1: the loss is nan at step 3, row"),
        ("full disk", "No space left"),
        ("shared, not finite", "worker 1: the loss is nan at step"),
    ],
)
def test_what_is_wrong_with_one_ends_all_with_one_message(cases: dict[str, Any], case: str, said: str) -> None:
    first, second = cases[case]
    assert (first["code"], second["code"]) == (2, 2)
    assert first["err"].count("lorafold: ") == 1
    assert said in first["err"].partition("lorafold: ")[2]
    assert second["err"] == second["out"] == ""


def test_a_worker_that_dies_ends_the_other(cases: dict[str, Any]) -> None:
    first, second = cases["a worker dies"]
    assert (first["code"], second) == (2, None)
    assert "another worker has ended" in first["err"]
    assert "stopped after step 2 of 6" in first["err"]
    assert (cases["folder"][0] / "dead" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_cannot_begin_leaves_nothing(cases: dict[str, Any]) -> None:
    assert not {p.name for p in cases["folder"][0].iterdir()} & {"none", "rows", "other"}


def test_a_finished_run_is_left_alone_by_all(cases: dict[str, Any]) -> None:
    first, second = cases["finished"]
    assert (first["code"], second["code"], second["err"]) == (0, 0, "")
    assert "nothing is left to do" in first["err"]


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_rows_are_dealt_out_evenly(workers: int) -> None:
    """Each row once, and no worker more than the longest row above another."""
    for count in (1, 4, 11):
        rows = token_rows(count, seed=count)
        shares = [Workers(rank, workers).share(rows) for rank in range(workers)]
        assert sorted(row.row for share in shares for row in share) == list(range(count))
        tokens = [sum(map(len, share)) for share in shares]
        assert max(tokens) - min(tokens) <= max(map(len, rows))
        assert [[row.row for row in share] for share in shares] == [sorted(row.row for row in s) for s in shares]
        every = [Workers(rank, workers).every(rows) for rank in range(workers)]
        assert sorted(row.row for part in every for row in part) == list(range(count))


def test_torchrun_is_recognized_by_all_it_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone RANK, as schedulers set it, is no worker: its errors must be seen."""
    from lorafold.config import workers_of

    told = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    launched = workers_of(told)
    assert launched is not None
    assert (launched.rank, launched.local_rank, launched.count) == (1, 0, 2)
    for name in told:
        assert workers_of({key: value for key, value in told.items() if key != name}) is None
    assert workers_of({**told, "WORLD_SIZE": "1"}) is None
    assert torch.equal(torch.tensor(Workers().total(1.5)), torch.tensor([1.5]))
