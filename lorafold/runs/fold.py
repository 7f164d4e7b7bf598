"""Put a run's adapter back into the base's own format, and say what it cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lorafold.adapters.adapt import unload
from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import (
    LEAST_KEPT,
    LayerFold,
    base_weight,
    fold,
    kept_fraction,
    merged_weight,
    requantize,
)
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.targets import linear_layers
from lorafold.adapters.tied import taken_apart, updated_layers
from lorafold.errors import FoldError
from lorafold.files import size_on_disk
from lorafold.models.adapter_files import load_adapter
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.classifier import adapter_labels, adapter_task, load_classifier
from lorafold.models.encoder import load_encoder
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.gguf_write import file_order, write_gguf
from lorafold.models.load import HEAD_TENSOR, LoadedModel, binding_of, load
from lorafold.models.mlx_folder import MLXFolder, write_mlx
from lorafold.quant.codecs import GGUF_CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import QuantizedWeight, encode, steps_apart
from lorafold.runs.fold_folder import fold_classifier, fold_folder
from lorafold.runs.fold_plain import Entry, gguf_numbers, merged_updates, mlx_numbers, whole_updates
from lorafold.runs.fold_report import DENSE_TYPES, FoldReport, dense_report, joined, refuse_loss, sized
from lorafold.runs.folder import Run

TARGETS = (*DENSE_TYPES, *(name.lower() for name in GGUF_CODECS if GGUF_CODECS[name].encodes))
BNB_TARGETS = {"nf4": "NF4-DQ", "int8": "INT8"}


def load_trained(run: Run, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedModel:
    """The base model with the run's adapter active, and with the head that the run trained, if it trained one.

    Raises:
        FormatError, AdapterError: the base is gone, or its weights are not those of the run.
    """
    labels, model = adapter_labels(run.adapter), run.config.model
    task = adapter_task(run.adapter)
    if task == "embedding":
        loaded = load_encoder(model, dtype, device)
    elif labels is not None and task is not None:
        loaded = load_classifier(model, labels, dtype, device, task)
    else:
        loaded = load(model, dtype, device)
    load_adapter(loaded, run.adapter)
    return loaded


def fold_run(run: Run, path: Path, to: str | None = None, lossy: bool = False) -> FoldReport:
    """Write the model with the run's adapter merged in.

    Args:
        path: a GGUF file, or a folder when the base is a transformers folder.
        to: a type of `TARGETS`; None keeps the base's own, which is exact for QA-LoRA.
        lossy: allow a result that keeps less than 99 % of the update.

    Raises:
        FoldError: the update has no exact place and `lossy` was not given; the message says what there is instead.
        OutputError: the output cannot be written; nothing is left behind.
    """
    loaded = load_trained(run)
    if path.resolve() == loaded.path.resolve():
        raise FoldError(f"{path} is the base of this run, without which it cannot be used again; choose another output")
    if loaded.gguf is None and path.suffix == ".gguf":
        raise FoldError(f"{loaded.path} is a folder, and so is what it is folded into; give {path.with_suffix('')}")
    if adapter_labels(run.adapter) is not None and (loaded.gguf or loaded.mlx or loaded.bnb):
        raise FoldError(f"{loaded.path.name} has no place for a classifier's head; lorafold export keeps all of it")
    if labels := adapter_labels(run.adapter):
        return fold_classifier(loaded, labels, path, to, lossy)
    if loaded.mlx is not None:
        return _fold_mlx(loaded, loaded.mlx, path, to, lossy)
    if loaded.bnb is not None:
        return _fold_bnb(loaded, path, to, lossy)
    if loaded.gguf is None:
        return fold_folder(loaded, path, to, lossy)
    return _fold_gguf(loaded, loaded.gguf, path, to, lossy)


def _fold_gguf(loaded: LoadedModel, base: GGUFFile, path: Path, to: str | None, lossy: bool) -> FoldReport:
    if to not in (None, *TARGETS):
        raise FoldError(f"a GGUF file holds no {to}; it takes {', '.join(TARGETS)}")
    layers = [layer for _, layer in updated_layers(loaded.model)]
    if not layers and to not in (None, *DENSE_TYPES):
        raise FoldError(
            f"what was trained whole is written in {', '.join(DENSE_TYPES)}; leave --to out, then lorafold quantize"
        )
    packed = any(isinstance(layer.base, QuantLinear | QuantEmbedding) for layer in layers)
    updates = whole_updates(loaded)
    if to in DENSE_TYPES or to is None:  # matrices that are dense already need no quantizing either
        updates = chain(updates, merged_updates(loaded, packed=to is not None))
    plain = gguf_numbers(loaded, updates, to if to in DENSE_TYPES else None)
    replaced = plain.tensors
    if to in DENSE_TYPES or (to is None and not packed):
        report = dense_report(plain.kept, size_on_disk(loaded.path))
        refuse_loss(report, lossy)
    else:
        report, folds = _quantized(loaded, to, lossy)
        report = joined(report, plain.kept, plain.exact)
        refuse_loss(report, lossy, ", or choose --to f16")
        replaced |= _entries(loaded, folds)
    added = _head_apart(loaded, replaced)
    write_gguf(base, {name: entry for name, entry in replaced.items() if name not in added}, path, added)
    return sized(report, path)


def _quantized(loaded: LoadedModel, to: str | None, lossy: bool) -> tuple[FoldReport, list[LayerFold]]:
    """Adapted matrices in quantized types: folded exactly where that is possible, or quantized again."""
    exact = all(isinstance(layer.adapter, GroupAdapter) for _, layer in adapted_layers(loaded.model))
    if exact and to in (None, _own_type(loaded)):
        folds = fold(loaded.model, least_kept=None if lossy else LEAST_KEPT)
        return _packed_report("exact", folds, loaded), folds
    if to is None and not lossy:
        fold(loaded.model)  # says that LoRA has no exact place, and what there is instead
    folds = requantize(loaded.model, to.upper() if to else None)
    return _packed_report("lossy", folds, loaded), folds


def _head_apart(loaded: LoadedModel, replaced: dict[str, Entry]) -> dict[str, tuple[str, np.ndarray, tuple[int, ...]]]:
    """The head's own tensor, where the base has none and the adapter asks for one: folded, or as the embedding was."""
    apart = taken_apart(loaded.model)
    if apart is None:
        return {}
    assert loaded.gguf is not None
    table = loaded.gguf.tensors[loaded.bindings[apart[0]].tensor]
    kind, data = replaced.get(HEAD_TENSOR, (table.type, loaded.gguf.raw(table.name)))
    return {HEAD_TENSOR: (kind, data, table.shape)}


