"""Fixtures that all rooms share: tiny models, written once per session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numba
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: its kernels run in its interpreter, on the CPU
    os.environ["TRITON_INTERPRET"] = "1"

from tests.tiny import tiny_gguf


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_file("qwen2", "Q5_1", tied=False)`: the path of a tiny GGUF file; the same options give the same file.

    Do not write to it; for a copy of your own call `tiny_gguf(tmp_path, ...)`.
    """

    @cache
    def make(architecture: str = "llama", types: str = "Q4_1", **options: Any) -> Path:
        return tiny_gguf(tmp_path_factory.mktemp(f"{architecture}-{types}"), architecture, types, **options)

    return make


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny matrices gain nothing from a second thread, and where other processes run they wait 10 ms a call for it.

    tests/quant/test_kernels.py compares one thread with several.
    """
    numba.set_num_threads(1)
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test begins from the same random state and leaves the caller's as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
