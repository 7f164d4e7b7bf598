"""Which parameters are trained whole: those of the methods without adapters, of `modules_to_save`, and biases."""

from __future__ import annotations

from torch import Tensor, nn

from lorafold.adapters.adapted import parameter_names, plain_modules
from lorafold.adapters.parameters import ParameterLoRA
from lorafold.adapters.targets import HEADS, own_parameters
from lorafold.adapters.tied import pair_to_share, with_embedding
from lorafold.config import METHODS, AdapterSpec
from lorafold.errors import AdapterError, bullet_list, nearest
from lorafold.quant.linear import QuantEmbedding, QuantLinear

_PACKED = (QuantLinear, QuantEmbedding)


def whole_parameters(model: nn.Module, spec: AdapterSpec, targets: list[str]) -> list[str]:
    """Names of the parameters that a spec trains whole.

    Args:
        targets: names of the adapted layers, whose biases `lora_only` means.

    Raises:
        AdapterError: a name matches nothing, a matrix is packed, the model has no such part, or `head` means one that
            has the weights of the embedding.
    """
    of_method = {
        "full": lambda: [""],
        "last-layers": lambda: _last_layers(model, spec.layers),
        "head": lambda: head(model),
    }
    chosen = [*of_method.get(spec.method, list)(), *_named(model, spec)]
    modules = plain_modules(model)
    packed = [
        path
        for path, module in modules.items()
        if isinstance(module, _PACKED) and any(_within(path, owner) for owner in chosen)
    ]
    if packed:
        others = f", and so are {len(packed) - 1} others" if packed[1:] else ""
        raise AdapterError(f"{packed[0]} is packed{others}: steps of a code are too coarse to train{_way_out(spec)}")
    if spec.method == "head" and _tied(model):
        raise AdapterError(
            f"{chosen[0]} has the embedding's weights in this model, so it cannot be trained alone; use --method "
            "last-layers, which leaves it out, or full"
        )
    every = own_parameters(model, not METHODS[spec.method].whole)
    found = [name for name in every if any(_within(name, owner) for owner in chosen)]
    if spec.bias != "none":
        for path, module in modules.items():
            if isinstance(getattr(module, "bias", None), Tensor) and (spec.bias == "all" or path in targets):
                found.append(f"{path}.bias".removeprefix("."))
    found = list(dict.fromkeys(found))
    return with_embedding(found, pair_to_share(model), ".weight") if spec.ensure_weight_tying else found


def _way_out(spec: AdapterSpec) -> str:
    if spec.method in ("full", "last-layers", "head"):
        return (
            f". --method {spec.method} needs weights that are not quantized; adapt this model (lora, qa-lora) instead"
        )
    return "; adapt it instead of naming it in modules_to_save"


def _within(name: str, owner: str) -> bool:
    return not owner or name == owner or name.startswith(f"{owner}.")


def _named(model: nn.Module, spec: AdapterSpec) -> list[str]:
    modules = plain_modules(model)
    chosen, faults = [], []
    for wanted in spec.modules_to_save:
        hits = [n for n in modules if n == wanted or n.endswith(f".{wanted}")]
        if not hits:
            faults.append(f"modules_to_save: {wanted!r} matches no module{nearest(wanted, list(modules))}")
        chosen += hits
        for path in hits:
            inside = [n for n in modules if _within(n, path)]
            if any(modules[n]._buffers.keys() - modules[n]._non_persistent_buffers_set for n in inside):
                faults.append(f"modules_to_save: {path} has buffers, such as running means, that no adapter file holds")
            elif not any(parameter_names(modules[n]) or isinstance(modules[n], _PACKED) for n in inside):
                faults.append(f"modules_to_save: {path} has no parameters to train")
    if faults:
        raise AdapterError(bullet_list(faults))
    return chosen


def head(model: nn.Module) -> list[str]:
    """Names of the modules with parameters that transformers puts on a base model.

    Raises:
        AdapterError: there are none.
    """
    found = _beside_base(model)
    if not found:
        raise AdapterError("this model has no head that could be told from its base; name parts in modules_to_save")
    return found


def _beside_base(model: nn.Module) -> list[str]:
    """Names of what stands beside a base model and has parameters; none where there is no base model."""
    children, base = dict(model.named_children()), getattr(model, "base_model_prefix", None)
    held = [n for n, m in children.items() if n != base and any(True for _ in (*m.parameters(), *m.buffers()))]
    return held if base in children else []


def trained_matrices(model: nn.Module) -> set[str]:
    """Names of trained parameters that are one matrix of a layer, or of its adapter.

    Not those of embeddings and heads, whose rows stand for tokens and classes, nor those of several experts.
    """
    tables = [name for name, m in plain_modules(model).items() if isinstance(m, nn.Embedding | QuantEmbedding)]
    apart = tables + _beside_base(model)
    apart += [name for name, m in model.named_modules() if isinstance(m, ParameterLoRA) and m.experts > 1]
    names = {name for name, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
    return {n for n in names if not n.startswith(tuple(f"{x}." for x in apart)) and not {*n.split(".")} & {*HEADS}}


def _tied(model: nn.Module) -> bool:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return output is not None and bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def blocks(model: nn.Module) -> list[str]:
    """Names of the blocks, from the input on: the longest list of modules that lies in no other.

    Raises:
        AdapterError: the model has no list of modules.
    """
    every = [(n, m) for n, m in plain_modules(model).items() if isinstance(m, nn.ModuleList)]
    lists = [(n, m) for n, m in every if not any(n.startswith(f"{outer}.") for outer, _ in every)]
    if not lists:
        raise AdapterError("this model has no list of blocks, of which the last could be trained")
    name, longest = max(lists, key=lambda item: len(item[1]))
    return [f"{name}.{i}".removeprefix(".") for i in range(len(longest))]


def _last_layers(model: nn.Module, count: int) -> list[str]:
    """The last blocks and what the model defines after them; a head with the embedding's weights is left out."""
    every = blocks(model)
    if count > len(every):
        raise AdapterError(f"layers is {count}, and the model has {len(every)} blocks")
    order = [n for n, m in plain_modules(model).items() if not list(m.children())]
    after = order[max(i for i, n in enumerate(order) if _within(n, every[-1])) + 1 :]
    tied = model.get_output_embeddings() if _tied(model) else None  # type: ignore[operator]
    return every[-count:] + [n for n in after if tied is None or plain_modules(model)[n] is not tied]
