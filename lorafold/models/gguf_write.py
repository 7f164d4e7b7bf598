"""Write a GGUF file that differs from its base only where it must.

When every replaced tensor keeps its type and none is new, the file is copied and the replaced bytes are overwritten:
all else is identical by construction. When a tensor changes its type (promotion, re-quantizing) or one is added (a
head that had the embedding's weights and has its own now), sizes change: the key-value section is copied as raw bytes
(only `general.file_type` is patched), a new tensor table is written, and the data follow in the old order, new ones
last.
"""

from __future__ import annotations

import shutil
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType, LlamaFileType

from lorafold.files import replacing
from lorafold.models.gguf_file import GGUFFile, TensorInfo
from lorafold.models.load import Binding
from lorafold.quant.weight import QuantizedWeight

_FILE_TYPE = "general.file_type"
_COUNT_AT = 8  # of the number of tensors, after magic and version


def file_order(weight: QuantizedWeight, binding: Binding) -> np.ndarray:
    """The blocks of a module's matrix in the row order of its file, uint8 [out, groups, block_bytes]."""
    blocks = weight.blocks.cpu()
    if binding.row_order is not None:
        blocks = blocks[binding.row_order.argsort()]
    return blocks.contiguous().numpy()


def write_gguf(
    base: GGUFFile,
    replaced: Mapping[str, tuple[str, np.ndarray]],
    path: Path,
    added: Mapping[str, tuple[str, np.ndarray, tuple[int, ...]]] | None = None,
) -> None:
    """Write `base` with some tensors replaced, or new.

    Args:
        replaced: tensor name -> (type name, bytes).
        added: the same of tensors that `base` lacks, with their shapes.
        path: written under a temporary name and renamed; an existing file is replaced.

    Raises:
        OutputError: the file cannot be written; nothing is left behind.
    """
    with replacing(path) as temporary:
        if not added and all(base.tensors[name].type == kind for name, (kind, _) in replaced.items()):
            _overwrite(base, replaced, temporary)
        else:
            _rewrite(base, replaced, added or {}, temporary)


def _overwrite(base: GGUFFile, replaced: Mapping[str, tuple[str, np.ndarray]], path: Path) -> None:
    shutil.copyfile(base.path, path)
    with path.open("r+b") as out:
        for name, (_, data) in replaced.items():
            out.seek(base.data_start + base.tensors[name].offset)
            out.write(data.reshape(-1).data)


def _rewrite(
    base: GGUFFile,
    replaced: Mapping[str, tuple[str, np.ndarray]],
    added: Mapping[str, tuple[str, np.ndarray, tuple[int, ...]]],
    path: Path,
) -> None:
    table, at = [], 0
    for info in sorted(base.tensors.values(), key=lambda info: info.offset):
        kind, nbytes = info.type, info.nbytes
        if info.name in replaced:
            kind, nbytes = replaced[info.name][0], replaced[info.name][1].size
        table.append(TensorInfo(info.name, info.shape, kind, at, nbytes))
        at = _padded(at + nbytes, base.alignment)
    for name, (kind, data, shape) in added.items():
        table.append(TensorInfo(name, shape, kind, at, data.size))
        at = _padded(at + data.size, base.alignment)
    given = {name: data for name, (_, data, *_) in [*replaced.items(), *added.items()]}
    new = {info.name: info for info in table}
    with path.open("wb") as out:
        head = bytearray(base.section(0, base.kv_start).tobytes())
        struct.pack_into("<Q", head, _COUNT_AT, len(table))
        out.write(head)
        changed = any(base.tensors[name].type != kind for name, (kind, _) in replaced.items())
        out.write(_patched_metadata(base, new) if changed else base.section(base.kv_start, base.kv_end).data)
        for name in (*base.tensors, *added):
            out.write(_table_row(new[name]))
        _pad(out, base.alignment)
        for info in table:
            data = given[info.name].reshape(-1) if info.name in given else base.raw(info.name)
            out.write(data.data)
            _pad(out, base.alignment)


def _patched_metadata(base: GGUFFile, tensors: Mapping[str, TensorInfo]) -> bytes:
    """The key-value section; `general.file_type` names the type that most matrices now have."""
    section = bytearray(base.section(base.kv_start, base.kv_end).tobytes())
    counts = Counter(info.type for info in tensors.values() if len(info.shape) > 1)
    guess = LlamaFileType.__members__.get(f"MOSTLY_{counts.most_common(1)[0][0]}")
    if _FILE_TYPE in base.value_at and guess is not None:
        struct.pack_into("<I", section, base.value_at[_FILE_TYPE] - base.kv_start, int(guess))
    return bytes(section)


def _table_row(info: TensorInfo) -> bytes:
    name = info.name.encode("utf-8", "surrogateescape")
    dims = tuple(reversed(info.shape))
    head = struct.pack(f"<Q{len(name)}sI{len(dims)}Q", len(name), name, len(dims), *dims)
    return head + struct.pack("<IQ", int(GGMLQuantizationType[info.type]), info.offset)


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(b"\0" * (_padded(out.tell(), alignment) - out.tell()))
