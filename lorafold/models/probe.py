"""Whether rows may be laid end to end in a model: tried on two short rows, for architectures that no test covers.

Attention keeps rows apart (`attention.py`); layers of other kinds (convolutions, recurrences) or attention with extras
may not. A model that mixes rows would train on wrong losses without a word, so it is refused.
"""

# N tokens of both rows, H hidden width

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_ROWS = (13, 9)  # tokens of the two rows: enough for the kernels
_CHANCE = 8  # largest differences by rounding alone may differ by so much


@torch.no_grad()
def hidden_alone(model: PreTrainedModel) -> Tensor:
    """Last hidden states [1, N, H] of two rows, each by itself, as transformers computes them."""
    rows = torch.arange(sum(_ROWS), device=model.device)[None].split(_ROWS, 1)
    return torch.cat([model.base_model(input_ids=row, use_cache=False)[0] for row in rows], 1)


@torch.no_grad()
def rows_mix(model: PreTrainedModel, alone: Tensor) -> str | None:
    """What is wrong when the two rows lie end to end in one pass; None if each comes out as it does alone.

    The second row must not change by a single bit when the first one does: a small leak hides in rounding otherwise.
    Only where tokens are sent to experts it may: how many tokens an expert has changes how its products are rounded.
    What that does to the first row when the second one changes, which cannot leak there, is the measure of it.

    Args:
        alone: result of `hidden_alone`, before the model's attention was replaced.
    """
    ids = torch.arange(sum(_ROWS), device=model.device)[None]
    first = torch.cat([ids[:, : _ROWS[0]] + 1, ids[:, _ROWS[0] :]], 1)
    second = torch.cat([ids[:, : _ROWS[0]], ids[:, _ROWS[0] :] + 1], 1)
    positions = torch.cat([torch.arange(n, device=model.device) for n in _ROWS])[None]
    options = {"position_ids": positions, "segments": list(_ROWS), "use_cache": False}
    try:
        packed, changed = (model.base_model(input_ids=row, **options)[0] for row in (ids, first))
        later = model.base_model(input_ids=second, **options)[0] if _has_experts(model) else packed
        options |= {"segments": [3, _ROWS[0] - 3, _ROWS[1]], "parents": [-1, 0, -1]}  # the first row in two segments
        tree = model.base_model(input_ids=ids, **options)[0]
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).splitlines()[0]
    rounding = _CHANCE * (later - packed)[:, : _ROWS[0]].abs().max()
    leak = (changed - packed)[:, _ROWS[0] :].abs().max()
    tolerance = max((1e-3 if packed.dtype == torch.float32 else 5e-2) * alone.abs().max(), rounding)
    error = (torch.stack([packed, tree]) - alone).abs().max()
    if not leak <= rounding or not error <= tolerance:
        return "rows that lie end to end in one pass do not come out as each does alone"
    return None


def _has_experts(model: PreTrainedModel) -> bool:
    """Whether matrices of several experts stand in one tensor, or experts in a list."""
    modules = (
        (name, p)
        for name, module in model.named_modules()
        for p in module.parameters(recurse=False)
        if not isinstance(module, nn.Conv1d)
    )
    return any("experts" in name.split(".") or p.ndim == 3 for name, p in modules)
