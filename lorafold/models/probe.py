"""Whether rows may be laid end to end in a model: tried on two short rows, for architectures that no test covers.

Attention keeps rows apart (`attention.py`); layers of other kinds (convolutions, recurrences) or attention with extras
may not. A model that mixes rows would train on wrong losses without a word, so it is refused.
"""

# N tokens of both rows, H hidden width

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS = (13, 9)  # tokens of the two rows: enough for the kernels


@torch.no_grad()
def hidden_alone(model: PreTrainedModel) -> Tensor:
    """Last hidden states [1, N, H] of two rows, each by itself, as transformers computes them."""
    rows = torch.arange(sum(_ROWS), device=model.device)[None].split(_ROWS, 1)
    with _without_experts(model):
        return torch.cat([model.base_model(input_ids=row, use_cache=False)[0] for row in rows], 1)


@torch.no_grad()
def rows_mix(model: PreTrainedModel, alone: Tensor) -> str | None:
    """What is wrong when the two rows lie end to end in one pass; None if each comes out as it does alone.

    The second row must not change by a single bit when the first one does: a small leak hides in rounding otherwise.
    Experts, which see tokens one by one, give zeros meanwhile: how their products round depends on how many tokens each
    has, and so on the other row.

    Args:
        alone: result of `hidden_alone`, before the model's attention was replaced.
    """
    ids = torch.arange(sum(_ROWS), device=model.device)[None]
    other = torch.cat([ids[:, : _ROWS[0]] + 1, ids[:, _ROWS[0] :]], 1)
    positions = torch.cat([torch.arange(n, device=model.device) for n in _ROWS])[None]
    options = {"position_ids": positions, "segments": list(_ROWS), "use_cache": False}
    try:
        with _without_experts(model):
            packed, again = (model.base_model(input_ids=row, **options)[0] for row in (ids, other))
            options |= {"segments": [3, _ROWS[0] - 3, _ROWS[1]], "parents": [-1, 0, -1]}  # the first row in two
            tree = model.base_model(input_ids=ids, **options)[0]
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    leaks = not torch.equal(packed[:, _ROWS[0] :], again[:, _ROWS[0] :])
    tolerance = 1e-3 if packed.dtype == torch.float32 else 5e-2
    error = (torch.stack([packed, tree]) - alone).abs().max()
    if leaks or not error <= tolerance * alone.abs().max():
        return "rows that lie end to end in one pass do not come out as each does alone"
    return None


@contextlib.contextmanager
def _without_experts(model: PreTrainedModel) -> Iterator[None]:
    """Experts give zeros, those in a list and those that have their matrices in one tensor."""
    lists = [m for name, m in model.named_modules() if name.endswith("experts") and isinstance(m, nn.ModuleList)]
    listed = {id(expert) for experts in lists for expert in experts}
    hooks = [
        module.register_forward_hook(_zeros) for module in model.modules() if id(module) in listed or _is_stack(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _zeros(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
    return torch.zeros_like(out)


def _is_stack(module: nn.Module) -> bool:
    """By its class's name: recurrences have parameters of three dimensions as well, and these do mix tokens."""
    return "Experts" in type(module).__name__ and any(p.ndim == 3 for p in module.parameters(recurse=False))
