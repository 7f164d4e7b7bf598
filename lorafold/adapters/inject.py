"""Put adapters on a model's linear layers, and find them again."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, bullet_list, nearest
from lorafold.quant.codecs import CODECS, GGUF_CODECS
from lorafold.quant.ggml import Codec
from lorafold.quant.linear import QuantLinear
from lorafold.quant.weight import promote, steps_apart

ALL_LINEAR = "all-linear"
HEADS = ("lm_head",)  # what all-linear leaves out, as PEFT does
Adapter = LoRA | GroupAdapter


class AdaptedLinear(nn.Module):
    """A linear layer with named adapters; the active one takes part in the forward pass.

    Args:
        base: the frozen layer, dense or packed.
    """

    base: nn.Linear | QuantLinear

    def __init__(self, base: nn.Linear | QuantLinear):
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: str | None = None
        self._once: tuple[Tensor | None, Tensor | None] | None = None  # see `group_parameters_once`

    @property
    def adapter(self) -> Adapter | None:
        """The active adapter."""
        return self.adapters[self.active] if self.active else None  # type: ignore[return-value]

    def offset(self) -> Tensor | None:
        """Offsets [out, groups] it computes with, as its file stores them; None without a group adapter."""
        update = self.adapter.offset_update() if isinstance(self.adapter, GroupAdapter) else None
        if update is None:
            return None
        assert isinstance(self.base, QuantLinear)
        packed = self.base.packed
        return packed.format.move_offset(packed.format.offset(packed.blocks), update)

    def scale(self) -> Tensor | None:
        """Scales [out, groups] it computes with, as its file stores them; None where they are not learned."""
        update = self.adapter.scale_update() if isinstance(self.adapter, GroupAdapter) else None
        if update is None:
            return None
        assert isinstance(self.base, QuantLinear)
        packed = self.base.packed
        return packed.format.move_scale(packed.format.scale(packed.blocks), update)

    def forward(self, x: Tensor) -> Tensor:
        """Y [..., out] of X [..., in]."""
        adapter = self.adapter
        if isinstance(adapter, GroupAdapter):
            return self.base(x, *(self._once or (self.offset(), self.scale())))
        return self.base(x) if adapter is None else adapter(x, self.base)


@dataclass
class Injection:
    """What `inject` did.

    Attributes:
        modules: names of the adapted layers.
        promotions: names of layers whose format was changed first -> (old codec, new codec).
        promotion_error: largest change of a weight by a promotion, in quantization steps.
        added_bytes: bytes the promotions add to the file.
        frozen: names of layers that all-linear means and that the method cannot adapt -> their type.
        learned: what a group stores and the method learns, in words.
        trainable: number of trained parameters.
    """

    modules: list[str]
    promotions: dict[str, tuple[str, str]] = field(default_factory=dict)
    promotion_error: float = 0.0
    added_bytes: int = 0
    frozen: dict[str, str] = field(default_factory=dict)
    learned: str = "offset"
    trainable: int = 0

    def describe(self) -> str:
        """What happens to the matrices of each type, for the user."""
        lines = [f"{self.trainable:,} trainable parameters in {len(self.modules)} layers"]
        for (old, new), count in Counter(self.promotions.values()).items():
            same = "same weights" if not CODECS[old].affine else f"weights within {self.promotion_error:.3f} of a step"
            lines.append(f"{count} matrices promoted from {old} to {new} ({same})")
        if self.added_bytes:
            lines[-1] += f", {self.added_bytes:,} bytes more on disk"
        for kind, count in Counter(self.frozen.values()).items():
            lines.append(f"{count} matrices of type {kind} stay as they are: it stores no {self.learned} to learn")
        return "; ".join(lines)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | QuantLinear]:
    """All linear layers by name; an adapted layer appears as its base under its own name."""
    layers: dict[str, nn.Linear | QuantLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            layers[name] = module.base
        elif isinstance(module, nn.Linear | QuantLinear) and not name.endswith(".base"):
            layers[name] = module
    return layers


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """(name, layer) of every layer that carries adapters."""
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield name, module


@contextlib.contextmanager
def group_parameters_once(model: nn.Module) -> Iterator[None]:
    """Inside, offsets and scales of adapted layers are computed once and serve every forward pass.

    Their gradients are summed over the backward passes inside and handed on to the adapters at the end: for a step of
    several micro-batches, between which the adapters do not change.
    """
    computed: list[tuple[Tensor, Tensor]] = []
    layers = [layer for _, layer in adapted_layers(model) if isinstance(layer.adapter, GroupAdapter)]
    for layer in layers:
        pair = []
        for value in (layer.offset(), layer.scale()):
            leaf = None if value is None else value.detach().requires_grad_(value.requires_grad)
            pair.append(leaf)
            if value is not None and leaf is not None:
                computed.append((value, leaf))
        layer._once = (pair[0], pair[1])
    try:
        yield
    finally:
        for layer in layers:
            layer._once = None
    moved = [(value, leaf.grad) for value, leaf in computed if leaf.grad is not None]
    if moved:
        torch.autograd.backward([value for value, _ in moved], [grad for _, grad in moved])


def find_targets(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Names of the layers a spec means, in model order.

    A target is `all-linear`, a name (matched whole or as the end of a dotted path), or, when it stands alone
    and is not a plain name, a regular expression matched against the whole path.

    Raises:
        AdapterError: a target matches nothing; the message lists what could be matched, with counts.
    """
    names = list(linear_layers(model))
    chosen: dict[str, None] = {}
    faults = []
    for target in spec.target_modules:
        hits = [n for n in names if _matches(n, target, lone=len(spec.target_modules) == 1)]
        if not hits:
            faults.append(f"{target!r} matches no linear layer{nearest(target, _endings(names))}")
        chosen |= dict.fromkeys(hits)
    if faults:
        listing = ", ".join(f"{ending} ({count})" for ending, count in _endings(names).items())
        raise AdapterError("target_modules:\n" + bullet_list(faults) + f"\nlayers that can be adapted: {listing}")
    lone = len(spec.exclude_modules) == 1
    for target in spec.exclude_modules:
        if not any(_matches(n, target, lone) for n in names):
            raise AdapterError(f"exclude_modules: {target!r} matches no linear layer{nearest(target, _endings(names))}")
    if tied := [
        n for n in chosen if n in HEADS and getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    ]:
        raise AdapterError(
            f"{tied[0]} has the embedding's weights in this model, so an update of it alone could not be written back; "
            "leave it out of target_modules"
        )
    kept = [n for n in names if n in chosen and not any(_matches(n, e, lone) for e in spec.exclude_modules)]
    if not kept:
        raise AdapterError("exclude_modules leaves no layer to adapt; exclude less")
    return kept


