"""Safetensors files: written whole, alone or in a model folder, and mapped, to take out tensors as they are wanted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from lorafold.errors import FormatError
from lorafold.files import default_mode, replacing_folder

UNTIED = (CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME)  # the files that `untie_folder` changes
NUMBERS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_DTYPES = {**NUMBERS, "U32": torch.uint32, "U8": torch.uint8, "I8": torch.int8}


@dataclass(frozen=True)
class StoredTensor:
    """One entry of a safetensors header.

    Attributes:
        file: the file it lies in.
        kind: type name, a key of `_DTYPES`.
        shape: its dimensions.
        start, end: its bytes, counted from the beginning of the file.
    """

    file: Path
    kind: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFolder:
    """The model*.safetensors files of a folder, mapped.

    Attributes:
        path: the folder.
        tensors: name -> where it lies.

    Raises:
        FormatError: there are no such files, or one is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        self._maps: dict[Path, np.ndarray] = {}
        self.tensors: dict[str, StoredTensor] = {}
        for file in sorted(path.glob("model*.safetensors")):
            self._maps[file] = np.memmap(file, np.uint8, mode="c")
            self.tensors |= _read_header(file, self._maps[file])
        if not self.tensors:
            raise FormatError(f"{path} holds no model*.safetensors file")

    def stored_dtype(self, name: str) -> torch.dtype:
        """The type a tensor is stored in."""
        return _DTYPES[self.tensors[name].kind]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor, uint8, a view of the mapped file (writing to it changes no file)."""
        stored = self.tensors[name]
        return self._maps[stored.file][stored.start : stored.end]

    def dense(self, name: str) -> Tensor:
        """A copy of a tensor of plain numbers.

        Raises:
            FormatError: it is of another type.
        """
        stored = self.tensors[name]
        if stored.kind not in NUMBERS:
            raise FormatError(f"{self.path}: {name} is stored as {stored.kind}; it must be {', '.join(NUMBERS)}")
        return torch.from_numpy(self.raw(name).copy()).view(_DTYPES[stored.kind]).reshape(stored.shape)


def _read_header(file: Path, data: np.ndarray) -> dict[str, StoredTensor]:
    try:
        length = int.from_bytes(bytes(data[:8]), "little")
        header = json.loads(bytes(data[8 : 8 + length]))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + at for at in entry["data_offsets"])
                shape = tuple(int(n) for n in entry["shape"])
                size = _DTYPES[entry["dtype"]].itemsize * int(np.prod(shape, dtype=np.int64))
                if not 8 + length <= start <= end <= len(data) or end - start != size:
                    raise ValueError(f"the bytes of {name} lie outside the file")
                found[name] = StoredTensor(file, entry["dtype"], shape, start, end)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{file} is damaged: {error}") from None
    return found


def create_folder(
    path: Path, model: PreTrainedModel, tokenizer: Any, tensors: dict[str, Tensor], config: dict[str, Any], kind: str
) -> None:
    """Write a model folder: tokenizer, tensors, config.json, and how the model is to be sampled from.

    Args:
        path: the new folder; it appears whole or not at all.
        kind: "pt" or "mlx", the `format` of the tensors' file.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing_folder(path) as temporary:
        tokenizer.save_pretrained(temporary)
        save_tensors(temporary / "model.safetensors", tensors, {"format": kind})
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2), encoding="utf-8")
        if model.generation_config is not None:
            model.generation_config.to_json_file(temporary / GENERATION_CONFIG_NAME)


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None) -> None:
    """Write a safetensors file; what goes wrong is an OSError, as for any other file."""
    try:
        save_file(tensors, path, metadata=header)
        path.chmod(default_mode())  # safetensors makes it readable for the owner alone
    except SafetensorError as error:
        raise OSError(str(error)) from error


def untie_folder(folder: Path, head: Mapping[str, str]) -> None:
    """Let a model folder say that its head has a weight of its own.

    Args:
        head: the head's tensors -> the file that holds them.
    """
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    config["tie_word_embeddings"] = False
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    if path.is_file():
        index = json.loads(path.read_text(encoding="utf-8"))
        index["weight_map"] |= head
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
