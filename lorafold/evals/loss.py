"""Cross-entropy over supervised tokens, without ever holding the logits of a whole batch.

The loss is a sum over targets; callers divide by the number of targets of the whole step, so that splitting a step
changes nothing. Where the head is frozen, the gradient with respect to the hidden states is formed in the same pass
as the loss, chunk by chunk, and the logits are gone before the next chunk.
"""

# S supervised positions, H hidden width, V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lorafold.config import TrainingConfig
from lorafold.data.packs import Pack, micro_batches, pack
from lorafold.data.tokens import Tokens
from lorafold.kernels.choice import kernels_for
from lorafold.models.load import LoadedModel
from lorafold.quant.linear import QuantLinear, multiply_into

WHOLE = 64  # the tokens of a pack are rounded up to this, see `pack`
SHARED = TrainingConfig.shared_prefix_tokens  # tokens in common that stand once, see `pack`
CHUNK = 256  # supervised positions whose logits exist at once: 256 x V x 2 bytes
_FEW = 32  # the last chunk is filled up to a multiple of this: few shapes of matrices, see `pack`
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # config keys of heads that do more


def _cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The loss of each row [S] of logits [S, V], which with `gradient` become its gradient."""
    if kernels := kernels_for(logits):
        return kernels.cross_entropy_(logits, targets, gradient)
    wide = logits.float()
    normalizer = wide.logsumexp(-1, keepdim=True)
    losses = normalizer - wide.gather(1, targets[:, None])
    if gradient:
        probabilities = wide.sub_(normalizer).exp_()
        logits.copy_(probabilities.scatter_add_(1, targets[:, None], torch.full_like(normalizer, -1.0)))
    return losses[:, 0]


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        room = hidden.new_empty(min(CHUNK, -(-len(targets) // _FEW) * _FEW), len(weight))
        for start in range(0, len(targets), CHUNK):
            here = slice(start, start + CHUNK)
            rows = len(targets[here])
            part, target = F.pad(hidden[here], (0, 0, 0, -rows % _FEW)), F.pad(targets[here], (0, -rows % _FEW))
            logits = multiply_into(part, weight, room[: len(part)])
            losses = _cross_entropy_(logits, target, grad is not None)
            total += losses[:rows].sum()
            if grad is not None:
                grad[here] = (logits @ weight)[:rows]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad.float() * grads[0]).to(grad.dtype), None, None


def hidden_states(loaded: LoadedModel, batch: Pack) -> Tensor:
    """Last hidden states [S, H] at the positions of a pack that predict a supervised token."""
    out = loaded.model.base_model(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        segments=batch.segments,
        parents=batch.parents,
        use_cache=False,
    )
    return out.last_hidden_state[0].index_select(0, batch.target_at)


@contextlib.contextmanager
def head_once(loaded: LoadedModel) -> Iterator[None]:
    """Inside, a packed head is decoded once and serves every pack."""
    loaded.head_weight = _frozen_head(loaded)
    try:
        yield
    finally:
        loaded.head_weight = None


def _frozen_head(loaded: LoadedModel) -> Tensor | None:
    """The weight of a head that is a frozen matrix and nothing more."""
    config, head = loaded.model.config, loaded.model.get_output_embeddings()
    if not isinstance(head, nn.Linear | QuantLinear) or any(p.requires_grad for p in head.parameters()):
        return None
    if head.bias is not None or any(getattr(config, key, None) for key in _LOGIT_CHANGES):
        return None
    return head.packed.decode(loaded.dtype) if isinstance(head, QuantLinear) else head.weight


def pack_loss(loaded: LoadedModel, batch: Pack) -> Tensor:
    """Sum of the cross-entropies (nats) of a pack's targets, differentiable."""
    weight = _frozen_head(loaded) if loaded.head_weight is None else loaded.head_weight
    hidden = hidden_states(loaded, batch)
    if weight is not None:
        total: Tensor = _FrozenHeadLoss.apply(hidden, weight, batch.targets)  # type: ignore[assignment]
        return total
    head = loaded.model.get_output_embeddings()
    assert head is not None
    return _general_loss(loaded.model, head, hidden, batch.targets)


def logits_of(model: nn.Module, head: nn.Module, hidden: Tensor) -> Tensor:
    """Logits float32 [S, V] of hidden states [S, H], with what some architectures do to them after the head."""
    config, logits = model.config, head(hidden).float()
    cap = getattr(config, "final_logit_softcapping", None)
    logits = logits * (getattr(config, "logit_scale", None) or 1) / (getattr(config, "logits_scaling", None) or 1)
    return torch.tanh(logits / cap) * cap if cap else logits


def _general_loss(model: nn.Module, head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """The same for a head that is trained or changes its logits: each chunk is computed again in the backward pass."""

    def chunk_loss(part: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(model, head, part), target, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(targets), CHUNK):
        part, target = hidden[start : start + CHUNK], targets[start : start + CHUNK]
        total = total + checkpoint(chunk_loss, part, target, use_reentrant=False)
    return total


def evaluate(
    loaded: LoadedModel,
    rows: Iterable[Tokens],
    max_tokens: int = 1024,
    progress: Callable[[int], None] | None = None,
    shared: int | None = SHARED,
) -> float:
    """Mean cross-entropy (nats) per supervised token over all rows; arguments as for `loss_sum`."""
    total, count = loss_sum(loaded, rows, max_tokens, progress, shared)
    return total / count


@torch.no_grad()
def loss_sum(
    loaded: LoadedModel,
    rows: Iterable[Tokens],
    max_tokens: int = 1024,
    progress: Callable[[int], None] | None = None,
    shared: int | None = SHARED,
) -> tuple[float, int]:
    """Sum of the cross-entropies (nats) of the supervised tokens of all rows, and their number.

    Args:
        max_tokens: most tokens at once; a longer row stands alone.
        progress: called with the number of rows done after each forward pass.
        shared: as in `pack`.
    """
    total, count = torch.zeros((), dtype=torch.float64, device=loaded.device), 0
    with head_once(loaded):
        for group in micro_batches(rows, max_tokens, loaded.row_align, shared):
            batch = pack(group, loaded.row_align, shared, WHOLE).to(loaded.device)
            total += pack_loss(loaded, batch)
            count += len(batch.targets)
            if progress:
                progress(len(group))
    return float(total), count
