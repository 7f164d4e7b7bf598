"""Cross-entropy over supervised tokens, without ever holding the logits of a whole batch.

The loss is a sum over targets; callers divide by the number of targets of the whole step, so that splitting a step
changes nothing. Where the head is frozen, the gradient with respect to the hidden states is formed in the same pass
as the loss, chunk by chunk, and the logits are gone before the next chunk.
"""

# S supervised positions, H hidden width, V vocabulary

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from lorafold.quant.linear import QuantLinear, decoded, multiply_into

WHOLE = 64  # the tokens of a pack are rounded up to this at most, see `packed`
SHARED = TrainingConfig.shared_prefix_tokens  # tokens in common that stand once, see `pack`
CHUNK = 256  # supervised positions whose logits exist at once: 256 x V x 2 bytes
_BLOCK = 8192  # rows of a packed head that are decoded at once in float32, where all of them take much memory
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


@dataclass(frozen=True)
class Head:
    """A frozen matrix [V, H], in blocks of rows that are good until the next."""

    rows: int
    blocks: Callable[[], Iterable[tuple[slice, Tensor]]]

    @staticmethod
    def of(weight: Tensor) -> Head:
        """A dense one."""
        return Head(len(weight), lambda: [(slice(0, len(weight)), weight)])


class _FrozenHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        room = hidden.new_empty(min(CHUNK, -(-len(targets) // _FEW) * _FEW), head.rows)
        for start in range(0, len(targets), CHUNK):
            here = slice(start, start + CHUNK)
            rows = len(targets[here])
            part, target = F.pad(hidden[here], (0, 0, 0, -rows % _FEW)), F.pad(targets[here], (0, -rows % _FEW))
            logits = room[: len(part)]
            for block, weight in head.blocks():
                multiply_into(part, weight, logits[:, block])
            losses = _cross_entropy_(logits, target, grad is not None)
            total += losses[:rows].sum()
            if grad is not None:
                part.zero_()  # a copy of its own: F.pad makes one even where nothing is added
                for block, weight in head.blocks():
                    part.addmm_(logits[:, block], weight)
                grad[here] = part[:rows]
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else (grad.float() * grads[0]).to(grad.dtype), None, None


def hidden_states(loaded: LoadedModel, batch: Pack) -> Tensor:
    """Last hidden states [S, H] at the positions of a pack that predict a supervised token.

    The last block may be computed in part for these positions only, see `models/residual.py`.
    """
    out = loaded.model.base_model(
        input_ids=batch.ids[None],
        position_ids=batch.positions[None],
        segments=batch.segments,
        parents=batch.parents,
        wanted=batch.wanted,
        use_cache=False,
    )
    hidden = out.last_hidden_state[0]
    return hidden.index_select(0, batch.target_in if len(hidden) == len(batch.wanted) else batch.target_at)


@contextlib.contextmanager
def head_once(loaded: LoadedModel) -> Iterator[None]:
    """Inside, a packed head that is decoded as a whole is decoded once and serves every pack."""
    head = loaded.model.get_output_embeddings()
    if _is_frozen(loaded, head) and isinstance(head, QuantLinear) and not _in_blocks(loaded, head):
        loaded.head_weight = head.packed.decode(loaded.dtype)
    try:
        yield
    finally:
        loaded.head_weight = None


def _is_frozen(loaded: LoadedModel, head: nn.Module | None) -> bool:
    """Whether a head is a frozen matrix and nothing more."""
    if not isinstance(head, nn.Linear | QuantLinear) or any(p.requires_grad for p in head.parameters()):
        return False
    return head.bias is None and not any(getattr(loaded.model.config, key, None) for key in _LOGIT_CHANGES)


def _in_blocks(loaded: LoadedModel, head: QuantLinear) -> bool:
    """Where it takes much memory, and decoding it for each chunk costs little beside the products."""
    return loaded.dtype == torch.float32 and head.blocks.device.type == "cpu" and head.extra is None


def _frozen_head(loaded: LoadedModel) -> Head | None:
    """A head that is a frozen matrix and nothing more."""
    head = loaded.model.get_output_embeddings()
    if not _is_frozen(loaded, head):
        return None
    if not isinstance(head, QuantLinear):
        assert isinstance(head, nn.Linear)
        return Head.of(head.weight)
    if not _in_blocks(loaded, head):
        return Head.of(head.packed.decode(loaded.dtype) if loaded.head_weight is None else loaded.head_weight)
    matrix, places = head.packed, [slice(at, at + _BLOCK) for at in range(0, head.out_features, _BLOCK)]
    return Head(head.out_features, lambda: ((here, decoded(matrix.rows(here), loaded.dtype)) for here in places))


def packed(loaded: LoadedModel, rows: Sequence[Tokens], shared: int | None = None) -> Pack:
    """Rows as the model takes them, where it lies; `shared` as in `pack`.

    Their tokens are rounded up: a library compiles and keeps something for each size of a product, but not in float32
    on a CPU, where few are added.
    """
    few = loaded.dtype == torch.float32 and loaded.device.type == "cpu"
    return pack(rows, loaded.row_align, shared, WHOLE // 4 if few else WHOLE).to(loaded.device)


def pack_loss(loaded: LoadedModel, batch: Pack) -> Tensor:
    """Sum of the cross-entropies (nats) of a pack's targets, differentiable."""
    frozen, hidden = _frozen_head(loaded), hidden_states(loaded, batch)
    if frozen is not None:
        total: Tensor = _FrozenHeadLoss.apply(hidden, frozen, batch.targets)  # type: ignore[assignment]
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
            batch = packed(loaded, group, shared)
            total += pack_loss(loaded, batch)
            count += len(batch.targets)
            if progress:
                progress(len(group))
    return float(total), count
