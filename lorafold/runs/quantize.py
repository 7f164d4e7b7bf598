"""Quantize a model block by block, so that it can be trained with QA-LoRA and folded; begin again where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lorafold.adapters.lowrank import LowRank
from lorafold.adapters.targets import HEADS, linear_layers
from lorafold.config import QuantizeConfig
from lorafold.data.packs import micro_batches, pack
from lorafold.data.tokens import Tokens
from lorafold.errors import FormatError, bullet_list
from lorafold.files import size_on_disk
from lorafold.models.architectures import ROPE_FACTORS
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.gguf_write import file_order, write_gguf
from lorafold.models.load import MODEL_TYPES, LoadedModel
from lorafold.models.mlx_folder import create_mlx
from lorafold.quant.calibrate import Method, quantize, recovery
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.mlx import GROUPS, mlx_codec
from lorafold.quant.weight import QuantizedWeight, encode
from lorafold.runs.blocks import BlockWalk, find_blocks
from lorafold.runs.loftq import Fitted, alternate, save_start
from lorafold.runs.partial import Partial

_GGUF_TYPES = {4: "Q4_1", 5: "Q5_1", 8: "Q8_0"}
_STORED = {"float16": "F16", "bfloat16": "BF16"}
_PACK_TOKENS = 1024
_PROPAGATE = 0.5  # the best of those tried, see docs/log.md


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
        start: with LoftQ the folder of the adapter that training begins from.
        left: with LoftQ the error with that adapter.
        plain: weights of matrices in the blocks that are no linear layers, such as experts in one tensor.
    """

    method: str
    codec: str
    weights: int
    bits_per_weight: float
    outer: bool
    error: float
    size: int
    start: Path | None = None
    left: float = 0.0
    plain: int = 0

    def describe(self) -> str:
        """One sentence."""
        outer = "embedding included" if self.outer else "embedding left as it is"
        outer += f"; {self.plain:,} weights are in no linear layer and stay plain" if self.plain else ""
        with_start = "" if self.start is None else f", with the adapter {self.start} by {self.left:.2%}"
        return (
            f"{self.weights:,} weights in {self.codec} by {self.method}, {self.bits_per_weight:.2f} bits each "
            f"({outer}), changed by {self.error:.2%} of their size{with_start}; {self.size:,} bytes"
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
    if config.stored is not None:
        faults.append(f"stored is {config.stored}; a GGUF file has float16 scales, and keeps what is not quantized")
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
    _refuse_rank(loaded.model, config.loftq_r)
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
    if method != "gptq" and config.propagate is not None:
        raise FormatError(f"propagate is for gptq, and this is {method}; give rows with --data, or leave it out")
    share = _PROPAGATE if config.propagate is None else config.propagate
    _refuse_shapes(loaded.model, CODECS[codec].group_size, GROUPS, wide is not None)
    stored = config.stored or "float16"
    work = Partial(output, loaded, rows, {**asdict(config), "method": method, "codec": codec, "propagate": share})
    errors = _Errors()
    quantized: dict[str, QuantizedWeight] = {}
    updates: dict[str, LowRank] = {}
    packs = [pack(group) for group in micro_batches(rows or [], _PACK_TOKENS)]
    walk = BlockWalk(loaded, packs, twice=method == "gptq" and share > 0) if rows else None
    for index, (prefix, block) in enumerate(find_blocks(loaded.model)):
        layers = {f"{prefix}.{name}": layer for name, layer in linear_layers(block).items()}
        done = work.read(index, layers, codec, config.loftq_r is not None)
        if done is None:
            done = {}
            for names in walk.groups(index) if walk else [list(linear_layers(block))]:
                found = _inputs(walk, index, names[0], share)
                for name in (f"{prefix}.{name}" for name in names):
                    done[name] = _fitted(name, _dense(layers[name]), codec, method, config, *found)
                    _replace(loaded.model, name, layers[name], done[name])
                del found
            work.write(index, done)
        for name, fitted in done.items():
            errors.add(_dense(layers[name]), fitted)
            _replace(loaded.model, name, layers[name], fitted)
            quantized[name] = fitted.weight
            updates |= {} if fitted.update is None else {name: fitted.update}
        if walk:
            walk.advance(index)
        progress(1)
    walk = None  # rows and what they need are not kept any longer
    for name, layer in _outer_layers(loaded.model):
        if wide is not None:
            quantized[name] = _quantized(name, _dense(layer), wide, "rtn" if method == "rtn" else "search")
            errors.add(_dense(layer), Fitted(quantized[name]))
        elif not gguf:
            _unpack(layer)
    if gguf:
        assert loaded.gguf is not None
        replaced = {n: (w.codec, file_order(w, loaded.bindings[n])) for n, w in quantized.items()}
        write_gguf(loaded.gguf, {loaded.bindings[n].tensor: entry for n, entry in replaced.items()}, output)
    else:
        default = next(weight for weight in quantized.values() if weight.codec == codec)
        create_mlx(output, loaded.model, loaded.tokenizer, quantized, default, getattr(torch, stored))
    plain = _plain(loaded.model, quantized)
    report = _report(config, output, method, codec, errors, quantized, updates, wide is not None, plain)
    work.remove()
    return report


def _report(
    config: QuantizeConfig,
    output: Path,
    method: str,
    codec: str,
    errors: _Errors,
    quantized: dict[str, QuantizedWeight],
    updates: dict[str, LowRank],
    outer: bool,
    plain: int,
) -> QuantizeReport:
    """What was written, the start of LoftQ among it, which is written now."""
    start = None if config.loftq_r is None else save_start(output, updates, config.loftq_r)
    bits = 8 * sum(weight.nbytes for weight in quantized.values()) / errors.count
    count, change, left = errors.count, errors.relative, errors.left
    return QuantizeReport(method, codec, count, bits, outer, change, size_on_disk(output), start, left, plain)


def _plain(model: nn.Module, quantized: Mapping[str, QuantizedWeight]) -> int:
    """How many weights of matrices in the blocks are not quantized."""
    parameters = ((f"{at}.{name}", p) for at, block in find_blocks(model) for name, p in block.named_parameters())
    return sum(p.numel() for name, p in parameters if p.ndim > 1 and name.removesuffix(".weight") not in quantized)


def _refuse_rank(model: nn.Module, r: int | None) -> None:
    """Refuse a rank of LoftQ that a layer does not have."""
    if r is None:
        return
    layers = [x for _, block in find_blocks(model) for x in linear_layers(block).values()]
    smallest = min(min(layer.out_features, layer.in_features) for layer in layers)
    if r > smallest:
        raise FormatError(f"loftq_r is {r}, and the smallest matrix of this model has a rank of {smallest}")


def _refuse_architecture(loaded: LoadedModel, gguf: bool, config: QuantizeConfig) -> None:
    """Refuse what the new folder would not describe, or what would not be read from it again."""
    kind = loaded.model.config.model_type
    if not gguf and loaded.gguf is not None and ROPE_FACTORS in loaded.gguf.tensors:
        raise FormatError(
            f"{loaded.path} keeps its rope factors as a tensor ({ROPE_FACTORS}), which a config.json cannot hold; "
            "quantize the model's transformers folder, or write a .gguf file"
        )
    if not any(linear_layers(block) for _, block in find_blocks(loaded.model)):
        raise FormatError(f"linear layers are quantized, and the blocks of this model ({kind}) hold none")
    if not gguf and config.format == "affine" and kind not in MODEL_TYPES:
        raise FormatError(
            f"the architecture {kind} is not read from MLX folders yet; {', '.join(sorted(MODEL_TYPES))} are"
        )


def _replace(model: nn.Module, name: str, before: nn.Linear | QuantLinear, fitted: Fitted) -> None:
    model.set_submodule(name, QuantLinear(fitted.weight, _bias(before)))


def _inputs(walk: BlockWalk | None, index: int, name: str, share: float) -> tuple[Tensor | None, Tensor | None]:
    """X^T X of a layer's inputs, and what its weights are multiplied by to be moved; None where these are not known."""
    inputs = walk.inputs(index, name) if walk else None
    if inputs is None or inputs.lost is None:
        return None if inputs is None else inputs.hessian, None
    assert walk is not None
    try:
        return inputs.hessian, recovery(inputs.hessian, inputs.lost).mul_(share)
    except ValueError as error:
        raise FormatError(f"{walk.blocks[index][0]}.{name} cannot be quantized: {error}") from None


def _quantized(name: str, dense: Tensor, codec: str, method: Method, hessian: Tensor | None = None) -> QuantizedWeight:
    try:
        return quantize(dense, codec, method, hessian) if CODECS[codec].affine else encode(dense, codec)
    except ValueError as error:
        raise FormatError(f"{name} cannot be quantized: {error}") from None


def _fitted(
    name: str,
    dense: Tensor,
    codec: str,
    method: Method,
    config: QuantizeConfig,
    hessian: Tensor | None = None,
    moving: Tensor | None = None,
) -> Fitted:
    if config.loftq_r is None:
        dense = dense if moving is None else dense + dense @ moving
        reached = hessian is not None or method != "gptq"  # there may be experts that no row reaches
        return Fitted(_quantized(name, dense, codec, method if reached else "search", hessian))
    return alternate(dense, lambda w: _quantized(name, w, codec, method), config.loftq_r, config.loftq_steps)


def _quantize_bnb(
    loaded: LoadedModel, config: QuantizeConfig, output: Path, progress: Callable[[int], None]
) -> QuantizeReport:
    """All linear layers but the head, as bitsandbytes does; nothing else is quantized."""
    if output.suffix == ".gguf":
        raise FormatError(f"{output}: {config.format} is a format of transformers folders; name a folder")
    codec = "INT8" if config.format == "int8" else "NF4-DQ" if config.use_double_quant else "NF4"
    _refuse_shapes(loaded.model, CODECS[codec].group_size, (), False)
    errors, quantized, updates = _Errors(), dict[str, QuantizedWeight](), dict[str, LowRank]()
    for prefix, block in find_blocks(loaded.model):
        for name, layer in linear_layers(block).items():
            fitted = _fitted(f"{prefix}.{name}", _dense(layer), codec, "rtn", config)
            errors.add(_dense(layer), fitted)
            quantized[f"{prefix}.{name}"] = fitted.weight
            updates |= {} if fitted.update is None else {f"{prefix}.{name}": fitted.update}
        progress(1)
    for _, layer in _outer_layers(loaded.model):
        _unpack(layer)
    stored = getattr(torch, config.stored) if config.stored else _own_dtype(loaded)
    create_bnb(output, loaded.model, loaded.tokenizer, quantized, stored)
    plain = _plain(loaded.model, quantized)
    return _report(config, output, "nearest value", codec, errors, quantized, updates, False, plain)


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
        self.count, self._squares, self._change, self._left = 0, 0.0, 0.0, 0.0

    def add(self, dense: Tensor, fitted: Fitted) -> None:
        self.count += dense.numel()
        self._squares += float(dense.double().square().sum())
        change = Fitted(fitted.weight).residual(dense)
        left = change if fitted.update is None else fitted.residual(dense)
        self._change += float(change.double().square().sum())
        self._left += float(left.double().square().sum())

    @property
    def relative(self) -> float:
        return (self._change / self._squares) ** 0.5 if self._squares else 0.0

    @property
    def left(self) -> float:
        return (self._left / self._squares) ** 0.5 if self._squares else 0.0
