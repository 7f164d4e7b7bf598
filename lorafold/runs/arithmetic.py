"""Adapter folders combined and reduced: read, checked against each other, computed with, and written as one folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafold.adapters.arithmetic import combine, combine_tensors
from lorafold.adapters.lowrank import LowRank, Reduced, reduced, reduced_dense
from lorafold.config import CombineConfig, RankConfig
from lorafold.config.arithmetic import FACTORWISE
from lorafold.errors import AdapterError, ConfigError, FormatError, bullet_list
from lorafold.models.adapter_files import CONFIG
from lorafold.models.adapter_updates import (
    Place,
    StoredAdapter,
    Update,
    as_table,
    divisors,
    expanded,
    read_updates,
    shape_of,
    write_updates,
)
from lorafold.models.load import LoadedModel, load
from lorafold.runs.folder import ADAPTER

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outcome:
    """An adapter that was computed, not written yet.

    Attributes:
        like: whose method, base and hash it has.
        updates: its updates.
        energies: place -> (kept, total) sum of squared singular values, where something was cut off.
    """

    like: StoredAdapter
    updates: Mapping[Place, Update]
    energies: Mapping[Place, tuple[float, float]] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it as an adapter folder.

        Raises:
            OutputError: it cannot be written.
        """
        write_updates(folder, self.like, self.updates)

    @property
    def share(self) -> float:
        """Share of all layers' energy that is left; 1 where nothing was cut off."""
        total = sum(total for _, total in self.energies.values())
        return sum(kept for kept, _ in self.energies.values()) / total if total else 1.0

    def describe(self) -> str:
        """One sentence."""
        layers = len({place.layer for place in self.updates})
        ranks = [update.rank for update in self.updates.values() if isinstance(update, LowRank)]
        kind = {"lora": "LoRA", "qa-lora": "QA-LoRA"}[self.like.spec.method]
        least, most = min(ranks, default=0), max(ranks, default=0)
        rank = "all offsets" if not ranks else f"rank {most}" if least == most else f"ranks {least} to {most}"
        text = f"{kind}, {layers} layers, {rank}"
        if self.energies:
            worst = min(self.energies, key=lambda place: _share(self.energies[place]))
            text += f"; {self.share:.2%} of the energy is left ({_share(self.energies[worst]):.2%} in {worst.layer})"
        return text


def _share(energies: tuple[float, float]) -> float:
    kept, total = energies
    return kept / total if total else 1.0


def combine_adapters(folders: Sequence[Path], config: CombineConfig, base: str | None, say: Say) -> Outcome:
    """The weighted combination of adapter or run folders.

    Args:
        base: model, needed where LoRA meets QA-LoRA, or offsets learned directly meet factors; None: the one that the
            first QA-LoRA adapter names.
        say: what the user is told on the way.

    Raises:
        ConfigError: there is not one weight for each adapter.
        AdapterError: folders are damaged, or do not go together; all faults are named.
    """
    if len(config.weights) != len(folders):
        raise ConfigError(f"there are {len(folders)} adapters and {len(config.weights)} weights; give one for each")
    adapters = _read(folders)
    _refuse(adapters, config)
    bases = _Base(base, next((a for a in adapters if a.spec.method == "qa-lora"), adapters[0]))
    if len({adapter.spec.method for adapter in adapters}) > 1:
        say("LoRA meets QA-LoRA: the latter is expanded to an ordinary LoRA, so the result has no exact fold")
        adapters = [
            expanded(adapter, bases.loaded(), f"adapter{i}") if adapter.spec.method == "qa-lora" else adapter
            for i, adapter in enumerate(adapters)
        ]
        _refuse(adapters, config)
    if any(_tables(adapter) for adapter in adapters):
        adapters = [adapter if _tables(adapter) else _tabled(adapter, bases.loaded()) for adapter in adapters]
    generator = torch.Generator().manual_seed(config.seed)
    summed = replace(config, combination="cat", r=None) if config.combination == "svd" else config
    like = next((adapter for adapter in adapters if adapter.base_hash), adapters[0])
    updates: dict[Place, Update] = {}
    ranks: dict[Place, int] = {}
    for place in dict.fromkeys(place for adapter in adapters for place in adapter.updates):
        present = [(a.updates[place], w) for a, w in zip(adapters, config.weights, strict=True) if place in a.updates]
        updates[place] = _combined(present, summed, generator)
        ranks[place] = config.r or max(u.rank if isinstance(u, LowRank) else min(u.shape) for u, _ in present)
    if config.combination != "svd":
        return Outcome(like, updates)
    return _reduced(replace(like, updates=updates), {place: RankConfig(rank) for place, rank in ranks.items()}, bases)


def _combined(present: list[tuple[Update, float]], config: CombineConfig, generator: torch.Generator) -> Update:
    weights = [weight for _, weight in present]
    factors = [update for update, _ in present if isinstance(update, LowRank)]
    if factors:
        return combine(factors, weights, config, generator)
    return combine_tensors([u for u, _ in present if isinstance(u, Tensor)], weights, config, generator)


def reduce_adapter(folder: Path, size: RankConfig, base: str | None) -> Outcome:
    """An adapter in fewer ranks: of every layer the best approximation of its update.

    Args:
        base: model, needed for offsets that were learned directly; None: the one that the adapter names.

    Raises:
        AdapterError: the folder is damaged, or its base is needed and not there.
    """
    (adapter,) = _read([folder])
    return _reduced(adapter, dict.fromkeys(adapter.updates, size), _Base(base, adapter))


