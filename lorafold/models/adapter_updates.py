"""Adapter folders as updates, layer by layer, without the model: what arithmetic needs to read and write.

Of a layer there is one update of the weight (LoRA) or of the offsets (QA-LoRA), and of an adapter that learns scales
another one of these. QA-LoRA's factors act on the groups of a row; all adapters on one base have the same pooling
divisor p = sqrt(group) (adapters/group.py), so their factors combine like those of LoRA. Offsets learned directly are
the table D [O, G]; with factors,  D = (s / p) B A.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorafold.adapters.lowrank import LowRank, padded
from lorafold.adapters.targets import linear_layers
from lorafold.config import FULL, METHODS, AdapterSpec
from lorafold.errors import AdapterError, bullet_list
from lorafold.models.adapter_files import POOLING, load_adapter, read_spec, read_tensors, write_adapter_folder
from lorafold.models.exports import lora_pairs
from lorafold.models.load import LoadedModel

_PREFIX = "base_model.model."
_KEY = re.compile(rf"{re.escape(_PREFIX)}(.+)\.(?:(lora|scale)_([AB])(?:\.weight)?|(offset|scale)_delta)")

_WHOLE, _TABLE = "a module trained whole, such as a head, is no update of low rank", "an adapter of an embedding"
_CANNOT = {"weight": _WHOLE, "bias": _WHOLE, "lora_embedding_A": _TABLE, "lora_embedding_B": _TABLE}


class Place(NamedTuple):
    """What is updated: `layer` by name, and of it the `part`: `lora` (weight or offsets) or `scale`."""

    layer: str
    part: str


Update = LowRank | Tensor  # factors, or a table [O, G] of offsets or scales learned directly


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter folder that was read.

    Attributes:
        folder: where it lies.
        spec: what it states.
        updates: place -> update.
        base: path of the base model, as the folder names it.
        base_hash: of the base weights it was trained on; None where the folder does not say (PEFT).
        task: what PEFT calls the task of the model.
    """

    folder: Path
    spec: AdapterSpec
    updates: Mapping[Place, Update]
    base: str
    base_hash: str | None
    task: str = "CAUSAL_LM"


def read_updates(folder: Path) -> StoredAdapter:
    """Read an adapter folder, ours, PEFT's or MLX's.

    Raises:
        AdapterError: it is none, uses what is not supported, or its tensors make no updates; all faults are named.
    """
    spec, config = read_spec(folder)
    if METHODS[spec.method].whole:
        raise AdapterError(
            f"{folder} holds weights trained with --method {spec.method} and no adapter; lorafold fold makes a model "
            "of them, and lorafold adapters extract an adapter of that"
        )
    tensors, header = read_tensors(folder)
    faults = [] if tensors else ["it holds no tensors"]
    if spec.method == "qa-lora" and header.get("pooling_divisor") != POOLING:
        faults.append(f"its pooling divisor is {header.get('pooling_divisor')}, here it is {POOLING}")
    updates = _updates(tensors, spec, config, faults)
    if faults:
        raise AdapterError(f"{folder} is no adapter that can be computed with:\n" + bullet_list(faults))
    base = str(config.get("base_model_name_or_path"))
    task = config.get("task_type") or "CAUSAL_LM"
    return StoredAdapter(folder, spec, updates, base, header.get("base_weights_sha256"), task)


