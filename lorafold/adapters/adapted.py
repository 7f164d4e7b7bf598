"""Layers that carry adapters, by name; those that are active take part in the forward pass."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.holder import Holder
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.errors import AdapterError
from lorafold.quant.linear import untouched

Adapter = LoRA | GroupAdapter


class AdaptedLayer(Holder):
    """A layer with named adapters.

    Attributes:
        base: the frozen layer, dense or packed.
    """

    base: nn.Module

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.train(base.training)
        self.register_forward_hook(_nothing)  # torch's fast path of an encoder layer would read the weight past us
        self._once: tuple[Tensor | None, Tensor | None] | None = None  # see `parameters_once`
        self.by_row: Callable[[Tensor], Tensor] | None = None  # see `adapters_by_row`

    def __getattr__(self, name: str) -> Any:
        """What the layer itself has, such as `in_features`, is found here too."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):  # how the layer is copied, pickled and the like is not for us
                raise
            return getattr(super().__getattr__("base"), name)

    @property
    def adapter(self) -> Adapter | None:
        """The active adapter; None where there is none, or more than one."""
        active = self.active_adapters()
        return active[0] if len(active) == 1 else None

    def active_adapters(self) -> list[Adapter]:
        """Those that take part."""
        return [self.adapters[name] for name in self.active]  # type: ignore[misc]

    def offset(self) -> Tensor | None:
        """Offsets [out, groups] it computes with, as its file stores them; None where none are learned."""
        update = self._sum(lambda adapter: adapter.offset_update())
        if update is None:
            return None
        packed = self.base.packed  # type: ignore[union-attr]
        return packed.format.move_offset(packed.format.offset(packed.blocks), update)  # type: ignore[union-attr, operator]

    def scale(self) -> Tensor | None:
        """Scales [out, groups] it computes with, as its file stores them; None where none are learned."""
        update = self._sum(lambda adapter: adapter.scale_update())
        if update is None:
            return None
        packed = self.base.packed  # type: ignore[union-attr]
        return packed.format.move_scale(packed.format.scale(packed.blocks), update)  # type: ignore[union-attr, operator]

    def _sum(self, update: Callable[[GroupAdapter], Tensor | None]) -> Tensor | None:
        """What the active group adapters change of one parameter, together."""
        parts = [update(adapter) for adapter in self.active_adapters() if isinstance(adapter, GroupAdapter)]
        learned = [part for part in parts if part is not None]
        return sum(learned[1:], learned[0]) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gives for x, with its active adapters."""
        if self.by_row is not None:
            return self.by_row(x)
        active = self.active_adapters()
        branches = [adapter for adapter in active if isinstance(adapter, LoRA)]
        if len(branches) == len(active) == 1:
            return branches[0](x)
        y = plain = self.base(x) if len(branches) == len(active) else self.base(x, *self.group_parameters())
        for branch in branches:
            y = y + branch.extra(x, plain)
        return y

    def group_parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """What `offset` and `scale` give, computed once where `parameters_once` says so."""
        return self._once or (self.offset(), self.scale())


def _nothing(*_: Any) -> None:
    """A hook, of which only the presence counts."""


def watched(layer: AdaptedLayer) -> bool:
    """Whether it matters that the layer itself is called: for hooks, or rows with adapters of their own."""
    kinds = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    hooked = any(hook is not _nothing for hooks in kinds for hook in hooks.values())
    adapters = all(map(untouched, layer.active_adapters()))
    return layer.by_row is not None or hooked or not adapters or "forward" in vars(layer)


Carrier = AdaptedLayer | AdaptedParameter


def carriers(model: nn.Module) -> list[tuple[str, Carrier]]:
    """(name of the layer or parameter, what carries its adapters), in model order.

    Walks by hand, past torch's slow ways to attributes: with many adapters most modules are parts of these, and there
    is nothing in them to be found.
    """
    found: list[tuple[str, Carrier]] = []
    seen: set[AdaptedParameter] = set()  # a parameter with two names is one, under the first
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        children = module._modules
        if isinstance(module, AdaptedLayer):
            found.append((path, module))
            children = children["base"]._modules  # type: ignore[union-attr]
        if not children:
            continue
        prefix = f"{path}." if path else ""
        chains = children.get("parametrizations")
        if isinstance(chains, nn.ModuleDict):
            for parameter, chain in chains.items():
                links = [m for m in chain.children() if isinstance(m, AdaptedParameter) and m not in seen]
                found += [(prefix + parameter, link) for link in links]
                seen.update(links)
        for name in reversed(children):
            child = children[name]
            if child is not None and child._modules and child is not chains:
                stack.append((prefix + name, child))
    return found


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of every layer that carries adapters."""
    return ((name, carrier) for name, carrier in carriers(model) if isinstance(carrier, AdaptedLayer))


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names they had before anything was adapted: layers without their adapters."""
    found: dict[str, nn.Module] = {}
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        path, module = stack.pop()
        module = module.base if isinstance(module, AdaptedLayer) else module
        found[path] = module
        chains = module._modules.get("parametrizations")
        prefix = f"{path}." if path else ""
        for name in reversed(module._modules):
            child = module._modules[name]
            if child is not None and not (child is chains and parametrize.is_parametrized(module)):
                stack.append((prefix + name, child))
    return found


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, without its adapters, and the parameter's own name."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    return (module.base if isinstance(module, AdaptedLayer) else module), name


def parameter_names(module: nn.Module) -> list[str]:
    """Names of a module's own parameters in the order of its definition, adapted or not."""
    return getattr(module, "_defined_order", None) or [name for name, _ in module.named_parameters(recurse=False)]


