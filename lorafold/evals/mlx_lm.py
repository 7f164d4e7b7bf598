"""mlx-lm as an oracle: the runtime that executes an MLX folder says what the folder computes.

No other file imports MLX. On Linux its CPU build computes the same, slowly (extra `mlx`).
"""

# T tokens, V vocabulary entries

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lorafold.errors import FormatError, MissingExtraError


def available() -> bool:
    """Whether mlx-lm can be imported here."""
    return importlib.util.find_spec("mlx_lm") is not None


class MlxLm:
    """A model folder loaded in mlx-lm, optionally with a LoRA adapter.

    Args:
        path: the model folder.
        adapter: a folder with an adapter in MLX's layout.

    Raises:
        FormatError: mlx-lm refuses the folder or the adapter; its own words are quoted.
        MissingExtraError: mlx-lm is not installed.
    """

    def __init__(self, path: str | Path, adapter: str | Path | None = None):
        if not available():
            raise MissingExtraError("mlx-lm", "mlx", "Running a folder in MLX")
        from mlx_lm.tuner.utils import load_adapters
        from mlx_lm.utils import load_model

        try:
            self._model: Any = load_model(Path(path))[0]
            if adapter is not None:
                self._model = load_adapters(self._model, str(adapter))
            self._model.eval()
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:
            raise FormatError(f"mlx-lm does not load {path}: {error}") from error

    def __enter__(self) -> MlxLm:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._model = None

    def logits(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Logits after each token of a row: (0, float32 [T, V])."""
        import mlx.core as mx

        yield 0, np.array(self._model(mx.array([list(ids)]))[0].astype(mx.float32))
