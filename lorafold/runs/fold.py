"""Put a run's adapter back into the base's own format, and say what it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from lorafold.adapters.adapt import unload
from lorafold.adapters.adapted import Carrier, adapted_layers, carriers, plain_parameter
from lorafold.adapters.fold import (
    LEAST_KEPT,
    LayerFold,
    base_weight,
    fold,
    kept_fraction,
    merged_weight,
    refuse_parameters,
    requantize,
)
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.targets import linear_layers
from lorafold.errors import FoldError, bullet_list
from lorafold.files import replacing_folder, size_on_disk
from lorafold.models.adapter_files import load_adapter
from lorafold.models.bnb_folder import create_bnb
from lorafold.models.classifier import adapter_labels, adapter_task, load_classifier, save_classifier, stored_type
from lorafold.models.encoder import load_encoder
from lorafold.models.gguf_file import DENSE
from lorafold.models.gguf_write import file_order, write_gguf
from lorafold.models.load import LoadedModel, load
from lorafold.models.mlx_folder import MLXFolder, write_mlx
from lorafold.models.tensors import save_tensors
from lorafold.quant.codecs import GGUF_CODECS
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import QuantizedWeight, encode, steps_apart
from lorafold.runs.folder import Run

DENSE_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
TARGETS = (*DENSE_TYPES, *(name.lower() for name in GGUF_CODECS if GGUF_CODECS[name].encodes))
BNB_TARGETS = {"nf4": "NF4-DQ", "int8": "INT8"}


@dataclass(frozen=True)
class FoldReport:
    """What a fold did.

    Attributes:
        kind: `exact` (the trained weights themselves), `near` (rounded, 99 % kept) or `lossy`.
        layers: matrices written.
        kept: smallest share of a layer's update that survived.
        mean_kept: the same over all layers, weighted alike.
        error_steps: largest rounding error, in quantization steps (nan for dense types).
        size_before, size_after: bytes of base and result.
    """

    kind: str
    layers: int
    kept: float
    mean_kept: float
    error_steps: float
    size_before: int
    size_after: int

    def describe(self) -> str:
        """One sentence."""
        grown = self.size_after - self.size_before
        size = "same size" if not grown else f"{grown:+,} bytes"
        what = {
            "exact": "it holds the trained weights exactly",
            "near": f"every layer keeps {self.kept:.2%} of its update or more",
            "lossy": f"{self.mean_kept:.1%} of the update is left on average, {self.kept:.1%} in the worst layer",
        }[self.kind]
        if self.kind == "exact" and self.kept < LEAST_KEPT:
            what += f" (offsets in coarse steps, which hold {self.kept:.1%} of the worst layer's update)"
        return f"{self.kind} fold of {self.layers} layers, {size}: {what}"


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
    if loaded.gguf is not None or loaded.mlx is not None or loaded.bnb is not None:
        refuse_parameters(loaded.model, "only a transformers folder is folded with these; lorafold export keeps them")
    if labels := adapter_labels(run.adapter):
        return _fold_classifier(loaded, labels, path, to, lossy)
    if loaded.mlx is not None:
        return _fold_mlx(loaded, loaded.mlx, path, to, lossy)
    if loaded.bnb is not None:
        return _fold_bnb(loaded, path, to, lossy)
    if loaded.gguf is None:
        return _fold_folder(loaded, path, to, lossy)
    if to not in (None, *TARGETS):
        raise FoldError(f"a GGUF file holds no {to}; it takes {', '.join(TARGETS)}")
    if run.config.adapter.method == "qa-lora" and to in (None, _own_type(loaded)):
        folds = fold(loaded.model, least_kept=None if lossy else LEAST_KEPT)
        report = _packed_report("exact", folds, loaded)
        replaced = {loaded.bindings[f.name].tensor: _entry(loaded, f) for f in folds}
    elif to in DENSE_TYPES:
        replaced, report = _dense_tensors(loaded, to, lossy)
    else:
        if to is None and not lossy:
            fold(loaded.model)  # says that LoRA has no exact place, and what there is instead
        folds = requantize(loaded.model, to.upper() if to else None)
        report = _packed_report("lossy", folds, loaded)
        _refuse_loss(report, lossy)
        replaced = {loaded.bindings[f.name].tensor: _entry(loaded, f) for f in folds}
    write_gguf(loaded.gguf, replaced, path)
    return _sized(report, path)


def _own_type(loaded: LoadedModel) -> str | None:
    """The type that all adapted matrices have already, in lower case; None where they differ or are dense."""
    types = {
        layer.base.packed.codec.lower() if isinstance(layer.base, QuantLinear) else None
        for _, layer in adapted_layers(loaded.model)
    }
    return types.pop() if len(types) == 1 else None


def _entry(loaded: LoadedModel, result: LayerFold) -> tuple[str, np.ndarray]:
    return result.weight.codec, file_order(result.weight, loaded.bindings[result.name])


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


def _sized(report: FoldReport, path: Path) -> FoldReport:
    return FoldReport(**{**report.__dict__, "size_after": size_on_disk(path)})


def _refuse_loss(report: FoldReport, lossy: bool) -> None:
    if report.kind == "lossy" and not lossy:
        raise FoldError(
            f"this fold would keep {report.mean_kept:.1%} of the update on average ({report.kept:.1%} in the worst "
            "layer); pass --lossy to write it all the same, or choose --to f16"
        )


def _fold_mlx(loaded: LoadedModel, folder: MLXFolder, path: Path, to: str | None, lossy: bool) -> FoldReport:
    if to is not None:
        raise FoldError(f"an MLX folder is folded in its own format, not in {to}; leave --to out")
    if lossy and any(isinstance(layer.adapter, LoRA) for _, layer in adapted_layers(loaded.model)):
        return _requantize_mlx(loaded, folder, path)
    folds = fold(loaded.model, least_kept=None if lossy else LEAST_KEPT)
    write_mlx(folder, {f.name: f.weight for f in folds}, {}, path)
    return _sized(_packed_report("exact", folds, loaded), path)


@torch.no_grad()
def _requantize_mlx(loaded: LoadedModel, folder: MLXFolder, path: Path) -> FoldReport:
    """Merge LoRA in float32 and quantize again as mx.quantize does; layers that are not quantized stay so."""
    packed: dict[str, QuantizedWeight] = {}
    plain: dict[str, torch.Tensor] = {}
    kept: list[float] = []
    steps: list[float] = []
    for name, layer in adapted_layers(loaded.model):
        before, wanted = base_weight(layer.base), merged_weight(layer)
        if isinstance(layer.base, QuantLinear):
            packed[name] = _encoded(name, wanted, layer.base.codec)
            steps.append(steps_apart(wanted, packed[name]))
        else:
            plain[f"{name}.weight"] = wanted.to(folder.stored_dtype(f"{name}.weight"))
            if not torch.isfinite(plain[f"{name}.weight"]).all():
                raise FoldError(f"{name}: a merged weight is beyond {folder.stored_dtype(f'{name}.weight')}")
        stored = packed[name].decode() if name in packed else plain[f"{name}.weight"].float()
        kept.append(kept_fraction(stored - before, wanted - before))
    write_mlx(folder, packed, plain, path)
    report = _dense_report(kept, size_on_disk(loaded.path))
    return _sized(replace(report, error_steps=max(steps, default=float("nan"))), path)


@torch.no_grad()
def _dense_tensors(loaded: LoadedModel, to: str, lossy: bool) -> tuple[dict[str, tuple[str, np.ndarray]], FoldReport]:
    """The adapted matrices as plain numbers, in file order."""
    replaced, kept, faults = {}, [], []
    for path, layer in adapted_layers(loaded.model):
        weight = merged_weight(layer)
        stored = weight.to(DENSE_TYPES[to])
        if not torch.isfinite(stored).all():
            faults.append(f"{path}: a weight is beyond {to}")
            continue
        before = base_weight(layer.base)
        kept.append(kept_fraction(stored.float() - before, weight - before))
        order = loaded.bindings[path].row_order
        data = (stored if order is None else stored[order.argsort()]).contiguous().view(torch.uint8)
        replaced[loaded.bindings[path].tensor] = (to.upper(), data.numpy())
        assert to.upper() in DENSE
    if faults:
        raise FoldError("the adapter cannot be folded:\n" + bullet_list(faults))
    report = _dense_report(kept, size_on_disk(loaded.path))
    _refuse_loss(report, lossy)
    return replaced, report


@torch.no_grad()
def _fold_bnb(loaded: LoadedModel, path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Merge a LoRA run on NF4 or 8-bit weights into a 16-bit folder, or quantize again with loss.

    Every quantized layer is written as it was computed with, adapted or not.
    """
    assert loaded.bnb is not None
    if to not in (None, *DENSE_TYPES, *BNB_TARGETS):
        raise FoldError(f"a bitsandbytes folder is written in {', '.join((*DENSE_TYPES, *BNB_TARGETS))}, not {to}")
    adapters = dict(adapted_layers(loaded.model))
    odd = [path for path in adapters if path not in linear_layers(loaded.model)]
    if odd:
        raise FoldError(
            f"only linear layers of a bitsandbytes folder are folded, and {odd[0]} is adapted as well; export"
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
    report = _dense_report(kept, size_on_disk(loaded.path))
    _refuse_loss(report, lossy)
    plain = {name: _plain_layer(layer, dense.get(name)) for name, layer in linear_layers(loaded.model).items()}
    for name, layer in plain.items():
        loaded.model.set_submodule(name, layer)
    create_bnb(path, loaded.model, loaded.tokenizer, packed, dtype)
    return _sized(report, path)


def _encoded(name: str, weight: torch.Tensor, codec: str) -> QuantizedWeight:
    try:
        return encode(weight, codec)
    except ValueError as error:
        raise FoldError(f"{name}: {error}") from None


def _plain_layer(layer: nn.Linear | QuantLinear, weight: torch.Tensor | None) -> nn.Module:
    """The layer without adapters; dense where a weight is given."""
    if weight is None:
        return layer
    bias = layer.bias
    plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, dtype=weight.dtype)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias, requires_grad=False)
    return plain