def plain_parameter(model: nn.Module, path: str) -> Tensor | None:
    """A parameter or buffer as it is without adapters; None where there is none of that name."""
    try:
        owner, name = _owner(model, path)
    except AttributeError:
        return None
    if parametrize.is_parametrized(owner, name):
        return owner.parametrizations[name].original  # type: ignore[index, union-attr, return-value]
    value = getattr(owner, name, None)
    return value if isinstance(value, Tensor) else None


def stored_transposed(model: nn.Module, path: str) -> bool:
    """Whether a parameter of three dimensions is stored [experts, I, O], as transformers marks its modules."""
    return bool(getattr(_owner(model, path)[0], "is_transposed", False))


def adapt_parameter(model: nn.Module, path: str, tied: bool = False) -> AdaptedParameter:
    """The carrier of a parameter's adapters, put there if need be.

    Args:
        tied: also where the model uses the same parameter under another name.
    """
    owner, name = _owner(model, path)
    parameter = plain_parameter(model, path)
    assert parameter is not None
    if (carrier := _carrier(owner, name)) is not None:
        return carrier
    others = [use for use in _uses_of(model, parameter) if use != (owner, name)] if tied else []
    carrier = AdaptedParameter(parameter.device)
    carrier.train(owner.training)
    owner._defined_order = parameter_names(owner)  # type: ignore[assignment]
    carrier.handles = [
        owner.register_forward_pre_hook(carrier.begin),
        owner.register_forward_hook(carrier.end, always_call=True),
    ]
    trained = parameter.requires_grad
    for module, its_name in ((owner, name), *others):
        _take_own_class(module)
        parametrize.register_parametrization(module, its_name, carrier, unsafe=True)
    owner.parametrizations[name].original.requires_grad_(trained)  # type: ignore[index, union-attr]
    return carrier


def _take_own_class(module: nn.Module) -> None:
    """Of a parametrized module: torch made its class for it, but deep copies share that, and its properties with it."""
    if parametrize.is_parametrized(module):
        kind = type(module)
        module.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))  # type: ignore[assignment]


def _carrier(owner: nn.Module, name: str) -> AdaptedParameter | None:
    if not parametrize.is_parametrized(owner, name):
        return None
    return next(m for m in owner.parametrizations[name] if isinstance(m, AdaptedParameter))  # type: ignore[index, union-attr]


def refuse_other_uses(model: nn.Module, path: str, tied: bool) -> None:
    """Refuse an adapter on all uses of a parameter that has others on one of them, or the other way round.

    Raises:
        AdapterError: it has.
    """
    parameter, carrier = plain_parameter(model, path), _carrier(*_owner(model, path))
    if parameter is None or carrier is None or len(_uses_of(model, parameter)) == 1:
        return
    if tied != (len(carrier_uses(model, carrier)) > 1):
        where = "one of" if tied else "all"
        raise AdapterError(f"{path} already has an adapter on {where} its uses; delete that first")


