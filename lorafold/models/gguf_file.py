"""A GGUF file, mapped: its metadata, its tensor table and the bytes of each tensor.

Format: github.com/ggml-org/ggml, docs/gguf.md. Every field of the header is checked before anything is
built from it, and a fault names the field, its position and what was expected.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lorafold.errors import FormatError
from lorafold.quant.codecs import CODECS, GGUF_CODECS

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DENSE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
SUPPORTED = (*DENSE, *GGUF_CODECS)

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # ggml.h: GGML_MAX_DIMS
_MAX_NESTING = 8


@dataclass(frozen=True)
class TensorInfo:
    """One row of the tensor table.

    Attributes:
        name: the tensor's name in the file.
        shape: dimensions in torch order, [out, in] for a matrix (the file lists them reversed).
        type: ggml's type name, such as `"Q4_1"`.
        offset: first byte, counted from the start of the data section.
        nbytes: size in bytes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """A parsed, memory-mapped GGUF file.

    Attributes:
        path: where it lies.
        metadata: key -> value; arrays are lists, undecodable text keeps its bytes as surrogates.
        tensors: name -> `TensorInfo`, in file order.
        kv_end, data_start: byte positions of the end of the key-value section and of the tensor data.
        value_at: key -> byte position of its value, so that one number can be patched in place.

    Raises:
        FormatError: the file is missing, truncated, damaged, or holds a type that is not supported.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            self._bytes = np.memmap(self.path, np.uint8, mode="c") if size else np.empty(0, np.uint8)
        except OSError as error:
            raise FormatError(f"cannot read {self.path}: {error.strerror or error}") from None
        cursor = _Cursor(self._bytes, self.path)
        magic = cursor.take(4, "magic")
        if magic != MAGIC:
            raise FormatError(f"{self.path} is not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
        self.version = cursor.scalar("<I", "version")
        if self.version not in VERSIONS:
            raise FormatError(f"{self.path}: GGUF version {self.version} is not supported (versions 2 and 3 are)")
        n_tensors = cursor.count("tensor count", least=24)  # name length, dimensions, type, offset
        n_kv = cursor.count("key-value count", least=12)  # key length, type
        self.kv_start = cursor.at
        self.metadata: dict[str, Any] = {}
        self.value_at: dict[str, int] = {}
        for i in range(n_kv):
            self._read_pair(cursor, i)
        self.kv_end = cursor.at
        self.alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(self.alignment, int) or self.alignment < 1 or self.alignment % 8:
            raise FormatError(f"{self.path}: general.alignment is {self.alignment!r}, not a multiple of 8")
        table = [_read_tensor(cursor, i) for i in range(n_tensors)]
        self.data_start = -(-cursor.at // self.alignment) * self.alignment
        self.tensors = {info.name: info for info in table}
        self._check_table(table)

    def _read_pair(self, cursor: _Cursor, index: int) -> None:
        key = cursor.string(f"key {index}")
        kind = cursor.scalar("<I", f"type of {key!r}")
        if key in self.metadata:
            raise FormatError(f"{self.path}: the key {key!r} appears twice")
        self.value_at[key] = cursor.at
        self.metadata[key] = cursor.value(kind, key)

    def _check_table(self, table: list[TensorInfo]) -> None:
        size = len(self._bytes)
        faults = []
        if len(self.tensors) != len(table):
            names = [info.name for info in table]
            faults.append(f"tensors named twice: {', '.join(sorted({repr(n) for n in names if names.count(n) > 1}))}")
        end = 0
        for info in sorted(table, key=lambda info: info.offset):
            if info.offset % self.alignment:
                faults.append(f"{info.name!r}: offset {info.offset} is not a multiple of {self.alignment}")
            if info.offset < end:
                faults.append(f"{info.name!r}: begins inside another tensor (offset {info.offset}, free from {end})")
            end = info.offset + info.nbytes
            if self.data_start + end > size:
                faults.append(f"{info.name!r}: needs bytes up to {self.data_start + end}, the file has {size}")
        if faults:
            more = f"\n  and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise FormatError(f"{self.path} is damaged or truncated:\n  " + "\n  ".join(faults[:5]) + more)

    @property
    def architecture(self) -> str:
        """`general.architecture`."""
        return self.metadata.get("general.architecture", "")

    def section(self, start: int, end: int) -> np.ndarray:
        """Raw bytes [start, end) of the file."""
        return self._bytes[start:end]

    def raw(self, name: str) -> np.ndarray:
        """The bytes of one tensor, uint8 [nbytes], a view of the mapped file (writing to it changes no file)."""
        info = self.tensors[name]
        start = self.data_start + info.offset
        return self._bytes[start : start + info.nbytes]

    def blocks(self, name: str) -> np.ndarray:
        """A quantized matrix as uint8 [out, groups, block_bytes]."""
        info = self.tensors[name]
        return self.raw(name).reshape(info.shape[0], -1, CODECS[info.type].block_bytes)

    def weights_hash(self) -> str:
        """sha256 over names, types, shapes and bytes of all tensors: the identity of the base weights."""
        digest = hashlib.sha256()
        for info in sorted(self.tensors.values(), key=lambda info: info.name):
            digest.update(f"{info.name} {info.type} {info.shape}\n".encode("utf-8", "surrogateescape"))
            digest.update(self.raw(info.name).data)
        return digest.hexdigest()


class _Cursor:
    """Reads little-endian fields and refuses to run past the end of the file."""

    def __init__(self, data: np.ndarray, path: Path):
        self.data, self.path, self.at = data.data, path, 0

    def take(self, n: int, what: str) -> bytes:
        if n > len(self.data) - self.at:
            raise FormatError(
                f"{self.path} is damaged or truncated: {what} at byte {self.at} needs {n} bytes, "
                f"{len(self.data) - self.at} are left"
            )
        self.at += n
        return bytes(self.data[self.at - n : self.at])

    def scalar(self, fmt: str, what: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt), what))[0]

    def count(self, what: str, least: int) -> int:
        """A number of items of which each takes `least` bytes or more."""
        n = self.scalar("<Q", what)
        if n * least > len(self.data) - self.at:
            raise FormatError(f"{self.path} is damaged or truncated: {what} is {n}, more than the file can hold")
        return n

    def string(self, what: str) -> str:
        return self.take(self.count(f"length of {what}", least=1), what).decode("utf-8", "surrogateescape")

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind], f"value of {key!r}")
        if kind == _STRING:
            return self.string(f"value of {key!r}")
        if kind == _ARRAY:
            return self._array(key, depth)
        raise FormatError(f"{self.path}: {key!r} has the unknown value type {kind} at byte {self.at - 4}")

    def _array(self, key: str, depth: int) -> list[Any]:
        kind = self.scalar("<I", f"element type of {key!r}")
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise FormatError(f"{self.path}: {key!r} has the unknown element type {kind} at byte {self.at - 4}")
        if depth == _MAX_NESTING:
            raise FormatError(f"{self.path}: {key!r} nests arrays more than {_MAX_NESTING} deep")
        if kind in _SCALARS:
            width = struct.calcsize(_SCALARS[kind])
            n = self.count(f"length of {key!r}", least=width)
            values = np.frombuffer(self.take(n * width, f"values of {key!r}"), np.dtype(_SCALARS[kind]))
            return values.tolist()
        n = self.count(f"length of {key!r}", least=8)
        return [self.value(kind, key, depth + 1) for _ in range(n)]


def _read_tensor(cursor: _Cursor, index: int) -> TensorInfo:
    name = cursor.string(f"name of tensor {index}")
    n_dims = cursor.scalar("<I", f"dimension count of {name!r}")
    if not 1 <= n_dims <= _MAX_DIMENSIONS:
        raise FormatError(
            f"{cursor.path}: tensor {name!r} has {n_dims} dimensions (1 to {_MAX_DIMENSIONS} are possible)"
        )
    dims = [cursor.scalar("<Q", f"dimension {i} of {name!r}") for i in range(n_dims)]
    number, offset = cursor.scalar("<I", f"type of {name!r}"), cursor.scalar("<Q", f"offset of {name!r}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise FormatError(f"{cursor.path}: tensor {name!r} has the unknown type number {number}") from None
    if kind.name not in SUPPORTED:
        raise FormatError(
            f"{cursor.path}: tensor {name!r} is stored as {kind.name}, which is not supported yet; "
            f"supported types: {', '.join(SUPPORTED)}"
        )
    group, block_bytes = GGML_QUANT_SIZES[kind]
    elements = 1
    for d in dims:
        elements *= d
    if dims[0] % group or not elements:
        raise FormatError(f"{cursor.path}: tensor {name!r} of type {kind.name} has the impossible shape {dims[::-1]}")
    return TensorInfo(name, tuple(reversed(dims)), kind.name, offset, elements // group * block_bytes)
