"""Which layers a spec means."""

from __future__ import annotations

import re
from collections import Counter

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorafold.adapters.adapted import parameter_names, plain_modules, plain_parameter
from lorafold.adapters.sites import SITES
from lorafold.adapters.tied import pair_to_share, tied_pair, with_embedding
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, bullet_list, nearest
from lorafold.quant.linear import QuantEmbedding, QuantLinear

ALL_LINEAR = "all-linear"
HEADS = ("lm_head", "score", "classifier", "qa_outputs")  # what all-linear leaves out, as PEFT does
_LINEAR = (nn.Linear, QuantLinear, Conv1D, nn.MultiheadAttention)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | QuantLinear]:
    """All linear layers by name; an adapted layer appears as its base under its own name."""
    return {name: m for name, m in plain_modules(model).items() if isinstance(m, nn.Linear | QuantLinear)}


def matrix_layers(model: nn.Module) -> dict[str, nn.Linear | QuantLinear | Conv1D]:
    """The same and GPT-2's Conv1D, which stores the weight of a linear layer as [I, O]."""
    kinds = (nn.Linear, QuantLinear, Conv1D)
    return {name: m for name, m in plain_modules(model).items() if isinstance(m, kinds)}


def input_width(layer: nn.Linear | QuantLinear | Conv1D) -> int:
    """Number of input features of such a layer."""
    return layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.in_features


def adaptable(model: nn.Module, method: str = "lora") -> dict[str, nn.Module]:
    """What a method can adapt, by name: of qa-lora linear layers and packed tables, else all of `SITES`, attention."""
    if method == "qa-lora":
        return {
            n: m for n, m in plain_modules(model).items() if isinstance(m, nn.Linear | QuantLinear | QuantEmbedding)
        }
    kinds = (*SITES, nn.MultiheadAttention)
    found = {name: module for name, module in plain_modules(model).items() if isinstance(module, kinds)}
    attention = [f"{name}." for name, module in found.items() if isinstance(module, nn.MultiheadAttention)]
    return {name: m for name, m in found.items() if not name.startswith(tuple(attention))}


def is_linear(name: str, layer: nn.Module) -> bool:
    """Whether `all-linear` means a layer."""
    return isinstance(layer, _LINEAR) and name.rpartition(".")[2] not in HEADS


def find_targets(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Names of the layers a spec means, in model order.

    A target is `all-linear`, a name (matched whole or as the end of a dotted path), or, when it stands alone
    and is not a plain name, a regular expression matched against the whole path.

    Raises:
        AdapterError: a target matches nothing; the message lists what could be matched, with counts.
    """
    layers = adaptable(model, spec.method)
    names = list(layers)
    linear = {name for name in names if is_linear(name, layers[name])}
    chosen: set[str] = set()
    faults = []
    for target in spec.target_modules:
        lone = len(spec.target_modules) == 1
        hits = linear if target == ALL_LINEAR else {n for n in names if _matches(n, target, lone)}
        if not hits:
            faults.append(f"{target!r} matches no layer{nearest(target, _endings(names))}")
        chosen |= hits
    if faults:
        listing = ", ".join(f"{ending} ({count})" for ending, count in _endings(names).items())
        raise AdapterError("target_modules:\n" + bullet_list(faults) + f"\nlayers that can be adapted: {listing}")
    lone = len(spec.exclude_modules) == 1
    for target in spec.exclude_modules:
        if not any(_matches(n, target, lone) for n in names):
            raise AdapterError(f"exclude_modules: {target!r} matches no layer{nearest(target, _endings(names))}")
    kept = [n for n in names if n in chosen and not any(_matches(n, e, lone) for e in spec.exclude_modules)]
    if chosen and not kept:
        raise AdapterError("exclude_modules leaves no layer to adapt; exclude less")
    kept = _in_blocks(kept, spec.layers_to_transform)
    return with_embedding(kept, pair_to_share(model)) if spec.ensure_weight_tying else kept


def _in_blocks(names: list[str], numbers: tuple[int, ...]) -> list[str]:
    """The layers of blocks with these numbers; all where none are given."""
    if not numbers:
        return names
    of_block = {name: int(found[1]) for name in names if (found := re.match(r".*\.(\d+)\.", name))}
    missing = sorted(set(numbers) - set(of_block.values()))
    if missing:
        raise AdapterError(
            f"layers_to_transform: no target lies in block {', '.join(map(str, missing))}; "
            f"there are {len(set(of_block.values()))} blocks, counted from 0"
        )
    return [name for name in names if of_block.get(name) in numbers]


def _matches(name: str, target: str, lone: bool) -> bool:
    if name == target or name.endswith(f".{target}"):
        return True
    if not lone or re.fullmatch(r"[\w.]+", target):
        return False
    try:
        return re.fullmatch(target, name) is not None
    except re.error as error:
        raise AdapterError(f"{target!r} is neither a layer name nor a regular expression: {error}") from None


def _endings(names: list[str]) -> Counter[str]:
    return Counter(name.rpartition(".")[2] for name in names)


def find_parameters(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Names of the parameters that `target_parameters` means, in model order: whole, or as the end of a dotted path.

    Raises:
        AdapterError: a name matches no parameter of two or three dimensions; those there are are listed.
    """
    plain = own_parameters(model)
    found: set[str] = set()
    faults = []
    for target in spec.target_parameters:
        hits = [n for n, p in plain.items() if p.dim() in (2, 3) and (n == target or n.endswith(f".{target}"))]
        if not hits:
            deep = Counter(name.rpartition(".")[2] for name, p in plain.items() if p.dim() == 3)
            listing = f"; of three dimensions there are {', '.join(deep)}" if deep else ""
            faults.append(f"{target!r} matches no parameter of two or three dimensions{listing}")
        found |= set(hits)
    if faults:
        raise AdapterError("target_parameters:\n" + bullet_list(faults))
    pair = tied_pair(model)
    if pair is not None and f"{pair[0]}.weight" in found:
        raise AdapterError(
            f"{pair[0]}.weight serves as embedding and as head in this model; name a layer in target_modules instead: "
            f"{pair[0]}, {pair[1]}, or either with ensure_weight_tying for both"
        )
    return [name for name in plain if name in found]


def own_parameters(model: nn.Module, every: bool = False) -> dict[str, Tensor]:
    """All parameters without their adapters, by the names they had before anything was adapted.

    One with several names stands under the first, or under `every` one.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in plain_modules(model).items():
        for own in parameter_names(module):
            name = f"{path}.{own}".removeprefix(".")
            parameter = plain_parameter(model, name)
            if parameter is not None and (every or id(parameter) not in seen):
                seen.add(id(parameter))
                found[name] = parameter
    return found
