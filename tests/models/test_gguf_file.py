"""Reading GGUF: equal to gguf-py's reader on sound files, a `FormatError` and nothing else on damaged ones."""

from __future__ import annotations

import contextlib
import signal
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import numpy as np
import pytest

from lorafold.errors import FormatError, LoraFoldError
from lorafold.models.gguf_file import SUPPORTED, GGUFFile
from lorafold.models.load import load
from tests.ggml_quantizer import GGML_ONLY
from tests.tiny import ARCHITECTURES, TYPES, VOCABULARY, Metadata, Tensors, tiny_gguf, tiny_ids

# A file small enough to damage at every byte, put together field by field.

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10
TYPE_F32, TYPE_Q4_1, TYPE_Q8_0, TYPE_IQ4_XS = 0, 3, 8, 23


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def row(name: str, dims: list[int], kind: int = TYPE_F32, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


PAIRS = [
    pair("general.architecture", STRING, text("llama")),
    pair("u32", U32, struct.pack("<I", 7)),
    pair("i32", I32, struct.pack("<i", -7)),
    pair("f32", F32, struct.pack("<f", 0.5)),
    pair("bool", BOOL, b"\x01"),
    pair("numbers", ARRAY, struct.pack("<IQ3i", I32, 3, 1, -2, 3)),
    pair("texts", ARRAY, struct.pack("<IQ", STRING, 2) + text("a") + text(b"\xff")),
    pair("nested", ARRAY, struct.pack("<IQ", ARRAY, 2) + struct.pack("<IQB", 0, 1, 9) + struct.pack("<IQ", 0, 0)),
    pair("nothing", ARRAY, struct.pack("<IQ", U32, 0)),
]
ROWS = [row("a", [4, 2], TYPE_F32, 0), row("b", [64, 3], TYPE_Q4_1, 32), row("c", [5], TYPE_F32, 160)]
DATA = bytes(range(180))  # 32 bytes of a, 120 of b and 8 of padding, 20 of c


def build(
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
    pairs: list[bytes] = PAIRS,
    rows: list[bytes] = ROWS,
    data: bytes = DATA,
    alignment: int = 32,
) -> bytes:
    counts = (len(rows) if tensors is None else tensors, len(pairs) if keys is None else keys)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(rows)
    return header + bytes(-len(header) % alignment) + data


def refused(folder: Path, content: bytes) -> str:
    """The message with which a file of this content is refused."""
    path = folder / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        GGUFFile(path)
    assert "damaged.gguf" in str(caught.value)
    return str(caught.value)


@contextlib.contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Fail rather than hang: a damaged number must not become a loop of its size."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        pytest.fail(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again and again: raised in a destructor, it would be lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# sound files


def test_the_small_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build())
    file = GGUFFile(path)
    assert file.metadata == {
        "general.architecture": "llama",
        "u32": 7,
        "i32": -7,
        "f32": 0.5,
        "bool": True,
        "numbers": [1, -2, 3],
        "texts": ["a", "\udcff"],
        "nested": [[9], []],
        "nothing": [],
    }
    assert [(t.name, t.shape, t.type, t.offset, t.nbytes) for t in file.tensors.values()] == [
        ("a", (2, 4), "F32", 0, 32),
        ("b", (3, 64), "Q4_1", 32, 120),
        ("c", (5,), "F32", 160, 20),
    ]
    assert bytes(file.raw("b")) == DATA[32:152]
    assert file.blocks("b").shape == (3, 2, 20)
    content = path.read_bytes()
    assert bytes(file.section(file.kv_start, file.kv_end)) == b"".join(PAIRS)
    for key, kind in (("u32", "<I"), ("i32", "<i"), ("f32", "<f")):
        assert struct.unpack_from(kind, content, file.value_at[key])[0] == file.metadata[key]


def test_writing_to_the_mapped_bytes_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build())
    GGUFFile(path).raw("a")[:] = 255
    assert path.read_bytes() == build()


