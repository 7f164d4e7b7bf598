"""Folds into folders of transformers: a copy with merged weights, or a model that is saved anew."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from lorafold.adapters.adapt import unload
from lorafold.adapters.adapted import AdaptedLayer, Carrier, carriers, plain_parameter
from lorafold.adapters.fold import base_weight, kept_fraction, merged_weight
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.tied import follows, taken_apart, tied_pair
from lorafold.errors import FoldError
from lorafold.files import replacing_folder, size_on_disk
from lorafold.models.classifier import save_classifier, stored_type
from lorafold.models.load import LoadedModel
from lorafold.models.tensors import save_tensors, untie_folder
from lorafold.runs.fold_report import DENSE_TYPES, FoldReport, dense_report, refuse_loss, sized


@torch.no_grad()
def fold_folder(loaded: LoadedModel, path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Merge a run into a copy of a transformers folder, each weight in the type it had."""
    if to not in (None, *DENSE_TYPES):
        raise FoldError(f"a transformers folder is written in {', '.join(DENSE_TYPES)}, not {to}")
    merges = {
        path if isinstance(carrier, AdaptedParameter) else f"{path}.weight": (path, carrier)
        for path, carrier in carriers(loaded.model)
        if not (isinstance(carrier, AdaptedLayer) and any(follows(a) for a in carrier.active_adapters()))
    }
    prefix = f"{loaded.model.base_model_prefix}."  # the folder of a model with a head, loaded without it
    stored = {key for file in loaded.path.glob("*.safetensors") for key in _keys(file)}
    apart = taken_apart(loaded.model)
    table, head = (f"{name}.weight" for name in tied_pair(loaded.model) or ("", ""))
    head_stored = head in stored
    if apart is None and head_stored and table in merges:  # the same weight twice, perhaps in two files
        merges[head] = merges[table]
    known = stored | {key.removeprefix(prefix) for key in stored}
    known |= {head} if apart is not None and table in stored else set()
    pieces: dict[str, torch.Tensor] = {}
    if merges.keys() - known:  # such as experts, which files hold one by one
        merges, pieces = {}, _pieces(loaded)
    kept: list[float] = []
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
            if apart is not None and table in tensors and not head_stored:
                tensors[head] = tensors[table].clone()
            for key, value in tensors.items():
                name = key if key in merges or key in pieces else key.removeprefix(prefix)
                if name in merges:
                    before, wanted = before_and_after(loaded.model, *merges.pop(name))
                elif name in pieces:
                    before, wanted = value.float(), pieces.pop(name)
                    if torch.equal(before, wanted):
                        continue
                else:
                    continue
                tensors[key] = wanted.to(DENSE_TYPES[to] if to else value.dtype)
                kept.append(kept_fraction(tensors[key].float() - before, wanted - before))
            save_tensors(temporary / source.name, tensors, header)
            if apart is not None and head in tensors:
                untie_folder(temporary, {head: source.name})
        if left := merges.keys() | pieces.keys() - {head}:
            raise FoldError(f"the folder stores these weights under other names: {', '.join(sorted(left)[:5])}; export")
        report = dense_report(kept or [1.0], size_on_disk(loaded.path))
        refuse_loss(report, lossy)
    return sized(report, path)


def _pieces(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """All merged weights in float32 under the names, and in the pieces, in which transformers saves them."""
    state = unload(loaded.model, merge=True).state_dict()
    return {name: value.float() for name, value in revert_weight_conversion(loaded.model, state).items()}


def _keys(file: Path) -> list[str]:
    with safe_open(file, "pt") as opened:
        return opened.keys()


@torch.no_grad()
def fold_classifier(loaded: LoadedModel, labels: list[str], path: Path, to: str | None, lossy: bool) -> FoldReport:
    """Write a classifier with what it learned as a folder that transformers loads, in the base's type."""
    if to not in (None, *DENSE_TYPES):
        raise FoldError(f"a transformers folder is written in {', '.join(DENSE_TYPES)}, not {to}")
    dtype = DENSE_TYPES[to] if to else stored_type(loaded.path)
    pairs = (before_and_after(loaded.model, *carrier) for carrier in carriers(loaded.model))
    kept = [kept_fraction(wanted.to(dtype).float() - before, wanted - before) for before, wanted in pairs]
    report = dense_report(kept, size_on_disk(loaded.path))
    refuse_loss(report, lossy)
    save_classifier(unload(loaded.model, merge=True), loaded, labels, dtype, path)
    return sized(report, path)


def before_and_after(model: nn.Module, path: str, carrier: Carrier) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight or parameter in float32 without its adapters, and with them."""
    if isinstance(carrier, AdaptedParameter):
        plain = plain_parameter(model, path)
        assert plain is not None
        return plain.detach().float(), carrier(plain).detach().float()
    return base_weight(carrier.base), merged_weight(carrier)
