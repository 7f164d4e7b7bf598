"""One of two workers: `python -m tests.cli.workers FOLDER PORT...` does every case, each at a port of its own.

RANK and so on stand in the environment, as torchrun sets them. What came of them is written to FOLDER/RANK.json.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorafold.adapters.inject import inject
from lorafold.adapters.ranks import MovingRanks
from lorafold.config import AdapterSpec
from lorafold.data.packs import pack
from lorafold.evals.loss import pack_loss
from lorafold.models.load import load
from lorafold.runs.folder import RunFolder
from lorafold.train import loop
from lorafold.train.budget import checkpointed
from lorafold.train.distributed import joined
from lorafold.train.sharding import ShardedBase
from tests.practice import command, lora_like, token_rows

RANK = int(os.environ.get("RANK", 0))


def said(line: list[str]) -> dict[str, Any]:
    """Exit code and messages of a command; `{rank}` in its arguments is replaced."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command(*(argument.replace("{rank}", str(RANK)) for argument in line))
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def gradients(_: list[str]) -> Any:
    """Of three parameters one has a gradient everywhere, one on the second worker only, and one nowhere."""
    parameters = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad = torch.full((2, 3), 1.0 + RANK)
    if RANK == 1:
        parameters[1].grad = torch.arange(4.0)
    with joined() as workers:
        workers.add_gradients(parameters)
        sums = workers.total(0.5 + RANK, 2)
    return [None if p.grad is None else p.grad.tolist() for p in parameters], sums


def frozen_bytes(layers: nn.Module) -> int:
    """What is whole of the blocks' frozen tensors."""
    return sum(t.nbytes for t in [*layers.buffers(), *layers.parameters()] if not t.requires_grad)


def shared_out(arguments: list[str]) -> dict[str, Any]:
    """Bytes of a model's blocks before and after they are shared out, and what that changes in loss and gradients."""
    path, method, checkpointing = arguments
    results: list[list[Tensor]] = []
    said: dict[str, Any] = {}
    with joined() as workers:
        for cut in (False, True):
            loaded = load(path)
            inject(loaded.model, AdapterSpec(method, 4))  # type: ignore[arg-type]
            lora_like(loaded.model)
            layers = loaded.model.model.layers
            said["all"] = frozen_bytes(layers)
            if cut:
                said["kept"] = ShardedBase(layers, workers, "cpu").held
                said["left"] = frozen_bytes(layers)
            loaded.model.train()
            with checkpointed(loaded, bool(checkpointing)):
                loss = pack_loss(loaded, pack(token_rows(5)))
                loss.backward()
            results.append([loss.detach(), *(p.grad for p in loaded.model.parameters() if p.grad is not None)])
            said["whole"] = [frozen_bytes(layer) > 0 for layer in layers]
    said["equal"] = [torch.equal(a, b) for a, b in zip(*results, strict=True)]
    return said


def a_loss_that_is_not_finite(line: list[str]) -> Any:
    """On the second worker, from its third pack on."""
    calls = 0

    def poisoned(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return pack_loss(*arguments) * (float("nan") if RANK == 1 and calls >= 3 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "pack_loss", poisoned)
        return said(line)


def falling_ranks(line: list[str]) -> Any:
    """What a worker has decided about ranks, also the one that writes nothing."""
    decided: list[dict[str, list[bool]]] = []
    original = MovingRanks.kept

    def noted(ranks: MovingRanks, budget: int) -> dict[str, Tensor]:
        kept = original(ranks, budget)
        decided.append({path: keep.tolist() for path, keep in kept.items()})
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MovingRanks, "kept", noted)
        return {**said(line), "decided": decided}


def a_full_disk(line: list[str]) -> Any:
    """Where the first worker writes."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "metric", full)
        return said(line)


def a_worker_dies(line: list[str]) -> Any:
    """The second, after two steps."""
    original = loop._one_step

    def dying(*arguments: Any) -> Any:
        if RANK == 1 and arguments[6] == 3:
            os._exit(9)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_one_step", dying)
        return said(line)


def main(folder: Path, ports: list[str]) -> None:
    """Do the cases of FOLDER/cases.json, [name, function, arguments] each."""
    torch.set_num_threads(1)
    results = {}
    for (name, function, arguments), port in zip(json.loads((folder / "cases.json").read_text()), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        results[name] = globals()[function](arguments)
        (folder / f"{RANK}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
