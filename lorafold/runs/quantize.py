"""Quantize a model block by block, so that it can be trained with QA-LoRA and folded; begin again where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import lorafold
from lorafold.adapters.targets import HEADS, linear_layers
from lorafold.config import QuantizeConfig
from lorafold.data.packs import micro_batches, pack
from lorafold.data.tokens import Tokens
from lorafold.errors import FormatError, bullet_list
from lorafold.files import OutputError, replacing, size_on_disk, write_text
from lorafold.models.architectures import ROPE_FACTORS
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.gguf_write import file_order, write_gguf
from lorafold.models.load import MODEL_TYPES, LoadedModel, compute_dtype
from lorafold.models.mlx_folder import create_mlx
from lorafold.models.tensors import save_tensors
from lorafold.quant.calibrate import Method, quantize
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.mlx import GROUPS, mlx_codec
from lorafold.quant.weight import QuantizedWeight, encode
from lorafold.runs.blocks import BlockWalk, find_blocks

_GGUF_TYPES = {4: "Q4_1", 5: "Q5_1", 8: "Q8_0"}
_STORED = {"float16": "F16", "bfloat16": "BF16"}
_PACK_TOKENS = 1024
_STATE = "quantize.json"


@dataclass(frozen=True)
class QuantizeReport:
    """What was written.

    Attributes:
        method: how codes were chosen.
        codec: format of the blocks' matrices.
        weights: number of weights in quantized matrices.
        bits_per_weight: of these matrices, parameters included.
        outer: whether embedding and head are among them.
        error: root of the mean squared change of their weights, relative to the weights' own.
        size: bytes on disk.
    """

    method: str
    codec: str
    weights: int
    bits_per_weight: float
    outer: bool
    error: float
    size: int

    def describe(self) -> str:
        """One sentence."""
        embedding = "included" if self.outer else "left as it is"
        return (
            f"{self.weights:,} weights in {self.codec} by {self.method}, {self.bits_per_weight:.2f} bits each "
            f"(embedding {embedding}), changed by {self.error:.2%} of their size; {self.size:,} bytes"
        )


def choose_codecs(config: QuantizeConfig, gguf: bool) -> tuple[str, str | None]:
    """The formats of the blocks' matrices and of the embedding (None: as it is).

    Raises:
        FormatError: a GGUF file has no such format.
    """
    wide = config.embedding_bits
    if not gguf:
        kind = _STORED[config.stored or "float16"]
        return mlx_codec(config.bits, config.group_size, kind), None if wide == 16 else mlx_codec(
            wide, config.group_size, kind
        )
    faults = []
    if config.bits not in (4, 5):
        faults.append(f"bits is {config.bits}; a GGUF file holds 4 (Q4_1) or 5 (Q5_1) with scale and offset")
    if config.group_size != 32:
        faults.append(f"group_size is {config.group_size}; a GGUF file has groups of 32")
    if wide not in (*_GGUF_TYPES, 16):
        faults.append(f"embedding_bits is {wide}; a GGUF file takes 4, 5, 8 or 16 here")
    if faults:
        raise FormatError(
            "this cannot be written as a GGUF file:\n" + bullet_list(faults) + "\nname a folder instead of a .gguf "
            "file to write an MLX folder, which holds 2 to 8 bits in groups of 32, 64 or 128"
        )
    return _GGUF_TYPES[config.bits], _GGUF_TYPES.get(wide)


def quantize_model(
    loaded: LoadedModel,
    rows: list[Tokens] | None,
    config: QuantizeConfig,
    output: Path,
    progress: Callable[[int], None],
) -> QuantizeReport:
    """Quantize all linear layers and the embedding of a model and write it.

    What is done is kept in a folder beside the output, `<output>.partial`, until the output stands whole; the same call
    after an interruption goes on from there.

    Args:
        rows: calibration rows, or None.
        output: a `.gguf` file (for a model that came from one) or a new MLX folder.
        progress: called with 1 after each block.

    Raises:
        FormatError: the model cannot be quantized so; all reasons are named.
        OutputError: the output cannot be written; nothing is left but the finished blocks.
    """
    gguf = output.suffix == ".gguf"
    if output.resolve() == loaded.path.resolve():
        raise FormatError(f"{output} is the model itself; choose another output")
    _refuse_architecture(loaded, gguf, config)
    if config.format != "affine":
        return _quantize_bnb(loaded, config, output, progress)
    if gguf and loaded.gguf is None:
        raise FormatError(
            f"{output} would be a GGUF file, whose metadata come from the model's own, and {loaded.path} is none; "
            "give a 16-bit GGUF file as the model, or name a folder to write an MLX folder"
        )
    codec, wide = choose_codecs(config, gguf)
    method: Method = config.method or ("gptq" if rows else "search")
    if method == "gptq" and not rows:
        raise FormatError("gptq measures the layers' inputs on rows; give some with --data, or choose --method search")
    _refuse_shapes(loaded.model, CODECS[codec].group_size, GROUPS, wide is not None)
    stored = config.stored or "float16"
    work = _Work(output, loaded, rows, {**asdict(config), "method": method, "codec": codec})
    errors = _Errors()
    quantized: dict[str, QuantizedWeight] = {}
    walk = BlockWalk(loaded, [pack(group) for group in micro_batches(rows, _PACK_TOKENS)]) if rows else None
    for index, (prefix, block) in enumerate(find_blocks(loaded.model)):
        layers = {f"{prefix}.{name}": layer for name, layer in linear_layers(block).items()}
        done = work.read(index, layers, codec)
        if done is None:
            hessians = walk.hessians(index) if walk else {}
            done = {n: _quantized(n, _dense(layer), codec, method, hessians.get(n)) for n, layer in layers.items()}
            work.write(index, done)
        for name, weight in done.items():
            errors.add(_dense(layers[name]), weight)
            loaded.model.set_submodule(name, QuantLinear(weight, _bias(layers[name])))
        quantized |= done
        if walk:
            walk.advance(index)
        progress(1)
    for name, layer in _outer_layers(loaded.model):
        if wide is not None:
            quantized[name] = _quantized(name, _dense(layer), wide, "rtn" if method == "rtn" else "search")
            errors.add(_dense(layer), quantized[name])
        elif not gguf:
            _unpack(layer)
    if gguf:
        assert loaded.gguf is not None
        replaced = {n: (w.codec, file_order(w, loaded.bindings[n])) for n, w in quantized.items()}
        write_gguf(loaded.gguf, {loaded.bindings[n].tensor: entry for n, entry in replaced.items()}, output)
    else:
        default = next(weight for weight in quantized.values() if weight.codec == codec)
        create_mlx(output, loaded.model, loaded.tokenizer, quantized, default, getattr(torch, stored))
    work.remove()
    bits = 8 * sum(weight.nbytes for weight in quantized.values())
    return QuantizeReport(
        method, codec, errors.count, bits / errors.count, wide is not None, errors.relative, size_on_disk(output)
    )


def _refuse_architecture(loaded: LoadedModel, gguf: bool, config: QuantizeConfig) -> None:
    """Refuse what the new folder would not describe, or what would not be read from it again."""
    kind = loaded.model.config.model_type
    if not gguf and loaded.gguf is not None and ROPE_FACTORS in loaded.gguf.tensors:
        raise FormatError(
            f"{loaded.path} keeps its rope factors as a tensor ({ROPE_FACTORS}), which a config.json cannot hold; "
            "quantize the model's transformers folder, or write a .gguf file"
        )
    if not gguf and config.format == "affine" and kind not in MODEL_TYPES:
        raise FormatError(
            f"the architecture {kind} is not read from MLX folders yet; {', '.join(sorted(MODEL_TYPES))} are"
        )


def _quantized(name: str, dense: Tensor, codec: str, method: Method, hessian: Tensor | None = None) -> QuantizedWeight:
    try:
        return quantize(dense, codec, method, hessian) if CODECS[codec].affine else encode(dense, codec)
    except ValueError as error:
        raise FormatError(f"{name} cannot be quantized: {error}") from None


def _quantize_bnb(
    loaded: LoadedModel, config: QuantizeConfig, output: Path, progress: Callable[[int], None]
) -> QuantizeReport:
    """All linear layers but the head, as bitsandbytes does; nothing else is quantized."""
    if output.suffix == ".gguf":
        raise FormatError(f"{output}: {config.format} is a format of transformers folders; name a folder")
    codec = "INT8" if config.format == "int8" else "NF4-DQ" if config.use_double_quant else "NF4"
    _refuse_shapes(loaded.model, CODECS[codec].group_size, (), False)
    errors, quantized = _Errors(), {}
    for prefix, block in find_blocks(loaded.model):
        for name, layer in linear_layers(block).items():
            quantized[f"{prefix}.{name}"] = _quantized(f"{prefix}.{name}", _dense(layer), codec, "rtn")
            errors.add(_dense(layer), quantized[f"{prefix}.{name}"])
        progress(1)
    for _, layer in _outer_layers(loaded.model):
        _unpack(layer)
    stored = getattr(torch, config.stored) if config.stored else _own_dtype(loaded)
    create_bnb(output, loaded.model, loaded.tokenizer, quantized, stored)
    bits = 8 * sum(weight.nbytes for weight in quantized.values()) / errors.count
    return QuantizeReport("nearest value", codec, errors.count, bits, False, errors.relative, size_on_disk(output))


def _own_dtype(loaded: LoadedModel) -> torch.dtype:
    """bfloat16 where the model's folder says so, otherwise float16."""
    try:
        config = json.loads((loaded.path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        return torch.float16
    return torch.bfloat16 if "bfloat16" in str(config.get("dtype", config.get("torch_dtype"))) else torch.float16


def _refuse_shapes(model: nn.Module, group: int, others: Sequence[int], embedding: bool) -> None:
    """Refuse a group size that does not divide all rows, naming those of `others` that do; 0 is a whole row."""
    if not group:
        return
    outer = {name: _width(layer) for name, layer in _outer_layers(model)} if embedding else {}
    inner = {name: layer.in_features for name, layer in linear_layers(model).items() if name not in HEADS}
    wrong = {name: width for name, width in (inner | outer).items() if width % group}
    if wrong:
        fitting = [size for size in others if not any(width % size for width in wrong.values())]
        examples = [f"{name}: rows of {width}" for name, width in list(wrong.items())[:3]]
        raise FormatError(
            f"{len(wrong)} matrices do not divide into groups of {group}:\n"
            + bullet_list(examples)
            + (f"\ngroups of {' or '.join(map(str, fitting))} fit" if fitting else "")
        )


def _outer_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of the embedding and, where it has weights of its own, the head."""
    blocks = tuple(prefix for prefix, _ in find_blocks(model))
    for name, module in model.named_modules():
        tied = name in HEADS and model.config.tie_word_embeddings  # type: ignore[union-attr]
        matrix = isinstance(module, nn.Linear | QuantLinear | nn.Embedding | QuantEmbedding)
        if matrix and not tied and not name.startswith(blocks):
            yield name, module


@torch.no_grad()
def _dense(layer: nn.Module) -> Tensor:
    return layer.packed.decode() if isinstance(layer, QuantLinear | QuantEmbedding) else layer.weight.float()  # type: ignore[operator, return-value, union-attr]


def _width(layer: nn.Module) -> int:
    shape: tuple[int, ...] = layer.shape if isinstance(layer, QuantEmbedding | QuantLinear) else layer.weight.shape  # type: ignore[assignment, union-attr]
    return shape[1]


def _unpack(layer: nn.Module) -> None:
    """Give a packed layer its plain numbers as a parameter, to be written as such."""
    if isinstance(layer, QuantEmbedding | QuantLinear):
        layer.weight = nn.Parameter(_dense(layer), requires_grad=False)


def _bias(layer: nn.Linear | QuantLinear) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach()


class _Errors:
    """Squared change of weights, summed over matrices."""

    def __init__(self) -> None:
        self.count, self._squares, self._change = 0, 0.0, 0.0

    def add(self, dense: Tensor, weight: QuantizedWeight) -> None:
        self.count += dense.numel()
        self._squares += float(dense.double().square().sum())
        self._change += float((weight.decode() - dense).double().square().sum())

    @property
    def relative(self) -> float:
        return (self._change / self._squares) ** 0.5 if self._squares else 0.0


def _holds(file: Path, text: str) -> bool:
    return file.is_file() and file.read_text(encoding="utf-8") == text


class _Work:
    """Finished blocks in `<output>.partial`, with what they are blocks of."""

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

    def read(self, index: int, layers: dict[str, Any], codec: str) -> dict[str, QuantizedWeight] | None:
        """A finished block; None where it is not finished or damaged."""
        try:
            with safe_open(self._file(index), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None
        if tensors.keys() != layers.keys():
            return None
        return {
            name: QuantizedWeight(codec, (layer.out_features, layer.in_features), tensors[name])
            for name, layer in layers.items()
        }

    def write(self, index: int, done: dict[str, QuantizedWeight]) -> None:
        """Keep a finished block."""
        with replacing(self._file(index)) as temporary:
            save_tensors(temporary, {name: weight.blocks for name, weight in done.items()}, None)

    def remove(self) -> None:
        """The output stands; the blocks are no longer needed."""
        shutil.rmtree(self.folder, ignore_errors=True)