def _own_type(loaded: LoadedModel) -> str | None:
    """The type that all adapted matrices have already, in lower case; None where they differ or are dense."""
    types = {
        layer.base.packed.codec.lower() if isinstance(layer.base, QuantLinear | QuantEmbedding) else None
        for _, layer in adapted_layers(loaded.model)
    }
    return types.pop() if len(types) == 1 else None


def _entries(loaded: LoadedModel, folds: list[LayerFold]) -> dict[str, Entry]:
    places = {f.name: binding_of(loaded, f.name) for f in folds}
    return {places[f.name].tensor: (f.weight.codec, file_order(f.weight, places[f.name])) for f in folds}


def _packed_report(kind: str, folds: list[LayerFold], loaded: LoadedModel) -> FoldReport:
    kept = [f.kept for f in folds]
    return FoldReport(
        "near" if kind == "lossy" and min(kept) >= LEAST_KEPT else kind,
        len(folds),
        min(kept),
        sum(kept) / len(kept),
        max(f.error_steps for f in folds),
        size_on_disk(loaded.path),
        0,
    )


def _fold_mlx(loaded: LoadedModel, folder: MLXFolder, path: Path, to: str | None, lossy: bool) -> FoldReport:
    if to is not None:
        raise FoldError(f"an MLX folder is folded in its own format, not in {to}; leave --to out")
    layers = [layer for _, layer in adapted_layers(loaded.model)]
    loras = [layer for layer in layers if isinstance(layer.adapter, LoRA)]
    if loras and (lossy or not any(isinstance(layer.base, QuantLinear | QuantEmbedding) for layer in loras)):
        return _requantize_mlx(loaded, folder, path, lossy)
    folds = fold(loaded.model, least_kept=None if lossy else LEAST_KEPT)
    plain = mlx_numbers(loaded, whole_updates(loaded))
    if folds:
        report = joined(_packed_report("exact", folds, loaded), plain.kept, plain.exact)
    else:
        report = dense_report(plain.kept, size_on_disk(loaded.path))
    refuse_loss(report, lossy, "")
    write_mlx(folder, {f.name: f.weight for f in folds}, plain.tensors, path, taken_apart(loaded.model))
    return sized(report, path)