def _updates(
    tensors: Mapping[str, Tensor], spec: AdapterSpec, config: Mapping[str, Any], faults: list[str]
) -> dict[Place, Update]:
    """The updates that tensors make; what is wrong is added to `faults`."""
    updates: dict[Place, Update] = {}
    factors: dict[Place, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if not match or (match[4] is not None) != (spec.r == FULL):
            why = _CANNOT.get(key.rpartition(".")[2])
            faults.append(f"unexpected tensor {key}" + (f" ({why}: nothing is computed with these)" if why else ""))
        elif value.dim() != 2 or not torch.isfinite(value).all():
            faults.append(f"{key} is no matrix of finite numbers")
        elif match[4]:
            updates[Place(match[1], "scale" if match[4] == "scale" else "lora")] = value.float()
        else:
            factors.setdefault(Place(match[1], match[2]), {})[match[3]] = value.float()
    for place, parts in factors.items():
        if len(parts) < 2:
            faults.append(f"{place.layer} has no {place.part}_{'B' if 'A' in parts else 'A'}")
            continue
        rank = _pattern(config, "rank_pattern", place.layer, spec.r)
        if {parts["A"].shape[0], parts["B"].shape[1]} != {rank}:
            shapes = f"{list(parts['A'].shape)} and {list(parts['B'].shape)}"
            faults.append(f"{place.layer} has factors {shapes}, and its rank is to be {rank}")
            continue
        alpha = _pattern(config, "alpha_pattern", place.layer, spec.alpha)
        scaling = alpha / (math.sqrt(rank) if spec.use_rslora else rank)
        updates[place] = LowRank(parts["A"], parts["B"], scaling)
    return dict(sorted(updates.items(), key=lambda item: _natural(item[0])))


def _natural(place: Place) -> list[tuple[int, str]]:
    """So that layer 2 comes before layer 10."""
    parts = re.findall(r"\d+|\D+", f"{place.layer}.{place.part}")
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _pattern(config: Mapping[str, Any], key: str, layer: str, default: Any) -> Any:
    """What PEFT's `rank_pattern` or `alpha_pattern` says of a layer."""
    patterns = config.get(key) or {}
    return next((n for name, n in patterns.items() if re.match(rf"(.*\.)?({name})$", layer)), default)


def expanded(stored: StoredAdapter, base: LoadedModel, name: str) -> StoredAdapter:
    """A QA-LoRA adapter as the ordinary LoRA it amounts to, see `lora_pairs`; it is put on the base under a name.

    Raises:
        AdapterError: it learns scales, so it is no LoRA, or it does not fit the base.
    """
    load_adapter(base, stored.folder, name)
    pairs = lora_pairs(base, name)
    updates = {place: LowRank(*pairs[place.layer]) for place in stored.updates}
    return replace(stored, spec=AdapterSpec("lora"), updates=updates)


def divisors(stored: StoredAdapter, base: LoadedModel) -> dict[str, float]:
    """p of every layer: the square root of the number of weights that share an offset.

    Raises:
        AdapterError: the base is another, or has no such layers.
    """
    faults = []
    if stored.base_hash not in (None, base.weights_hash()):
        faults.append("it was trained on other base weights")
    layers, found = linear_layers(base.model), {}
    for place, update in stored.updates.items():
        groups = shape_of(update)[1]
        if place.layer not in layers:
            faults.append(f"no layer {place.layer}")
        elif layers[place.layer].in_features % groups:
            faults.append(f"{place.layer} has {layers[place.layer].in_features} inputs, which are no {groups} groups")
        else:
            found[place.layer] = math.sqrt(layers[place.layer].in_features // groups)
    if faults:
        raise AdapterError(f"the adapter {stored.folder} does not fit {base.path}:\n" + bullet_list(faults[:12]))
    return found


def as_table(update: Update, divisor: float) -> Tensor:
    """D = (s / p) B A [O, G] of an update of offsets or scales."""
    return update if isinstance(update, Tensor) else update.dense() / divisor


def shape_of(update: Update) -> tuple[int, int]:
    """(O, I), or (O, G) of a group adapter."""
    return update.shape if isinstance(update, LowRank) else (update.shape[0], update.shape[1])


def write_updates(folder: Path, like: StoredAdapter, updates: Mapping[Place, Update]) -> None:
    """Write updates as an adapter folder: for LoRA one that PEFT reads, for QA-LoRA one that `lorafold` does.

    Scalings other than 1 go into B; ranks that differ stand in `rank_pattern`, with an `alpha_pattern` beside it.

    Args:
        like: whose method, kind, base and hash the folder states.

    Raises:
        OutputError: it cannot be written.
    """
    ranks: dict[str, int] = {}
    for place, update in updates.items():
        if isinstance(update, LowRank):
            ranks[place.layer] = max(update.rank, ranks.get(place.layer, 0))  # offsets and scales have one rank
    tensors: dict[str, Tensor] = {}
    for place, update in updates.items():
        key = f"{_PREFIX}{place.layer}.{place.part}"
        if isinstance(update, Tensor):
            tensors[f"{_PREFIX}{place.layer}.{'offset' if place.part == 'lora' else 'scale'}_delta"] = update
        else:
            factors = padded(update, ranks[place.layer])
            ending = ".weight" if place.part == "lora" else ""
            tensors[f"{key}_A{ending}"], tensors[f"{key}_B{ending}"] = factors.a, factors.b * factors.scaling
    header = {"format": "pt"} | ({"base_weights_sha256": like.base_hash} if like.base_hash else {})
    if like.spec.method == "qa-lora":
        header["pooling_divisor"] = POOLING
    config = _config(like, sorted({place.layer for place in updates}), ranks)
    write_adapter_folder(folder, config, {k: v.float().contiguous() for k, v in tensors.items()}, header)


def _config(like: StoredAdapter, layers: list[str], ranks: Mapping[str, int]) -> dict[str, Any]:
    """alpha = r everywhere, so that readers which pass over the patterns scale by 1 as well; no ranks: r = full."""
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    unusual = {layer: rank for layer, rank in ranks.items() if rank != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA" if like.spec.method == "lora" else "QA_LORA",
        "task_type": like.task,
        "base_model_name_or_path": like.base,
        "r": usual if ranks else FULL,
        "lora_alpha": usual,
        "rank_pattern": unusual,
        "alpha_pattern": dict(unusual),
        "lora_dropout": 0.0,
        "target_modules": layers,
        "use_rslora": False,
        "bias": "none",
        "inference_mode": True,
    }
    if like.spec.method == "qa-lora":
        config |= {"adapt": like.spec.adapt, "k_quants": like.spec.k_quants}
    return config