def _dense_report(kept: list[float], size: int) -> FoldReport:
    kind = "near" if min(kept) >= LEAST_KEPT else "lossy"
    return FoldReport(kind, len(kept), min(kept), sum(kept) / len(kept), float("nan"), size, 0)


@torch.no_grad()
def _fold_folder(loaded: LoadedModel, path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Merge a run into a copy of a transformers folder, each weight in the type it had."""
    if to not in (None, *DENSE_TYPES):
        raise FoldError(f"a transformers folder is written in {', '.join(DENSE_TYPES)}, not {to}")
    merges = {
        path if isinstance(carrier, AdaptedParameter) else f"{path}.weight": (path, carrier)
        for path, carrier in carriers(loaded.model)
    }
    kept: list[float] = []
    prefix = f"{loaded.model.base_model_prefix}."  # the folder of a model with a head, loaded without it
    with replacing_folder(path) as temporary:
        for source in sorted(loaded.path.iterdir()):
            if source.is_file() and source.suffix != ".safetensors":
                (temporary / source.name).write_bytes(source.read_bytes())
        for source in sorted(loaded.path.glob("[0-9]_*/config.json")):  # how sentence-transformers pools
            (temporary / source.parent.name).mkdir()
            (temporary / source.parent.name / source.name).write_bytes(source.read_bytes())
        for source in sorted(loaded.path.glob("*.safetensors")):
            with safe_open(source, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                header = file.metadata()
            names = {key: key.removeprefix("" if key in merges else prefix) for key in tensors}
            for key in (key for key, name in names.items() if name in merges):
                before, wanted = _before_and_after(loaded.model, *merges.pop(names[key]))
                tensors[key] = wanted.to(DENSE_TYPES[to] if to else tensors[key].dtype)
                kept.append(kept_fraction(tensors[key].float() - before, wanted - before))
            save_tensors(temporary / source.name, tensors, header)
        if merges:
            raise FoldError("the folder stores these weights under other names: " + ", ".join(sorted(merges)[:5]))
        report = _dense_report(kept, size_on_disk(loaded.path))
        _refuse_loss(report, lossy)
    return _sized(report, path)


@torch.no_grad()
def _fold_classifier(loaded: LoadedModel, labels: list[str], path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Write a classifier with what it learned as a folder that transformers loads, in the base's type."""
    if to not in (None, *DENSE_TYPES):
        raise FoldError(f"a transformers folder is written in {', '.join(DENSE_TYPES)}, not {to}")
    dtype = DENSE_TYPES[to] if to else stored_type(loaded.path)
    pairs = (_before_and_after(loaded.model, *carrier) for carrier in carriers(loaded.model))
    kept = [kept_fraction(wanted.to(dtype).float() - before, wanted - before) for before, wanted in pairs]
    report = _dense_report(kept, size_on_disk(loaded.path))
    _refuse_loss(report, lossy)
    save_classifier(unload(loaded.model, merge=True), loaded, labels, dtype, path)
    return _sized(report, path)


def _before_and_after(model: nn.Module, path: str, carrier: Carrier) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight or parameter in float32 without its adapters, and with them."""
    if isinstance(carrier, AdaptedParameter):
        plain = plain_parameter(model, path)
        assert plain is not None
        return plain.detach().float(), carrier(plain).detach().float()
    return base_weight(carrier.base), merged_weight(carrier)