def _uses_of(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [(module, name) for module, name, value in uses(model) if value is parameter]


def uses(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Every module with each of its parameters, by its name there and as it is without adapters."""
    found = {}
    for module in plain_modules(model).values():
        own = dict(module._parameters)
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            own |= {name: made._parameters.get("original") for name, made in chains.items()}  # others' have no such
        found |= {(module, name): value for name, value in own.items() if value is not None}
    return [(*use, value) for use, value in found.items()]


def carrier_uses(model: nn.Module, carrier: AdaptedParameter) -> list[tuple[nn.Module, str]]:
    """Every module whose parameter has the carrier, and the parameter's name there."""
    return [
        (module, name)
        for module in model.modules()
        if parametrize.is_parametrized(module)
        for name, made in module.parametrizations.items()  # type: ignore[union-attr, operator]
        if carrier in list(made)
    ]


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters on a model, in the order in which they were put on."""
    return list(dict.fromkeys(name for _, carrier in carriers(model) for name in carrier.adapters))


def set_active(model: nn.Module, names: str | Sequence[str] | None) -> None:
    """Let one adapter, or the sum of several, take part; with None the bare base.

    Raises:
        AdapterError: the model carries no adapter of such a name.
    """
    wanted = (names,) if isinstance(names, str) else tuple(names or ())
    found = [vars(carrier) for _, carrier in carriers(model)]  # past torch's slow ways to attributes
    for name in wanted:
        if not any(name in own["_modules"]["adapters"]._modules for own in found):
            refuse_unknown(model, wanted)
    for own in found:
        own["wanted"] = wanted


def delete_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; layers that carry no other one are what they were before.

    If no adapter is active then, and this one was, the first by name of those left becomes so, with a warning, as in
    PEFT (which chooses layer by layer).

    Raises:
        AdapterError: the model carries no adapter of this name.
    """
    refuse_unknown(model, (name,))
    found = carriers(model)
    was_active = any(name in carrier.active for _, carrier in found)
    for path, carrier in found:
        if name not in carrier.adapters:
            continue
        del carrier.adapters[name]
        carrier.wanted = tuple(other for other in carrier.wanted if other != name)
        if carrier.adapters:
            continue
        if isinstance(carrier, AdaptedLayer):
            model.set_submodule(path, carrier.base)
        else:
            for handle in carrier.handles:
                handle.remove()
            for owner, parameter in carrier_uses(model, carrier):
                _take_own_class(owner)
                parametrize.remove_parametrizations(owner, parameter, leave_parametrized=False)
                if not parametrize.is_parametrized(owner):
                    vars(owner).pop("_defined_order", None)
    left = adapter_names(model)
    if left and was_active and not any(carrier.active for _, carrier in carriers(model)):
        warnings.warn(f"the active adapter {name!r} was deleted; {min(left)!r} is active now", stacklevel=2)
        set_active(model, min(left))


def refuse_unknown(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse names that no adapter of the model has.

    Raises:
        AdapterError: naming them and those there are.
    """
    known = adapter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        listed = ", ".join(known) or "none"
        raise AdapterError(f"the model carries no adapter named {', '.join(map(repr, unknown))}; it has {listed}")


@contextlib.contextmanager
def parameters_once(model: nn.Module) -> Iterator[None]:
    """Inside, offsets, scales and DoRA's norms are computed once and serve every forward pass.

    The gradients of offsets and scales are summed over the backward passes inside and handed on to the adapters at the
    end: for a step of several micro-batches, between which the adapters do not change.
    """
    computed: list[tuple[Tensor, Tensor]] = []
    layers, lengths = [], []
    for _, layer in adapted_layers(model):
        lengths += [a for a in layer.active_adapters() if isinstance(a, LoRA) and a.dora]
        if not any(isinstance(a, GroupAdapter) for a in layer.active_adapters()):
            continue
        pair = []
        for value in (layer.offset(), layer.scale()):
            leaf = None if value is None else value.detach().requires_grad_(value.requires_grad)
            pair.append(leaf)
            if value is not None and leaf is not None:
                computed.append((value, leaf))
        layer._once = (pair[0], pair[1])
        layers.append(layer)
    for adapter in lengths:
        adapter.kept_norm = adapter.norm()
    try:
        yield
    finally:
        for layer in layers:
            layer._once = None
        for adapter in lengths:
            adapter.kept_norm = None
    moved = [(value, leaf.grad) for value, leaf in computed if leaf.grad is not None]
    if moved:
        torch.autograd.backward([value for value, _ in moved], [grad for _, grad in moved])