def _matches(name: str, target: str, lone: bool) -> bool:
    if target == ALL_LINEAR:
        return name.rpartition(".")[2] not in HEADS
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


def inject(model: nn.Module, spec: AdapterSpec, name: str = "default") -> Injection:
    """Add an adapter to every target layer and make it the active one; base weights stay frozen.

    Packed matrices without a float16 offset that QA-LoRA targets are promoted to the format that holds the same weights
    with one (Q4_0 and Q4_K to Q4_1, Q5_0 and Q5_K to Q5_1). Of a file of mixed types, `all-linear` leaves matrices
    frozen whose type stores no offset; named targets of such a type are refused.

    Raises:
        AdapterError: a target matches nothing, or has a format that the method cannot adapt.
    """
    layers = linear_layers(model)
    targets = find_targets(model, spec)
    result = Injection(targets)
    if spec.method == "qa-lora":
        if ALL_LINEAR in spec.target_modules:
            result.frozen = {path: kind for path in targets if (kind := _unsuitable(layers[path], spec))}
            if len(result.frozen) < len(targets):
                targets = result.modules = [path for path in targets if path not in result.frozen]
        prepare_group_bases(layers, targets, result, spec)
    for path in targets:
        adapter = make_adapter(layers[path], spec)
        attach(model, path, adapter, name)
        result.trainable += sum(p.numel() for p in adapter.parameters())
    return result


def attach(model: nn.Module, path: str, adapter: Adapter, name: str = "default") -> None:
    """Put one adapter on the linear layer at `path` and make it the active one there.

    Raises:
        AdapterError: the layer already carries an adapter of this name.
    """
    module = model.get_submodule(path)
    if not isinstance(module, AdaptedLinear):
        module = AdaptedLinear(module)  # type: ignore[arg-type]
        model.set_submodule(path, module)
    if name in module.adapters:
        raise AdapterError(f"the model already carries an adapter named {name!r}")
    base = module.base
    device = base.blocks.device if isinstance(base, QuantLinear) else base.weight.device
    module.adapters[name] = adapter.to(device)
    module.active = name


