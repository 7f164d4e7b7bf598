"""What torchrun tells each process that it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_TOLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launched:
    """One of several processes.

    Attributes:
        rank: among all, from 0.
        local_rank: among those on this machine.
        count: of all.
    """

    rank: int
    local_rank: int
    count: int


def workers_of(environment: Mapping[str, str]) -> Launched | None:
    """What the environment of a process says; None where torchrun has not started it, or has started no other."""
    if not all(environment.get(name) for name in _TOLD) or int(environment["WORLD_SIZE"]) == 1:
        return None
    return Launched(int(environment["RANK"]), int(environment["LOCAL_RANK"]), int(environment["WORLD_SIZE"]))
