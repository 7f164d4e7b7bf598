"""Several workers, one run: processes that torchrun has started and that share the rows of each step.

Every worker holds the model and its adapters, takes a part of a step's rows, and adds its gradients to those of the
others, all in one buffer; then each makes the same optimizer step. Nothing else of LoraFold knows torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lorafold.config import workers_of
from lorafold.data.packs import deal
from lorafold.data.stream import RowStream
from lorafold.data.tokens import Tokens
from lorafold.errors import ConfigError, LoraFoldError, WorkerError

_PATIENCE = datetime.timedelta(hours=2)  # the first worker generates samples while the others wait
_MESSAGE_BYTES = 4096


@dataclass(frozen=True)
class Workers:
    """The workers of a run, as one of them sees them.

    Attributes:
        rank: of this worker, from 0.
        count: of all.
        local_rank: among those on this machine.
        sharded: the base is shared out, so that all must make the same passes, see `sharding.py`.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the worker that writes files, prints and generates."""
        return self.rank == 0

    def take_device(self, device: str) -> str:
        """The same device; of several GPUs this worker computes on one of its own.

        Raises:
            ConfigError: there are fewer than workers on this machine.
        """
        if self.count > 1 and device == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise ConfigError(
                    f"{torch.cuda.device_count()} GPUs for {self.local_rank + 1} workers or more on one machine; lower "
                    "torchrun's --nproc-per-node, or train with --device cpu"
                )
            torch.cuda.set_device(self.local_rank)
        return device

    def every(self, rows: Sequence[Tokens] | RowStream) -> Sequence[Tokens] | RowStream:
        """This worker's part of many rows: one of as many as there are workers; where the base is shared out, all."""
        return rows if self.count == 1 or self.sharded else list(islice(rows, self.rank, None, self.count))

    def share(self, rows: list[Tokens]) -> list[Tokens]:
        """This worker's rows of a step: the longest are dealt first, each to the worker that has the fewest tokens."""
        if self.count == 1:
            return rows
        return [rows[i] for i in deal([len(row) for row in rows], self.count)[self.rank]]

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Sums over all workers."""
        if self.count == 1:
            return numbers
        sums = torch.tensor(numbers, dtype=torch.float64)
        with _reached():
            dist.all_reduce(sums)
        return tuple(sums.tolist())

    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient the sum of those of all workers; what has none anywhere keeps none."""
        if self.count == 1:
            return
        have = [float(p.grad is not None) for p in parameters]
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(part.flatten() for part in parts), torch.tensor(have, device=parts[0].device)])
        with _reached():
            dist.all_reduce(flat)
        *sums, counts = flat.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, part, had in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if had else None

    def passes(self, own: int) -> int:
        """Passes that this worker makes, of which so many are its own: where the base is shared out, as many as any."""
        if not self.sharded:
            return own
        most = torch.tensor(own)
        with _reached():
            dist.all_reduce(most, dist.ReduceOp.MAX)
        return int(most)

    def gather(self, part: Tensor) -> Tensor:
        """The parts of all workers, one after the other; [n] each."""
        whole = part.new_empty(self.count * len(part))
        with _reached():
            dist.all_gather(list(whole.split(len(part))), part)
        return whole

    @contextlib.contextmanager
    def together(self, kind: type[LoraFoldError] = LoraFoldError) -> Iterator[None]:
        """What goes wrong inside on one worker ends all of them; nothing inside may wait for another worker.

        Raises:
            LoraFoldError: of the kind given, on every worker, with the message of the first that failed.
        """
        if self.count == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except (LoraFoldError, OSError) as error:
            failure = error
        if any(self.total(failure is not None)):
            raise kind(self._first_message(str(failure or ""))) from failure

    def agree(self, number: int, otherwise: str) -> None:
        """Go on only where every worker gives the same number, of up to 62 bits.

        Raises:
            WorkerError: on every worker, with the message given.
        """
        if self.count == 1:
            return
        ends = torch.tensor([number, -number])
        with _reached():
            dist.all_reduce(ends, dist.ReduceOp.MAX)
        if ends[0] != -ends[1]:
            raise WorkerError(otherwise)

    def _first_message(self, text: str) -> str:
        own = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
        data = text.encode()[:_MESSAGE_BYTES]
        own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else 0
        everyone = [torch.empty_like(own) for _ in range(self.count)]
        with _reached():
            dist.all_gather(everyone, own)
        texts = [bytes(message.tolist()).rstrip(b"\0").decode(errors="ignore") for message in everyone]
        rank, first = next((rank, message) for rank, message in enumerate(texts) if message)
        return first if rank == 0 else f"worker {rank}: {first}"


ALONE = Workers()


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise WorkerError(
            f"another worker has ended, and its own output says why ({str(error).splitlines()[0]})"
        ) from error


@contextlib.contextmanager
def joined() -> Iterator[Workers]:
    """The workers that torchrun has started, this one among them; `ALONE` where it has not, or has started one.

    They speak through gloo, and add gradients that lie on GPUs through NCCL.
    """
    launched = workers_of(os.environ)
    if launched is None:
        yield ALONE
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE)
    try:
        yield Workers(launched.rank, launched.count, launched.local_rank)
    finally:
        dist.destroy_process_group()