def make_adapter(base: nn.Linear | QuantLinear, spec: AdapterSpec) -> Adapter:
    """A fresh adapter for one layer."""
    if spec.method == "qa-lora":
        assert isinstance(base, QuantLinear)
        size = base.packed.format.group_size
        return GroupAdapter(base.in_features // size, base.out_features, size, spec.r, spec.scaling, spec.adapt)
    assert isinstance(spec.r, int)
    return LoRA(base.in_features, base.out_features, spec.r, spec.scaling, spec.lora_dropout)


def prepare_group_bases(
    layers: dict[str, nn.Linear | QuantLinear], targets: list[str], result: Injection, spec: AdapterSpec
) -> None:
    """Make every target's format one that stores what is learned, or refuse them all at once.

    Raises:
        AdapterError: targets are dense or have a format that stores no such thing and is not promoted.
    """
    result.learned = _learned(spec)
    _refuse_unsuitable(layers, targets, spec)
    for path in targets:
        layer = layers[path]
        assert isinstance(layer, QuantLinear)
        old = layer.packed
        if _codec_to_train(old.format, spec) is old.format:
            continue
        try:
            new = promote(old)
        except ValueError as error:
            raise AdapterError(f"{path} cannot be adapted with qa-lora: {error}") from None
        if old.format.affine:
            result.promotion_error = max(result.promotion_error, steps_apart(old.decode(), new))
        layer.packed = new
        result.promotions[path] = (old.codec, new.codec)
        result.added_bytes += new.nbytes - old.nbytes


def _learned(spec: AdapterSpec) -> str:
    return {"offset": "offset", "scale": "scale of its own", "both": "offset and scale of its own"}[spec.adapt]


def _codec_to_train(codec: Codec, spec: AdapterSpec) -> Codec:
    """The format that a matrix is trained in: its own, or the one that it is promoted to first."""
    wanted = spec.k_quants == "promote" if codec.affine else spec.adapt != "scale"
    return CODECS[codec.promotes_to] if codec.promotes_to and wanted else codec


def _unsuitable(layer: nn.Linear | QuantLinear, spec: AdapterSpec) -> str | None:
    """The layer's type if that does not store what is learned, before and after promotion."""
    if not isinstance(layer, QuantLinear):
        return str(layer.weight.dtype).removeprefix("torch.")
    codec = _codec_to_train(layer.packed.format, spec)
    suits = (codec.affine or spec.adapt == "scale") and (codec.scalable or spec.adapt == "offset")
    return None if suits else layer.packed.codec


def _refuse_unsuitable(layers: dict[str, nn.Linear | QuantLinear], targets: list[str], spec: AdapterSpec) -> None:
    bad: dict[str, list[str]] = {}
    for path in targets:
        if kind := _unsuitable(layers[path], spec):
            bad.setdefault(kind, []).append(path)
    if bad:
        faults = [
            f"{kind}: {len(paths)} layers ({', '.join(paths[:3])}{', ...' if len(paths) > 3 else ''})"
            for kind, paths in bad.items()
        ]
        able = [name for name, codec in GGUF_CODECS.items() if codec.affine or codec.promotes_to]
        raise AdapterError(
            f"qa-lora learns the {_learned(spec)} that a quantized group stores, and these targets store none:\n"
            + bullet_list(faults)
            + "\nleave them out with --exclude-modules, train them with --method lora, or start from a file whose "
            f"matrices are {', '.join(able)}"
        )


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Parameters of one adapter: `<layer>.lora_A` and so on -> tensor (not a copy)."""
    return {
        f"{path}.{key}": parameter
        for path, layer in adapted_layers(model)
        if name in layer.adapters
        for key, parameter in layer.adapters[name].named_parameters()
    }


def set_active(model: nn.Module, name: str | None) -> None:
    """Switch every layer to the adapter `name`, or to the bare base with None."""
    for _, layer in adapted_layers(model):
        layer.active = name if name is not None and name in layer.adapters else None