def _reduced(adapter: StoredAdapter, sizes: Mapping[Place, RankConfig], bases: _Base) -> Outcome:
    p = divisors(adapter, bases.loaded()) if _tables(adapter) else {}
    results: dict[Place, Reduced] = {}
    for place, update in adapter.updates.items():
        if isinstance(update, LowRank):
            results[place] = reduced(update, sizes[place])
        else:  # D = B A / p
            results[place] = reduced_dense(update.double() * p[place.layer], sizes[place])
    energies = {place: (result.kept, result.total) for place, result in results.items()}
    return Outcome(adapter, {place: result.update for place, result in results.items()}, energies)


class _Base:
    """The base model of adapters, loaded when it is asked for."""

    def __init__(self, model: str | None, adapter: StoredAdapter):
        self._model = model or adapter.base
        self._loaded: LoadedModel | None = None

    def loaded(self) -> LoadedModel:
        if self._loaded is None:
            try:
                self._loaded = load(self._model)
            except FormatError as error:
                raise AdapterError(
                    f"the group size of the base is needed here, and it cannot be loaded; name it with --base: {error}"
                ) from error
        return self._loaded


def adapter_folder(path: Path) -> Path:
    """The adapter folder that a path means; a run folder stands for its adapter."""
    return path if (path / CONFIG).exists() or not (path / ADAPTER).is_dir() else path / ADAPTER


def _read(folders: Sequence[Path]) -> list[StoredAdapter]:
    results = [_tried(folder) for folder in folders]
    faults = [result for result in results if isinstance(result, str)]
    if faults:
        raise AdapterError("\n".join(faults))
    return [result for result in results if isinstance(result, StoredAdapter)]


def _tried(folder: Path) -> StoredAdapter | str:
    try:
        return read_updates(adapter_folder(folder))
    except AdapterError as error:
        return str(error)


def _tables(adapter: StoredAdapter) -> bool:
    return any(isinstance(update, Tensor) for update in adapter.updates.values())


def _tabled(adapter: StoredAdapter, base: LoadedModel) -> StoredAdapter:
    p = divisors(adapter, base)
    return replace(adapter, updates={place: as_table(u, p[place.layer]) for place, u in adapter.updates.items()})


def _refuse(adapters: Sequence[StoredAdapter], config: CombineConfig) -> None:
    """Refuse adapters that do not go together, with every reason."""
    faults = []
    hashes = {a.base_hash: a for a in adapters if a.base_hash}
    if len(hashes) > 1:
        bases = ", ".join(f"{a.folder} on {a.base} ({sha256[:12]}...)" for sha256, a in hashes.items())
        faults.append(f"they were trained on different base weights: {bases}")
    grouped = [a for a in adapters if a.spec.method == "qa-lora"]
    for option in ("adapt", "k_quants"):
        values = {str(getattr(a.spec, option)): a for a in grouped}
        if len(values) > 1:
            faults.append(f"{option} differs: " + ", ".join(f"{v} in {a.folder}" for v, a in values.items()))
    if len(grouped) < len(adapters):
        faults += [f"{a.folder} learns scales, so it is no LoRA" for a in grouped if a.spec.adapt != "offset"]
    faults += [] if config.union else _missing(adapters)
    for method in ("lora", "qa-lora"):
        faults += _mismatched([a for a in adapters if a.spec.method == method], config)
    if faults:
        listing = bullet_list(faults[:12] + ([f"and {len(faults) - 12} more"] if len(faults) > 12 else []))
        raise AdapterError(f"these adapters cannot be combined:\n{listing}")


def _missing(adapters: Sequence[StoredAdapter]) -> list[str]:
    layers = {place.layer: None for a in adapters for place in a.updates}
    faults = []
    for adapter in adapters:
        own = {place.layer for place in adapter.updates}
        absent = [layer for layer in layers if layer not in own]
        if absent:
            names = ", ".join(absent[:3]) + (", ..." if len(absent) > 3 else "")
            faults.append(f"{adapter.folder} lacks {len(absent)} layers of the others ({names}); see --union")
    return faults


def _mismatched(adapters: Sequence[StoredAdapter], config: CombineConfig) -> list[str]:
    """Layers whose shapes differ, or whose ranks do where factors are combined one by one."""
    shapes: dict[Place, dict[tuple[int, int], Path]] = defaultdict(dict)
    ranks: dict[Place, dict[int, Path]] = defaultdict(dict)
    for adapter in adapters:
        for place, update in adapter.updates.items():
            shapes[place].setdefault(shape_of(update), adapter.folder)
            if isinstance(update, LowRank):
                ranks[place].setdefault(update.rank, adapter.folder)
    faults = [f"{place.layer} differs in shape: {_each(s)}" for place, s in shapes.items() if len(s) > 1]
    if config.combination in FACTORWISE and not any(_tables(a) for a in adapters):
        uneven = {place: r for place, r in ranks.items() if len(r) > 1}
        if uneven:
            place = next(iter(uneven))
            faults.append(
                f"ranks differ in {len(uneven)} layers, such as {place.layer}: {_each(uneven[place])}; "
                f"{config.combination} needs equal ones: use cat or svd, or bring them to one rank with reduce"
            )
    return faults


def _each(values: Mapping[Any, Path]) -> str:
    return ", ".join(f"{value} in {folder}" for value, folder in values.items())
