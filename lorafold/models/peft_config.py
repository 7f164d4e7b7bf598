"""What an adapter's configuration in PEFT's terms says, and what is wrong with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lorafold.config import METHODS, AdapterSpec

KINDS = {
    "LORA": "lora",
    "QA_LORA": "qa-lora",
    "VERA": "vera",
    "FULL": "full",  # from here on names of our own
    "LAST_LAYERS": "last-layers",
    "HEAD": "head",
}
_UNSUPPORTED = {  # PEFT options that change what the tensors mean -> the value under which they change nothing
    "use_qalora": False,
    "lora_bias": False,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
}
_PLAIN_INIT = (True, False, None, "kaiming", "gaussian", "orthogonal", "eva")  # ways that leave the base as it is


def unsupported(config: Mapping[str, Any]) -> list[str]:
    """What a configuration uses that is not known here."""
    kind = config.get("peft_type")
    faults = [] if str(kind) in KINDS else [f"peft_type {kind!r} ({', '.join(KINDS)} are)"]
    for key, neutral in _UNSUPPORTED.items():
        if config.get(key, neutral) not in (neutral, None, [], {}):
            faults.append(f"{key}: {config[key]!r}")
    if config.get("init_lora_weights", True) not in _PLAIN_INIT:
        faults.append(f"init_lora_weights: {config['init_lora_weights']!r}, which changed the base weights as well")
    return faults


def malformed(config: Mapping[str, Any]) -> list[str]:
    """What in a configuration has a type or value that no adapter has."""
    faults: list[str] = []
    if METHODS[KINDS[config["peft_type"]]].whole:
        return faults
    if config.get("r") != "full" and type(config.get("r")) is not int:
        faults.append(f"r is {config.get('r')!r}, not a whole number")
    alpha = config.get("lora_alpha")
    if config.get("peft_type") != "VERA" and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
        faults.append(f"lora_alpha is {alpha!r}, not a number")
    faults += [
        f"{key} is {config[key]!r}, neither true nor false"
        for key in ("use_dora", "use_rslora", "ensure_weight_tying")
        if config.get(key) not in (True, False, None)
    ]
    for key in ("target_modules", "exclude_modules"):
        value = config.get(key)
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not (names or value is None or (isinstance(value, str) and _is_regex(value))):
            faults.append(f"{key} is {value!r}, neither a list of names nor a regular expression")
    numbers = config.get("layers_to_transform")
    numbers = numbers if isinstance(numbers, list) else [] if numbers is None else [numbers]
    if not all(type(n) is int for n in numbers):
        faults.append(f"layers_to_transform is {config['layers_to_transform']!r}, not numbers of blocks")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(_is_regex(name) for name in value):
            faults.append(f"{key} is {value!r}, not a mapping from expressions to numbers")
        elif not all(type(n) in (int, float) and n > 0 for n in value.values()):
            faults.append(f"{key} is {value!r}, and its numbers must be positive")
        elif key == "rank_pattern" and not all(type(n) is int for n in value.values()):
            faults.append(f"{key} is {value!r}, and ranks are whole numbers")
    return faults


def _is_regex(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def spec_of(config: Mapping[str, Any]) -> AdapterSpec:
    """The spec that a checked configuration states; which layers are meant is left to the tensors.

    Raises:
        ConfigError, KeyError, TypeError: it is incomplete or impossible.
    """
    method = KINDS[config["peft_type"]]
    whole = tuple(config.get("modules_to_save") or ())
    if METHODS[method].whole:
        own = {"layers": config.get("layers", 2), "modules_to_save": whole}
        return AdapterSpec(method, **{k: own[k] for k in METHODS[method].options})  # type: ignore[arg-type]
    tied = bool(config.get("ensure_weight_tying"))
    if method == "vera":
        options = {"lora_dropout": config.get("vera_dropout", 0.0), "d_initial": config.get("d_initial", 0.1)}
        return AdapterSpec("vera", config["r"], **options, modules_to_save=whole)
    spec = {
        "method": method,
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
        "rank_pattern": config.get("rank_pattern") or {},
        "alpha_pattern": config.get("alpha_pattern") or {},
    }
    if method == "qa-lora":
        spec |= {"adapt": config.get("adapt", "offset"), "k_quants": config.get("k_quants", "promote")}
        return AdapterSpec(**spec, modules_to_save=whole, ensure_weight_tying=tied)
    return AdapterSpec(
        **spec,
        ensure_weight_tying=tied,
        bias=config.get("bias", "none"),
        modules_to_save=whole,
        target_parameters=tuple(config.get("target_parameters") or ()),
    )
