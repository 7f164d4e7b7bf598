"""Blocks of a quantization that are finished, beside its output, so that it goes on after an interruption."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

import lorafold
from lorafold.adapters.lowrank import LowRank
from lorafold.data.tokens import Tokens
from lorafold.files import OutputError, replacing, write_text
from lorafold.models.load import LoadedModel, compute_dtype
from lorafold.models.tensors import save_tensors
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import QuantizedWeight
from lorafold.runs.loftq import Fitted

_STATE = "quantize.json"


class Partial:
    """Finished blocks in `<output>.partial`, with what they are blocks of.

    Raises:
        OutputError: it cannot be made, or holds blocks of something else.
    """

    def __init__(self, output: Path, loaded: LoadedModel, rows: list[Tokens] | None, settings: dict[str, Any]):
        self.folder = output.with_name(f"{output.name}.partial")
        digest = hashlib.sha256(json.dumps([row.ids for row in rows or []]).encode()).hexdigest()
        state = {
            "version": lorafold.__version__,
            "model": loaded.weights_hash(),
            "rows": digest,
            "dtype": str(loaded.dtype),
            "products": str(compute_dtype()),
            **settings,
        }
        text = json.dumps(state, indent=2)
        file = self.folder / _STATE
        if self.folder.exists() and any(self.folder.iterdir()) and not _holds(file, text):
            raise OutputError(
                f"{self.folder} holds blocks of another quantization (other model, rows or options); remove it, or "
                "choose another output"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{self.folder} cannot be made: {error.strerror}") from error
        write_text(file, text)

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:04d}.safetensors"

    def read(
        self, index: int, layers: Mapping[str, nn.Linear | QuantLinear], codec: str, started: bool
    ) -> dict[str, Fitted] | None:
        """A finished block; None where it is not finished or damaged.

        Args:
            started: its layers have LoftQ's start as well.
        """
        try:
            with safe_open(self._file(index), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if tensors.keys() != {f"{name}{part}" for name in layers for part in ("", *_PARTS[: 2 * started])}:
            return None
        done = {}
        for name, layer in layers.items():
            weight = QuantizedWeight(codec, (layer.out_features, layer.in_features), tensors[name])
            update = LowRank(*(tensors[name + part] for part in _PARTS)) if started else None
            done[name] = Fitted(weight, update)
        return done

    def write(self, index: int, done: Mapping[str, Fitted]) -> None:
        """Keep a finished block."""
        tensors = {}
        for name, fitted in done.items():
            tensors[name] = fitted.weight.blocks
            if fitted.update is not None:
                tensors |= {name + _PARTS[0]: fitted.update.a, name + _PARTS[1]: fitted.update.b}
        with replacing(self._file(index)) as temporary:
            save_tensors(temporary, {name: value.contiguous() for name, value in tensors.items()}, None)

    def remove(self) -> None:
        """The output stands; the blocks are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)


_PARTS = (".lora_A", ".lora_B")


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text