@torch.no_grad()
def _requantize_mlx(loaded: LoadedModel, folder: MLXFolder, path: Path, lossy: bool) -> FoldReport:
    """Merge LoRA in float32 and quantize again as mx.quantize does; layers that are not quantized stay so."""
    packed: dict[str, QuantizedWeight] = {}
    steps: list[float] = []
    plain = mlx_numbers(loaded, chain(whole_updates(loaded), merged_updates(loaded, packed=False)))
    kept = plain.kept
    for name, layer in updated_layers(loaded.model):
        if not isinstance(layer.base, QuantLinear | QuantEmbedding):
            continue
        before, wanted = base_weight(layer.base), merged_weight(layer)
        packed[name] = _encoded(name, wanted, layer.base.codec)
        steps.append(steps_apart(wanted, packed[name]))
        kept.append(kept_fraction(packed[name].decode() - before, wanted - before))
    report = dense_report(kept, size_on_disk(loaded.path))
    refuse_loss(report, lossy, "")
    write_mlx(folder, packed, plain.tensors, path, taken_apart(loaded.model))
    return sized(replace(report, error_steps=max(steps, default=float("nan"))), path)


@torch.no_grad()
def _fold_bnb(loaded: LoadedModel, path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Merge a LoRA run on NF4 or 8-bit weights into a 16-bit folder, or quantize again with loss.

    Every quantized layer is written as it was computed with, adapted or not.
    """
    assert loaded.bnb is not None
    if to not in (None, *DENSE_TYPES, *BNB_TARGETS):
        raise FoldError(f"a bitsandbytes folder is written in {', '.join((*DENSE_TYPES, *BNB_TARGETS))}, not {to}")
    adapters = dict(updated_layers(loaded.model))
    tables = {path: layer for path, layer in adapters.items() if isinstance(layer.base, nn.Embedding)}
    odd = [path for path in adapters if path not in tables and path not in linear_layers(loaded.model)]
    if odd:
        raise FoldError(
            f"linear layers and embeddings of a bitsandbytes folder are folded, and {odd[0]} is adapted as well; export"
        )
    codec, dtype = BNB_TARGETS.get(to or ""), DENSE_TYPES.get(to or "") or loaded.bnb.dtype
    packed: dict[str, QuantizedWeight] = {}
    dense: dict[str, torch.Tensor] = {}
    kept: list[float] = []
    for name, layer in linear_layers(loaded.model).items():
        if name not in adapters and not isinstance(layer, QuantLinear):
            continue
        before = base_weight(layer)
        wanted = merged_weight(adapters[name]) if name in adapters else before
        if codec is None or not isinstance(layer, QuantLinear):
            dense[name] = wanted.to(dtype)
        elif name not in adapters and layer.codec.partition("-")[0] == codec.partition("-")[0]:
            packed[name] = layer.packed
        else:
            packed[name] = _encoded(name, wanted, codec)
        if name in adapters:
            stored = packed[name].decode() if name in packed else dense[name].float()
            kept.append(kept_fraction(stored - before, wanted - before))
    for name, layer in tables.items():
        before, wanted = base_weight(layer.base), merged_weight(layer)
        dense[name] = wanted.to(dtype)
        kept.append(kept_fraction(dense[name].float() - before, wanted - before))
    whole = {}
    for name, before, wanted in whole_updates(loaded):
        whole[name] = wanted.to(dtype)
        kept.append(kept_fraction(whole[name].float() - before, wanted - before))
    report = dense_report(kept, size_on_disk(loaded.path))
    refuse_loss(report, lossy)
    if taken_apart(loaded.model):
        loaded.model.config.tie_word_embeddings = False
    unload(loaded.model)
    for name, layer in linear_layers(loaded.model).items():
        if name in dense:
            loaded.model.set_submodule(name, _plain_layer(layer, dense[name]))
    for name, value in ({f"{name}.weight": dense[name] for name in tables} | whole).items():
        _set(loaded.model, name, value)
    create_bnb(path, loaded.model, loaded.tokenizer, packed, dtype)
    return sized(report, path)


def _encoded(name: str, weight: torch.Tensor, codec: str) -> QuantizedWeight:
    try:
        return encode(weight, codec)
    except ValueError as error:
        raise FoldError(f"{name}: {error}") from None


def _plain_layer(layer: nn.Linear | QuantLinear, weight: torch.Tensor) -> nn.Module:
    """The layer, dense, with another weight."""
    bias = layer.bias
    plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a module another parameter, or a packed layer another bias; a module that shares it keeps the old one."""
    owner, _, own_name = name.rpartition(".")
    module = model.get_submodule(owner)
    parameter = isinstance(getattr(module, own_name), nn.Parameter)
    setattr(module, own_name, nn.Parameter(value, requires_grad=False) if parameter else value)
