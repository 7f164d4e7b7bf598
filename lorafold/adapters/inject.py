"""Put adapters on a model's layers, and find them again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafold.adapters.adapted import (
    AdaptedLayer,
    Adapter,
    adapt_parameter,
    carriers,
    plain_parameter,
    refuse_other_uses,
    set_active,
    stored_transposed,
)
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.group_bases import Promotions, prepare_group_bases, unsuitable
from lorafold.adapters.lora import LoRA, VeRA
from lorafold.adapters.parameters import ParameterDelta, ParameterLoRA, ParameterValue
from lorafold.adapters.sites import ConvSite, EmbeddingSite, LinearSite, site_of
from lorafold.adapters.start import begin
from lorafold.adapters.targets import ALL_LINEAR, adaptable, find_parameters, find_targets, is_linear
from lorafold.adapters.tied import follow, pair_to_share, tied_pair
from lorafold.adapters.whole import whole_parameters
from lorafold.config import METHODS, AdapterSpec
from lorafold.errors import AdapterError, bullet_list
from lorafold.quant.codecs import CODECS
from lorafold.quant.linear import QuantEmbedding, QuantLinear

VERA_SEED = 0  # PEFT's projection_prng_key
_MULTIHEAD = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")


@dataclass
class Injection:
    """What `inject` did.

    Attributes:
        modules: names of the adapted layers and parameters.
        promoted: packed layers whose format was changed first.
        frozen: names of layers that all-linear means and that the method cannot adapt -> their type.
        apart: names of embedding and head, where these have one weight and the adapter takes them apart.
        trainable: number of trained parameters.
    """

    modules: list[str]
    promoted: Promotions = field(default_factory=Promotions)
    frozen: dict[str, str] = field(default_factory=dict)
    apart: tuple[str, str] | None = None
    trainable: int = 0

    def describe(self) -> str:
        """What happens to the matrices of each type, for the user."""
        lines = [f"{self.trainable:,} trainable parameters in {len(self.modules)} layers"]
        for (old, new), count in Counter(self.promoted.codecs.values()).items():
            same = "same weights" if not CODECS[old].affine else f"weights within {self.promoted.error:.3f} of a step"
            lines.append(f"{count} matrices promoted from {old} to {new} ({same})")
        if self.promoted.added_bytes:
            lines[-1] += f", {self.promoted.added_bytes:,} bytes more on disk"
        for kind, count in Counter(self.frozen.values()).items():
            learned = self.promoted.learned
            lines.append(f"{count} matrices of type {kind} stay as they are: it stores no {learned} to learn")
        if self.apart:
            lines.append(
                f"{self.apart[0]} and {self.apart[1]} have one weight and are adapted apart, so folding writes a head "
                "of its own (--ensure-weight-tying updates both alike)"
            )
        return "; ".join(lines)


def inject(model: nn.Module, spec: AdapterSpec, name: str = "default") -> Injection:
    """Add an adapter to every target and make it the active one; base weights stay frozen.

    Packed matrices without a float16 offset that QA-LoRA targets are promoted to the format that holds the same weights
    with one (Q4_0 and Q4_K to Q4_1, Q5_0 and Q5_K to Q5_1). Of a file of mixed types, `all-linear` leaves matrices
    frozen whose type stores no offset; named targets of such a type are refused.

    Raises:
        AdapterError: a target matches nothing, or has a format that the method cannot adapt.
    """
    layers = adaptable(model, spec.method)
    adapted = not METHODS[spec.method].whole
    targets = find_targets(model, spec) if adapted and spec.target_modules else []
    whole = whole_parameters(model, spec, targets)
    targets = _not_whole(targets, whole, spec)
    pair = _shared_pair(model, targets, whole) if spec.ensure_weight_tying else None
    ends = tied_pair(model)
    result = Injection(targets)
    if spec.method == "qa-lora" and ALL_LINEAR in spec.target_modules:
        inner = [path for path in targets if is_linear(path, layers[path])]
        result.frozen = {path: kind for path in inner if (kind := unsuitable(layers[path], spec))}
        if len(result.frozen) < len(targets):
            targets = [path for path in targets if path not in result.frozen]
    parameters = find_parameters(model, spec)
    attention = [path for path in targets if isinstance(layers[path], nn.MultiheadAttention)]
    for path in attention:
        parameters += [f"{path}.{part}" for part in _MULTIHEAD if _parameter(layers[path], part) is not None]
    plain = [path for path in targets if path not in attention]
    _refuse_misfits({path: layers[path] for path in plain}, parameters, spec)
    check_name(model, name, (*targets, *parameters, *whole, *(pair or ())))
    every_use = [path for path in whole if not adapted or (pair is not None and path == f"{pair[0]}.weight")]
    for path in whole:
        refuse_other_uses(model, path, path in every_use)
    if spec.init_lora_weights == "eva":
        raise AdapterError("init_lora_weights eva begins with what layers see of rows, which lorafold train gives them")
    if spec.target_r is not None:
        raise AdapterError("target_r moves ranks while training, which lorafold train does")
    if spec.method == "qa-lora":  # last of what may refuse, since it changes the base
        result.promoted = prepare_group_bases(layers, targets, spec)
    made: dict[str, nn.Module] = {}
    shared = _vera_matrices([layers[path] for path in plain], spec)
    for path in plain:
        made[path] = make_adapter(layers[path], spec.for_layer(path), shared)
    for path in parameters:
        made[path] = make_parameter_adapter(model, path, spec.for_layer(path))
    for path in whole:
        made[path] = make_whole(model, path, spec)
    if pair is not None and pair[0] in made:
        made[pair[1]] = follow(model, pair, made[pair[0]], spec)
    for path, adapter in made.items():
        if isinstance(adapter, LoRA | GroupAdapter):
            attach(model, path, adapter, name)
        else:
            attach_parameter(model, path, adapter, name, path in every_use)  # type: ignore[arg-type]
    set_active(model, name)
    result.modules = list(made)
    if ends and pair is None and adapted and any(end in made or f"{end}.weight" in made for end in ends):
        result.apart = ends
    result.trainable = sum(p.numel() for adapter in made.values() for p in adapter.parameters())
    return result


def _shared_pair(model: nn.Module, targets: list[str], whole: list[str]) -> tuple[str, str]:
    pair = pair_to_share(model)
    if pair[0] not in targets and f"{pair[0]}.weight" not in whole:
        raise AdapterError(
            f"ensure_weight_tying shares an update of {pair[0]} and {pair[1]}, and neither is named; add {pair[0]} to "
            "target_modules or modules_to_save"
        )
    return pair


def _not_whole(targets: list[str], whole: list[str], spec: AdapterSpec) -> list[str]:
    """Targets but for layers whose weight is trained whole, which `all-linear` leaves out and names may not mean."""
    both = [path for path in targets if f"{path}.weight" in whole]
    if both and ALL_LINEAR not in spec.target_modules:
        raise AdapterError(f"{both[0]} is among target_modules and is trained whole as well; name it in one of the two")
    return [path for path in targets if path not in both]


def _parameter(module: nn.Module, dotted: str) -> Tensor | None:
    owner, _, name = dotted.rpartition(".")
    return getattr(module.get_submodule(owner), name, None)


def _refuse_misfits(layers: dict[str, nn.Module], parameters: list[str], spec: AdapterSpec) -> None:
    """What an option cannot do on the layers that were found, all at once."""
    faults = []
    tables = [path for path, base in layers.items() if isinstance(base, nn.Embedding | QuantEmbedding)]
    if spec.ensure_weight_tying and spec.use_dora and tables:
        faults.append("use_dora learns a length for each column of an embedding, and the head's outputs are its rows")
    odd_start = spec.init_lora_weights not in ("kaiming", "gaussian")
    for path, base in layers.items():
        site, rank = (site_of(base), spec.for_layer(path).r) if spec.method != "qa-lora" else (LinearSite(base), 1)
        if isinstance(site, ConvSite) and isinstance(rank, int) and rank % site.base.groups:
            faults.append(f"{path} has {site.base.groups} groups of channels, among which r = {rank} does not divide")
        if isinstance(site, ConvSite | EmbeddingSite) and (odd_start or spec.method == "vera"):
            option = "method vera" if spec.method == "vera" else f"init_lora_weights {spec.init_lora_weights}"
            faults.append(f"{path} is a {type(base).__name__}, and {option} is for linear layers")
    options = {
        "use_dora": spec.use_dora,
        "lora_dropout": spec.lora_dropout > 0,
        f"init_lora_weights {spec.init_lora_weights}": spec.init_lora_weights != "kaiming",
        "method vera": spec.method == "vera",
    }
    faults += [
        f"{path} is no layer of its own, so {o} cannot act on it"
        for o, on in options.items()
        if on
        for path in parameters
    ]
    if faults:
        raise AdapterError("these targets and options do not go together:\n" + bullet_list(faults[:12]))


def check_name(model: nn.Module, name: str, paths: Iterable[str] = ()) -> None:
    """Refuse a name for an adapter that no module can have, or that is taken at one of its places.

    Raises:
        AdapterError: saying which.
    """
    if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
        raise AdapterError(f"an adapter cannot be named {name!r}; use letters, digits, _ and -")
    if "" in paths:
        raise AdapterError("the module itself is the layer to adapt; put it into another one, such as nn.Sequential")
    held = dict(carriers(model))
    if any(path in held and name in held[path].adapters for path in paths):
        raise AdapterError(f"the model already carries an adapter named {name!r}")


def attach(model: nn.Module, path: str, adapter: Adapter, name: str = "default") -> None:
    """Put one adapter on the layer at `path` and make it the active one there.

    Raises:
        AdapterError: the layer already carries an adapter of this name.
    """
    module = model.get_submodule(path)
    if not isinstance(module, AdaptedLayer):
        module = AdaptedLayer(module)
        model.set_submodule(path, module)
    _refuse_second(module, name)
    module.adapters[name] = adapter.to(_device(module.base)).train(module.training)
    module.wanted = (name,)


def attach_parameter(
    model: nn.Module,
    path: str,
    adapter: ParameterLoRA | ParameterDelta | ParameterValue,
    name: str = "default",
    tied: bool = False,
) -> None:
    """Put one adapter on a parameter and make it the active one there.

    Args:
        tied: also where the model uses the same parameter under another name.

    Raises:
        AdapterError: the parameter already carries an adapter of this name.
    """
    carrier = adapt_parameter(model, path, tied)
    _refuse_second(carrier, name)
    carrier.adapters[name] = adapter.to(carrier.device).train(carrier.training)
    carrier.wanted = (name,)


def make_parameter_adapter(model: nn.Module, path: str, spec: AdapterSpec) -> ParameterLoRA:
    """LoRA for one parameter."""
    parameter = plain_parameter(model, path)
    assert parameter is not None
    assert isinstance(spec.r, int)
    return ParameterLoRA(parameter.shape, stored_transposed(model, path), spec.r, spec.scaling)


def make_whole(model: nn.Module, path: str, spec: AdapterSpec) -> ParameterDelta | ParameterValue:
    """What trains one parameter whole: beside adapters an update, in a method without them a new value."""
    parameter = plain_parameter(model, path)
    assert parameter is not None
    return ParameterValue(parameter) if METHODS[spec.method].whole else ParameterDelta(parameter.shape)


def _refuse_second(carrier: nn.Module, name: str) -> None:
    if name in carrier.adapters:  # type: ignore[operator]
        raise AdapterError(f"the model already carries an adapter named {name!r}")


def _device(base: nn.Module) -> torch.device:
    return next((t.device for t in (*base.parameters(), *base.buffers())), torch.device("cpu"))


def make_adapter(
    base: nn.Module, spec: AdapterSpec, shared: tuple[Tensor, Tensor] | None = None, fresh: bool = True
) -> Adapter:
    """An adapter for one layer.

    Args:
        shared: the matrices that all layers of vera share.
        fresh: begin as `init_lora_weights` says; otherwise A and B are left as they are, to be filled.
    """
    if spec.method == "qa-lora":
        assert isinstance(base, QuantLinear | QuantEmbedding)
        size, (out, width) = base.packed.format.group_size, base.shape
        return GroupAdapter(width // size, out, size, spec.r, spec.scaling, spec.adapt)
    assert isinstance(spec.r, int)
    site = site_of(base)
    if spec.method == "vera":
        shared = shared or _vera_matrices([base], spec)
        assert shared is not None
        return VeRA(site, spec.r, shared, spec.d_initial, spec.lora_dropout)
    with _device(base):
        adapter = LoRA(site, spec.r, spec.scaling, spec.lora_dropout, spec.use_dora)
    if fresh and not adapter.learned()[0].is_meta:
        begin(adapter, spec.init_lora_weights)
    return adapter


def _vera_matrices(bases: list[nn.Module], spec: AdapterSpec) -> tuple[Tensor, Tensor] | None:
    """R_A [r, widest input] and R_B [widest output, r], uniform as PEFT draws them."""
    if spec.method != "vera" or not bases:
        return None
    assert isinstance(spec.r, int)
    shapes = [site_of(base).shapes(spec.r) for base in bases]
    widest, highest = max(a[1] for a, _ in shapes), max(b[0] for _, b in shapes)
    generator = torch.Generator().manual_seed(VERA_SEED)
    drawn = []
    for shape in ((spec.r, widest), (highest, spec.r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Parameters of one adapter: `<layer>.lora_A` and so on -> tensor (not a copy)."""
    return {
        f"{path}.{key}": parameter
        for path, carrier in carriers(model)
        if name in carrier.adapters
        for key, parameter in carrier.adapters[name].named_parameters()
    }
