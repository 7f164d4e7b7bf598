"""Errors that name what was given, what is allowed and what to change.

Every error a user can cause is a `LoraFoldError`; the command line prints its message and exits
with code 2. Anything else that escapes is a bug.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class LoraFoldError(Exception):
    """A mistake in the input, with every fault found and the way out in one message."""


class ConfigError(LoraFoldError):
    """An option or a configuration key is unknown or has a value that is not allowed."""


class DataError(LoraFoldError):
    """A data file cannot be read, lacks columns, or yields nothing to learn from."""


class FormatError(LoraFoldError):
    """A model file is damaged, or uses something that is not supported."""


class AdapterError(LoraFoldError):
    """An adapter does not fit the model, or a target matches nothing."""


class FoldError(LoraFoldError):
    """An adapter cannot be written into the file format without loss."""


class TrainingError(LoraFoldError):
    """Training stopped; the message says at which step and row, and what was kept."""


class WorkerError(LoraFoldError):
    """One of several workers has ended, or sees something else than the others."""


class MissingExtraError(LoraFoldError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package {package!r}: install it with  pip install 'lorafold[{extra}]'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {match[0]!r}?)" if match else ""


def bullet_list(faults: Iterable[str]) -> str:
    """Format faults as an indented list, one per line."""
    return "\n".join(f"  - {fault}" for fault in faults)