@pytest.mark.parametrize("version", [2, 3])
def test_versions(tmp_path: Path, version: int) -> None:
    path = tmp_path / "small.gguf"
    path.write_bytes(build(version=version))
    assert GGUFFile(path).version == version


def test_alignment_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    pairs = [*PAIRS, pair("general.alignment", U32, struct.pack("<I", 64))]
    path.write_bytes(build(pairs=pairs, rows=[row("a", [4]), row("c", [5], offset=64)], alignment=64))
    file = GGUFFile(path)
    assert file.data_start % 64 == 0
    assert bytes(file.raw("c")) == DATA[64:84]


@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_equals_ggufs_own_reader(tiny_file: Callable[..., Path], architecture: str, types: str) -> None:
    path = tiny_file(architecture, types)
    file, reader = GGUFFile(path), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert file.metadata == theirs
    assert list(file.tensors) == [t.name for t in reader.tensors]
    assert file.data_start == reader.data_offset
    for tensor in reader.tensors:
        info = file.tensors[tensor.name]
        assert (info.type, info.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        np.testing.assert_array_equal(file.raw(tensor.name), tensor.data.view(np.uint8).reshape(-1))


def test_every_supported_type_is_tested() -> None:
    assert sorted(SUPPORTED) == sorted([*TYPES, *GGML_ONLY])


# damaged headers


def test_truncated_anywhere(tmp_path: Path) -> None:
    for length in range(len(build())):
        refused(tmp_path, build()[:length])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (build(magic=b"GGML"), ["not a GGUF file", "GGML"]),
        (build(magic=b"FUGG"), ["not a GGUF file"]),
        (build(version=0), ["version 0"]),
        (build(version=1), ["version 1", "2 and 3"]),
        (build(version=4), ["version 4"]),
        (build(version=0x03000000), ["version 50331648"]),
        (build(tensors=2**63), ["tensor count", str(2**63)]),
        (build(tensors=2**64 - 1), ["tensor count"]),
        (build(tensors=4), []),
        (build(keys=2**64 - 1), ["key-value count"]),
        (build(keys=10), []),
        (build(keys=8), []),
        (build(pairs=[text(b"k" * 8)[:8] + b"\xff" * 8]), []),
        (build(pairs=[struct.pack("<Q", 2**64 - 1) + b"key"]), ["length of key 0"]),
        (build(pairs=[pair("k", 13, b"\0" * 8)]), ["unknown value type 13", "'k'"]),
        (build(pairs=[pair("k", 2**32 - 1, b"\0" * 8)]), ["unknown value type"]),
        (build(pairs=[pair("k", STRING, struct.pack("<Q", 2**60))]), ["'k'"]),
        (build(pairs=[pair("k", ARRAY, struct.pack("<IQ", U32, 2**61))]), ["'k'"]),
        (build(pairs=[pair("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]), ["'k'"]),
        (build(pairs=[pair("k", ARRAY, struct.pack("<IQ", 99, 1) + b"\0" * 8)]), ["99", "'k'"]),
        (build(pairs=[pair("k", ARRAY, struct.pack("<IQ", 99, 0))]), ["99", "'k'"]),
        (build(pairs=[PAIRS[1], PAIRS[1]]), ["'u32'", "twice"]),
        (build(pairs=[pair("general.alignment", U32, struct.pack("<I", 0))]), ["general.alignment", "0"]),
        (build(pairs=[pair("general.alignment", U32, struct.pack("<I", 12))]), ["general.alignment", "12"]),
        (build(pairs=[pair("general.alignment", I32, struct.pack("<i", -32))]), ["general.alignment", "-32"]),
        (build(pairs=[pair("general.alignment", U32, struct.pack("<I", 2**31))]), []),
        (build(pairs=[pair("general.alignment", F32, struct.pack("<f", 32.0))]), ["general.alignment"]),
        (build(pairs=[pair("general.alignment", STRING, text("32"))]), ["general.alignment"]),
        (build(pairs=[pair("general.alignment", BOOL, b"\x01")]), ["general.alignment"]),
        (build(rows=[struct.pack("<Q", 2**64 - 1) + b"name" + bytes(24)]), ["tensor 0"]),
        (build(rows=[row("t", [])]), ["'t'", "0 dimensions"]),
        (build(rows=[row("t", [1, 1, 1, 1, 1])]), ["'t'", "5 dimensions"]),
        (build(rows=[text("t") + struct.pack("<I", 2**32 - 1) + bytes(40)]), ["dimensions"]),
        (build(rows=[row("t", [0])]), ["'t'", "[0]"]),
        (build(rows=[row("t", [4, 0])]), ["'t'"]),
        (build(rows=[row("t", [2**63, 2**63, 2**63, 2**63])]), ["t"]),
        (build(rows=[row("t", [2**62, 4])]), ["t"]),
        (build(rows=[row("t", [33, 2], TYPE_Q4_1)]), ["'t'", "Q4_1", "[2, 33]"]),
        (build(rows=[row("t", [2, 32], TYPE_Q8_0)]), ["'t'", "Q8_0"]),
        (build(rows=[row("t", [4], 250)]), ["'t'", "250"]),
        (build(rows=[row("t", [4], 4)]), ["'t'", "4"]),  # Q4_2, removed from ggml
        (build(rows=[row("blk.0.x", [256], TYPE_IQ4_XS)]), ["'blk.0.x'", "IQ4_XS", *SUPPORTED]),
        (build(rows=[row("t", [4], 24)]), ["'t'", "I8"]),
        (build(rows=[row("t", [4], offset=8)]), ["t", "8", "32"]),
        (build(rows=[row("t", [4], offset=2**64 - 32)]), ["t"]),
        (build(rows=[row("t", [4], offset=192)]), ["t", "damaged or truncated"]),
        (build(rows=[row("t", [46])]), ["t", "damaged or truncated"]),
        (build(rows=[row("s", [4]), row("t", [4])]), ["inside another tensor"]),
        (build(rows=[row("s", [16]), row("t", [4], offset=32)]), ["t", "inside another tensor"]),
        (build(rows=[row("t", [4], offset=32), row("s", [16])]), ["t", "inside another tensor"]),
        (build(rows=[row("s", [40]), row("t", [4], offset=32), row("u", [4], offset=64)]), ["t", "u"]),
        (build(rows=[row("t", [4]), row("t", [4], offset=32)]), ["twice", "t"]),
        (build(data=b""), ["damaged or truncated"]),
        (build(data=DATA[:-1]), ["c", "damaged or truncated"]),
        (b"", ["magic"]),
        (b"\0" * 1000, ["not a GGUF file"]),
        (b"{}" * 100, ["not a GGUF file"]),
    ],
)
def test_damaged_fields(tmp_path: Path, content: bytes, words: list[str]) -> None:
    message = refused(tmp_path, content)
    for word in words:
        assert word in message


def test_all_faults_of_the_table_are_in_one_message(tmp_path: Path) -> None:
    message = refused(tmp_path, build(rows=[row(f"t{i}", [4], offset=8 + 1000 * i) for i in range(9)]))
    assert "t0" in message
    assert "t1" in message
    assert "more" in message


@pytest.mark.parametrize("depth", [10, 900, 20_000])
def test_arrays_nested_without_end(tmp_path: Path, depth: int) -> None:
    """Each level costs twelve bytes of file and must not cost a level of the interpreter's stack."""
    content = build(pairs=[pair("k", ARRAY, struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQ", U32, 2**60))])
    refused(tmp_path, content)


def test_missing_path_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path, tmp_path / "a" / "b.gguf"):
        with pytest.raises(FormatError, match="cannot read"):
            GGUFFile(path)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    """Undecodable bytes keep their value, and can be hashed and shown."""
    path = tmp_path / "small.gguf"
    path.write_bytes(build(rows=[row("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), [4])]))
    GGUFFile(path).weights_hash()
    path.write_bytes(build(rows=[text(b"\xff") + struct.pack("<IQIQ", 1, 4, TYPE_F32, 0)]))
    GGUFFile(path).weights_hash()
    refused(tmp_path, build(rows=[text(b"\xff") + struct.pack("<IQIQ", 1, 4, TYPE_F32, 8)])).encode()


def test_a_byte_flipped_anywhere_in_the_small_header(tmp_path: Path) -> None:
    path, sound = tmp_path / "flipped.gguf", build()
    generator = np.random.default_rng(0)
    end = len(sound) - len(DATA)
    for at in range(end):
        damaged = bytearray(sound)
        damaged[at] ^= int(generator.integers(1, 256))
        path.write_bytes(damaged)
        with contextlib.suppress(FormatError), deadline(5):
            GGUFFile(path).weights_hash()


# whole models


def refused_model(folder: Path, edit: Callable[[Metadata, Tensors], object], **options: Any) -> str:
    """The message with which `load` refuses a tiny model after `edit`."""
    path = tiny_gguf(folder, edit=edit, **options)
    with deadline(5), pytest.raises(FormatError) as caught:
        load(path)
    return str(caught.value)


def set_key(key: str, value: object) -> Callable[[Metadata, Tensors], object]:
    return lambda metadata, _: metadata.update({key: value})


def drop_keys(*keys: str) -> Callable[[Metadata, Tensors], object]:
    return lambda metadata, _: [metadata.pop(key) for key in keys]


def names(architecture: str) -> list[str]:
    """The tensors of the first layer and those outside the layers."""
    found: list[str] = []

    def look(_: Metadata, tensors: Tensors) -> None:
        found.extend(name for name in tensors if "blk." not in name or "blk.0." in name)

    with tempfile.TemporaryDirectory() as folder:
        tiny_gguf(Path(folder), architecture, "Q4_1", tied=False, edit=look)
    return found


EVERY_TENSOR = [(architecture, name) for architecture in ARCHITECTURES for name in names(architecture)]
OPTIONAL = ("output.weight", "rope_freqs.weight")  # without them the file describes another, sound model


@pytest.mark.parametrize(("architecture", "name"), [pair for pair in EVERY_TENSOR if pair[1] not in OPTIONAL])
def test_any_missing_tensor(tmp_path: Path, architecture: str, name: str) -> None:
    edit = lambda _, tensors: tensors.pop(name)  # noqa: E731
    message = refused_model(tmp_path, edit, architecture=architecture, types="Q4_1", tied=False)
    assert "missing" in message


@pytest.mark.parametrize("types", ["F32", "Q4_1"])
@pytest.mark.parametrize(("architecture", "name"), [pair for pair in EVERY_TENSOR if pair[1] != "token_embd.weight"])
def test_any_tensor_of_another_shape(tmp_path: Path, architecture: str, name: str, types: str) -> None:
    def halve(_: Metadata, tensors: Tensors) -> None:
        data, kind = tensors[name]
        tensors[name] = (np.ascontiguousarray(data[: len(data) // 2]), kind)

    assert name in refused_model(tmp_path, halve, architecture=architecture, types=types, tied=False)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
@pytest.mark.parametrize(
    ("architecture", "name"), [pair for pair in EVERY_TENSOR if "norm" in pair[1] or "bias" in pair[1]]
)
def test_any_vector_stored_in_blocks(tmp_path: Path, architecture: str, name: str, kind: str) -> None:
    def pack(_: Metadata, tensors: Tensors) -> None:
        packed = gguf.quants.quantize(tensors[name][0], gguf.GGMLQuantizationType[kind])
        tensors[name] = (packed, kind)

    message = refused_model(tmp_path, pack, architecture=architecture)
    assert name in message
    assert kind in message


@pytest.mark.parametrize("extra", ["blk.0.unheard_of.weight", "blk.0.attn_q.weird", "nonsense", "rope_freqs.weight"])
def test_a_tensor_that_has_no_place(tmp_path: Path, extra: str) -> None:
    edit = lambda _, tensors: tensors.update({extra: (np.zeros((64, 64), np.float32), "F32")})  # noqa: E731
    assert extra in refused_model(tmp_path, edit, architecture="qwen2")


def test_a_layer_too_many(tmp_path: Path) -> None:
    edit = lambda _, tensors: tensors.update({"blk.3.attn_q.weight": (np.zeros((64, 64), np.float32), "F32")})  # noqa: E731
    message = refused_model(tmp_path, edit)
    assert "blk.3.attn_q.weight" in message or "block_count" in message


def test_faults_of_several_tensors_are_in_one_message(tmp_path: Path) -> None:
    def edit(_: Metadata, tensors: Tensors) -> None:
        del tensors["blk.1.attn_v.weight"]
        tensors["extra.weight"] = (np.zeros(4, np.float32), "F32")
        tensors["blk.2.ffn_norm.weight"] = (np.zeros(32, np.float32), "F32")

    message = refused_model(tmp_path, edit)
    for word in ("model.layers.1.self_attn.v_proj", "extra.weight", "blk.2.ffn_norm.weight", "[32]", "[64]"):
        assert word in message


def test_unsupported_architecture_names_the_supported_ones(tmp_path: Path) -> None:
    message = refused_model(tmp_path, set_key("general.architecture", "mamba"))
    for word in ("mamba", "llama", "qwen2", "qwen3", "gemma3"):
        assert word in message


@pytest.mark.parametrize("value", [7, True, ["llama"], 1.5])
def test_an_architecture_that_is_not_text(tmp_path: Path, tiny_file: Callable[..., Path], value: object) -> None:
    """Made of a sound file by turning the key's value into another type; gguf's writer insists on text."""
    sound = tiny_file().read_bytes()
    kinds = {7: (U32, struct.pack("<I", 7)), True: (BOOL, b"\x01"), 1.5: (F32, struct.pack("<f", 1.5))}
    kind, raw = (ARRAY, struct.pack("<IQ", STRING, 1) + text("llama")) if isinstance(value, list) else kinds[value]
    old = pair("general.architecture", STRING, text("llama"))
    assert sound.count(old) == 1
    file = GGUFFile(tiny_file())
    header = sound[: file.data_start].replace(old, pair("general.architecture", kind, raw)).rstrip(b"\0")
    header += bytes(8)  # of the last row's offset, which ends in zeros; the data behind it are not reached
    path = tmp_path / "other.gguf"
    path.write_bytes(header + bytes(-len(header) % 32) + sound[file.data_start :] + bytes(64))
    with pytest.raises(FormatError):
        load(path)


REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key(tmp_path: Path, key: str) -> None:
    assert f"llama.{key} is missing" in refused_model(tmp_path, drop_keys(f"llama.{key}"))


def test_all_missing_keys_are_named_at_once(tmp_path: Path) -> None:
    message = refused_model(tmp_path, drop_keys(*(f"llama.{key}" for key in REQUIRED)))
    for key in REQUIRED:
        assert f"llama.{key} is missing" in message


def test_the_general_architecture_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "none.gguf"
    path.write_bytes(build(pairs=PAIRS[1:]))
    with pytest.raises(FormatError, match=r"architecture"):
        load(path)


@pytest.mark.parametrize("value", [0, -1, 1.5, "4", True, [4, 4, 4], 2**32 - 1])
@pytest.mark.parametrize("key", ["attention.head_count", "attention.head_count_kv", "block_count", "embedding_length"])
def test_impossible_counts(tmp_path: Path, key: str, value: object) -> None:
    message = refused_model(tmp_path, set_key(f"llama.{key}", value))
    assert key in message or value == 2**32 - 1  # a large count contradicts the tensors, in whatever words


@pytest.mark.parametrize("value", [0, -1, "x", 2**31 - 2])
@pytest.mark.parametrize("key", ["feed_forward_length", "rope.dimension_count"])
def test_impossible_lengths(tmp_path: Path, key: str, value: object) -> None:
    refused_model(tmp_path, set_key(f"llama.{key}", value))


@pytest.mark.parametrize("value", [0, -1, "x"])
def test_impossible_context_lengths(tmp_path: Path, value: object) -> None:
    assert "context_length" in refused_model(tmp_path, set_key("llama.context_length", value))


@pytest.mark.parametrize("value", [0.0, -1e-5, float("nan"), float("inf"), "x", 1])
@pytest.mark.parametrize("key", ["attention.layer_norm_rms_epsilon", "rope.freq_base"])
def test_impossible_numbers(tmp_path: Path, key: str, value: object) -> None:
    if value == 1:
        load(tiny_gguf(tmp_path, edit=set_key(f"llama.{key}", value)))
    else:
        assert key in refused_model(tmp_path, set_key(f"llama.{key}", value))


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 16, 64])
@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
def test_head_counts_that_do_not_fit_the_tensors(tmp_path: Path, heads: int, rope: bool) -> None:
    def edit(metadata: Metadata, _: Tensors) -> None:
        metadata["llama.attention.head_count"] = heads
        if not rope:  # the width of a head is then hidden size / heads
            del metadata["llama.rope.dimension_count"]

    refused_model(tmp_path, edit)


def test_heads_that_the_key_heads_do_not_divide(tmp_path: Path) -> None:
    """Every shape fits (3 key heads of width 16), but four query heads cannot share three."""

    def edit(metadata: Metadata, tensors: Tensors) -> None:
        metadata["llama.attention.head_count_kv"] = 3
        for i in range(3):
            for name in (f"blk.{i}.attn_k.weight", f"blk.{i}.attn_v.weight"):
                data, kind = tensors[name]
                tensors[name] = (np.concatenate([data, data[:16]]), kind)

    refused_model(tmp_path, edit)


def test_heads_of_odd_width(tmp_path: Path) -> None:
    """Width 1: rotation needs pairs."""

    def edit(metadata: Metadata, tensors: Tensors) -> None:
        metadata |= {"llama.attention.head_count": 64, "llama.attention.head_count_kv": 32}
        metadata["llama.rope.dimension_count"] = 1

    refused_model(tmp_path, edit)


@pytest.mark.parametrize("shape", [(1,), (4,), (16,), (8, 1)])
def test_rope_factors_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    edit = lambda _, tensors: tensors.update({"rope_freqs.weight": (np.ones(shape, np.float32), "F32")})  # noqa: E731
    assert "rope_freqs.weight" in refused_model(tmp_path, edit, architecture="llama3")


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_rope_factors_that_are_no_divisors(tmp_path: Path, value: float) -> None:
    factors = np.full(8, value, np.float32)
    edit = lambda _, tensors: tensors.update({"rope_freqs.weight": (factors, "F32")})  # noqa: E731
    assert "rope_freqs.weight" in refused_model(tmp_path, edit, architecture="llama3")


@pytest.mark.parametrize("kind", ["yarn", "longrope", 5])
def test_rope_scaling_that_is_not_supported(tmp_path: Path, kind: object) -> None:
    assert "rope scaling" in refused_model(tmp_path, set_key("llama.rope.scaling.type", kind))


@pytest.mark.parametrize("key", ["bos", "eos", "padding", "unknown"])
@pytest.mark.parametrize("value", [VOCABULARY, 2**32 - 1, -1, "</s>", 1.0])
def test_token_ids_out_of_range(tmp_path: Path, key: str, value: object) -> None:
    message = refused_model(tmp_path, set_key(f"tokenizer.ggml.{key}_token_id", value))
    assert f"tokenizer.ggml.{key}_token_id" in message
    assert repr(value) in message


@pytest.mark.parametrize("pre", ["unheard-of", "", 5, ["gpt-2"]])
def test_unknown_pre_tokenizers(tmp_path: Path, pre: object) -> None:
    message = refused_model(tmp_path, set_key("tokenizer.ggml.pre", pre))
    assert "pre-tokenizer" in message or "tokenizer.ggml.pre" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", "no such model"),
        ("model", 5),
        ("tokens", "text"),
        ("tokens", [1, 2, 3]),
        ("merges", ["Ġ unheard-of"]),
        ("merges", ["one"]),
        ("merges", ["a b c"]),
        ("merges", 5),
        ("merges", [5]),
        ("token_type", 5),
    ],
)
def test_damaged_vocabularies(tmp_path: Path, key: str, value: object) -> None:
    refused_model(tmp_path, set_key(f"tokenizer.ggml.{key}", value))


@pytest.mark.parametrize("key", ["model", "tokens", "merges"])
def test_missing_parts_of_the_vocabulary(tmp_path: Path, key: str) -> None:
    refused_model(tmp_path, drop_keys(f"tokenizer.ggml.{key}"))


@pytest.mark.parametrize("template", [5, ["x"]])
def test_chat_templates_that_are_not_text(tmp_path: Path, template: object) -> None:
    assert "chat_template" in refused_model(tmp_path, set_key("tokenizer.chat_template", template))


def test_vocabulary_larger_than_the_embedding(tmp_path: Path) -> None:
    """A token without a row would be read from nowhere."""

    def cut(_: Metadata, tensors: Tensors) -> None:
        data, kind = tensors["token_embd.weight"]
        tensors["token_embd.weight"] = (data[:-1], kind)

    message = refused_model(tmp_path, cut)
    assert "token_embd.weight" in message


def test_vocabulary_smaller_than_the_embedding(tmp_path: Path) -> None:
    """Embeddings are often padded to a round number of rows; that is sound."""

    def pad(metadata: Metadata, tensors: Tensors) -> None:
        data, kind = tensors["token_embd.weight"]
        tensors["token_embd.weight"] = (np.concatenate([data, data[:2]]), kind)

    assert load(tiny_gguf(tmp_path, edit=pad)).model.config.vocab_size == VOCABULARY + 2


def test_a_model_truncated_in_its_header(tmp_path: Path, tiny_file: Callable[..., Path]) -> None:
    """Every length around each boundary of the first and last hundred bytes, and one in 37 between."""
    sound = tiny_file().read_bytes()
    start = GGUFFile(tiny_file()).data_start
    path = tmp_path / "cut.gguf"
    for length in {*range(100), *range(100, start, 37), *range(start - 100, start + 1), len(sound) - 1}:
        path.write_bytes(sound[:length])
        with pytest.raises(FormatError):
            GGUFFile(path)


@pytest.mark.parametrize("architecture", ["llama3", "qwen2", "gemma3"])
def test_random_damage_to_a_models_header(tmp_path: Path, tiny_file: Callable[..., Path], architecture: str) -> None:
    """A model with a few bytes changed loads, or is refused in so many words; if it loads, it runs."""
    sound = np.frombuffer(tiny_file(architecture).read_bytes(), np.uint8)
    end = GGUFFile(tiny_file(architecture)).data_start
    generator = np.random.default_rng(17)
    # half of the damage to the first 1.5 kB, where the numbers are: most of the rest is vocabulary
    path, loaded, escaped = tmp_path / "damaged.gguf", 0, []
    for _ in range(100):
        damaged = sound.copy()
        at = generator.integers(0, end if generator.random() < 0.5 else 1500, generator.integers(1, 4))
        damaged[at] = generator.integers(0, 256, len(at))
        path.write_bytes(damaged.tobytes())
        try:
            with deadline(5):
                load(path).model(tiny_ids(4))
            loaded += 1
        except LoraFoldError:
            pass
        except (Exception, pytest.fail.Exception) as error:
            escaped.append(f"bytes {at.tolist()} set to {damaged[at].tolist()}: {type(error).__name__}: {error}")
    assert not escaped
    assert 0 < loaded < 100  # otherwise the damage was too little or too much to show anything
