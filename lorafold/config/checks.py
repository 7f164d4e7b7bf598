"""What the configurations share: one error that names every fault."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from lorafold.errors import ConfigError, bullet_list


def not_positive(config: Any, *names: str) -> list[str]:
    """Faults of those fields that are neither None nor a finite number above 0."""
    values = {name: getattr(config, name) for name in names}
    return [
        f"{name} is {value}; it must be positive"
        for name, value in values.items()
        if value is not None and not 0 < value < math.inf
    ]


def check_positive(**counts: int) -> None:
    """Refuse counts below 1.

    Raises:
        ConfigError: naming all of them.
    """
    refuse([f"{name} is {count}; it must be positive" for name, count in counts.items() if count < 1])


_gathered: ContextVar[list[str] | None] = ContextVar("_gathered", default=None)


@contextmanager
def gather_faults() -> Iterator[None]:
    """Let several configurations be made inside, and raise at the end what is wrong with any of them.

    Raises:
        ConfigError: naming every fault of all of them.
    """
    faults: list[str] = []
    token = _gathered.set(faults)
    try:
        yield
    finally:
        _gathered.reset(token)
    refuse(faults)


def refuse(faults: list[str]) -> None:
    """Raise what is wrong, or note it where faults are gathered.

    Raises:
        ConfigError: naming every fault.
    """
    gathered = _gathered.get()
    if gathered is not None:
        gathered += faults
    elif faults:
        raise ConfigError(faults[0] if len(faults) == 1 else "several options are wrong:\n" + bullet_list(faults))
