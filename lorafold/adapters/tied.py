"""Embedding and head with one weight: an update of both, or of one of them, which then has a weight of its own.

The weight W [V, H] is a table to the embedding and a matrix to the head. LoRA sees the table transposed (`sites.py`),
so the embedding's update s B A, A [r, V], B [H, r], is  s A^T B^T  to the head: the same parameters, seen from there.
Offsets and scales of groups are the same seen from both.
"""

# r rank, V vocabulary, H hidden width

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lorafold.adapters.adapted import (
    AdaptedLayer,
    Adapter,
    adapted_layers,
    carrier_uses,
    carriers,
    plain_modules,
    plain_parameter,
)
from lorafold.adapters.group import GroupAdapter
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import AdaptedParameter
from lorafold.adapters.sites import LinearSite
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError
from lorafold.quant.linear import QuantEmbedding, QuantLinear


class TiedLoRA(LoRA):
    """The embedding's LoRA on the head; it has no parameters of its own.

    Args:
        site: the head.
        source: the embedding's adapter.
        dropout: probability of zeroing an input feature of the head while training, as in PEFT.
    """

    def __init__(self, site: LinearSite, source: LoRA, dropout: float):
        super().__init__(site, 1, source.scaling, dropout)
        del self.lora_A, self.lora_B
        self._source = (source,)  # a tuple, so that its parameters do not count twice

    def learned(self) -> tuple[Tensor, Tensor]:
        """A and B."""
        a, b = self._source[0].learned()
        return b.T, a.T


class TiedGroup(GroupAdapter):
    """The embedding's group adapter on the head; it has no parameters of its own."""

    def __init__(self, source: GroupAdapter):
        nn.Module.__init__(self)
        self.group_size, self.groups, self.scaling = source.group_size, source.groups, source.scaling
        self.full, self.learns_offset, self.learns_scale = source.full, source.learns_offset, source.learns_scale
        self._source = (source,)

    def offset_update(self) -> Tensor | None:
        """What is added to the offsets."""
        return self._source[0].offset_update()

    def scale_update(self) -> Tensor | None:
        """By what share the scales grow."""
        return self._source[0].scale_update()


def follow(model: nn.Module, pair: tuple[str, str], adapter: nn.Module, spec: AdapterSpec) -> Adapter:
    """The embedding's adapter, as the head has it; the head computes with the embedding's weight, promoted or not."""
    table, head = (plain_modules(model)[name] for name in pair)
    if isinstance(adapter, GroupAdapter):
        assert isinstance(table, QuantEmbedding)
        assert isinstance(head, QuantLinear)
        head.packed = table.packed
        return TiedGroup(adapter)
    assert isinstance(adapter, LoRA)
    return TiedLoRA(LinearSite(head), adapter, spec.lora_dropout)


def source_of(adapter: nn.Module) -> nn.Module:
    """What holds an adapter's parameters: the adapter itself, but for one that follows another."""
    return adapter._source[0] if isinstance(adapter, TiedLoRA | TiedGroup) else adapter


def follows(adapter: nn.Module) -> bool:
    """Whether an adapter is another one's, seen from the head."""
    return isinstance(adapter, TiedLoRA | TiedGroup)


def _ends(model: nn.Module) -> dict[str, nn.Module]:
    """Embedding and head by name, without their adapters, where the model's config says that they have one weight."""
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        return {}
    names = {id(module): name for name, module in reversed(plain_modules(model).items())}  # the first of several names
    found = {}
    for end in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, end, lambda: None)()  # a classifier has no head, whatever it inherits
        module = module.base if isinstance(module, AdaptedLayer) else module
        if id(module) not in names:
            return {}
        found[names[id(module)]] = module
    return found


def updated_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLayer]]:
    """(name, layer) of adapted layers but for a head that has the embedding's update, and its weight."""
    for path, layer in adapted_layers(model):
        if not any(follows(adapter) for adapter in layer.active_adapters()):
            yield path, layer


def tied_pair(model: nn.Module) -> tuple[str, str] | None:
    """Names of the embedding and of the head, where these have one weight."""
    ends = _ends(model)
    if len(ends) < 2:
        return None
    packed = [isinstance(module, QuantEmbedding | QuantLinear) for module in ends.values()]
    if all(packed):
        table, matrix = (module.blocks for module in ends.values())
    else:
        table, matrix = (plain_parameter(model, f"{name}.weight") for name in ends)
    embedding, head = ends
    return (embedding, head) if table is not None and table is matrix else None


def taken_apart(model: nn.Module) -> tuple[str, str] | None:
    """Names of the embedding and of the head, where the base has one weight for both and active adapters two."""
    ends = list(_ends(model))
    if len(ends) < 2:
        return None
    held = {path: carrier for path, carrier in carriers(model) if carrier.active}
    updates = []
    for end in ends:
        found = [held[path] for path in (end, f"{end}.weight") if path in held]
        updates.append([source_of(carrier.adapters[name]) for carrier in found for name in carrier.active])
    whole = held.get(f"{ends[0]}.weight")
    if isinstance(whole, AdaptedParameter) and len(carrier_uses(model, whole)) > 1:
        updates[1] = updates[0]
    return None if updates[0] == updates[1] else (ends[0], ends[1])


def pair_to_share(model: nn.Module) -> tuple[str, str]:
    """The same for `ensure_weight_tying`.

    Raises:
        AdapterError: embedding and head have weights of their own.
    """
    pair = tied_pair(model)
    if pair is None:
        raise AdapterError(
            "ensure_weight_tying shares one update between embedding and head, and here these do not have one weight; "
            "leave it out"
        )
    return pair


def with_embedding(names: list[str], pair: tuple[str, str], end: str = "") -> list[str]:
    """Targets in which the embedding stands for both: where one of the two is named, it is.

    Args:
        end: what the names end with, such as `.weight` for parameters.
    """
    embedding, head = (f"{name}{end}" for name in pair)
    if head in names and embedding not in names:
        return [embedding, *(name for name in names if name != head)]
    return [name for name in names if name != head]
