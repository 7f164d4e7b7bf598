"""Runs that begin from an adapter: published, of an earlier run, or the start that LoftQ has found."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lorafold.adapters.adapted import carriers
from lorafold.adapters.inject import Injection
from lorafold.adapters.targets import ALL_LINEAR
from lorafold.config import METHODS, MOVING, AdapterSpec, RunConfig
from lorafold.data.tokens import Tokens
from lorafold.errors import AdapterError, ConfigError, bullet_list
from lorafold.models.adapter_files import load_adapter, read_spec
from lorafold.models.load import LoadedModel
from lorafold.runs.eva import inject_for
from lorafold.runs.folder import ADAPTER, CONFIG
from lorafold.runs.resume import configured


def adopted(config: RunConfig, given: Collection[str] = (), resume: bool = False) -> RunConfig:
    """The run with the options of the adapter that it begins from; what all-linear means is left to the adapter.

    Args:
        given: names of options that were given, also where they have the values that count if they are not.
        resume: a run that goes on knows its adapter, wherever the one that it began from is now.

    Raises:
        AdapterError: no adapter lies there, or one that is not supported.
        ConfigError: options say something else than the adapter; all of them are named.
    """
    if config.from_adapter is None:
        return config
    folder = _folder(config.from_adapter)
    old = configured(config.output_dir) if resume and (config.output_dir / CONFIG).is_file() else None
    if old is not None and old.from_adapter in (config.from_adapter, folder):
        folder, spec, stated = old.from_adapter, old.adapter, {}
    else:
        spec, stated = read_spec(folder)
    if METHODS[spec.method].whole:
        raise ConfigError(
            f"{folder} holds a model trained by --method {spec.method}, and no adapter: fold it (lorafold fold) and "
            "train the folded model"
        )
    spec = replace(spec, **_targets(stated))
    wanted, default = config.adapter, AdapterSpec()
    said = {f.name for f in fields(spec) if f.name in given or getattr(wanted, f.name) != getattr(default, f.name)}
    said -= {"target_modules"} if wanted.target_modules == (ALL_LINEAR,) else set()
    faults = []
    for name in sorted(said - set(MOVING)):
        ours, theirs = getattr(wanted, name), getattr(spec, name)
        if name == "init_lora_weights" and ours != theirs:
            faults.append(f"{name} is {ours!r}, and the adapter has begun already")
        elif (sorted(ours) != sorted(theirs)) if isinstance(ours, tuple) else ours != theirs:
            faults.append(f"{name} is {ours!r}, and the adapter has {theirs!r}")
    if faults:
        raise ConfigError(
            f"the adapter {folder} says what it is, and these options contradict it:\n{bullet_list(faults)}\n"
            "leave them out"
        )
    moving = {name: getattr(wanted, name) for name in MOVING if name in said}
    return replace(config, from_adapter=folder, adapter=replace(spec, **moving))


def stated_options(path: Path) -> dict[str, str]:
    """Method and rank of the adapter that a run begins from, as options; none where no adapter can be read."""
    try:
        spec, _ = read_spec(_folder(path))
    except AdapterError:
        return {}  # `adopted` says it, beside everything else
    return {"method": spec.method, **({} if METHODS[spec.method].whole else {"r": str(spec.r)})}


def _folder(path: Path) -> Path:
    """Of a run folder its adapter."""
    return path / ADAPTER if (path / CONFIG).is_file() else path


def _targets(stated: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Which layers a configuration names, in the terms of `AdapterSpec`."""
    found = {}
    for name in ("target_modules", "exclude_modules", "layers_to_transform"):
        value = stated.get(name)
        if value is not None and (value or stated.get("target_parameters")):
            found[name] = tuple(sorted(value)) if isinstance(value, list) else (value,)
    return found


def adapt_for(loaded: LoadedModel, config: RunConfig, rows: Iterable[Tokens], checkpoint: Path | None) -> Injection:
    """Put the adapter of a run on its model, fresh or as it begins.

    Args:
        rows: of the training data, which EVA begins with.
        checkpoint: where the run goes on from, if it does.

    Raises:
        AdapterError: it does not fit the model; all faults are named.
    """
    if config.from_adapter is None:
        return inject_for(loaded, config.adapter.begun, rows)
    result = load_adapter(loaded, checkpoint or config.from_adapter)  # the checkpoint's, should the other have changed
    trained = [p for _, c in carriers(loaded.model) for p in c.adapters.requires_grad_(True).parameters()]
    result.trainable = sum(p.numel() for p in trained)
    return result
