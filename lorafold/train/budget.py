"""Training within a given memory: what a token costs is counted, what everything else costs is measured.

The peak of a step stands at the end of a forward pass, when all activations that the backward pass needs are kept. They
grow with the tokens computed at once, which may be traded for time and change no result; so does checkpointing, which
keeps the inputs of the blocks only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.adapters.inject import group_parameters_once
from lorafold.data.packs import pack
from lorafold.data.tokens import Tokens
from lorafold.errors import TrainingError
from lorafold.evals.loss import ALIGN, pack_loss
from lorafold.models.load import LoadedModel
from lorafold.train.memory import peak_bytes, resident_bytes, restart_peak, return_freed_memory

_SPARE = 0.06  # of the budget: memory in pieces
_NEARLY = 0.9  # of the budget: above it, what is free is given back between micro-batches


@dataclass(frozen=True)
class Plan:
    """How a step is computed.

    Attributes:
        micro_batch_tokens: most tokens at once; a longer row stands alone.
        checkpointing: whether blocks are computed again in the backward pass.
        budget: bytes that the process may have; None where nobody said.
    """

    micro_batch_tokens: int
    checkpointing: bool
    budget: int | None = None

    def between_passes(self) -> None:
        """Give free memory back where the process comes near its budget."""
        if self.budget and resident_bytes() > _NEARLY * self.budget:
            return_freed_memory()


def plan_within(budget: int, loaded: LoadedModel, rows: Sequence[Tokens], most: int) -> Plan:
    """The largest micro-batches that stay below a budget, with checkpointing only if nothing else does.

    Args:
        budget: bytes of the process, or of the GPU where the model is on one.
        loaded: the model, with its adapters.
        rows: the training rows.
        most: tokens of a micro-batch that are never exceeded.

    Raises:
        TrainingError: the longest row does not fit; the message says what would.
    """
    shortest, longest = min(rows, key=len), max(rows, key=len)
    largest = len(longest) + 4 * ALIGN
    needed = 0
    for checkpointing in (False, True):
        with checkpointed(loaded, checkpointing):
            fixed, each = _fixed_bytes(loaded, shortest), _bytes_per_token(loaded, shortest)
        tokens = int((budget * (1 - _SPARE) - fixed) / each)
        if tokens >= largest:
            return Plan(min(tokens, most), checkpointing, budget)
        needed = int((fixed + each * largest) / (1 - _SPARE))
    raise TrainingError(
        f"memory: the longest row has {len(longest)} tokens, which takes {needed / 1e9:.2f} GB with this model and "
        f"adapter, and {budget / 1e9:.2f} GB are allowed; allow more, or cut rows with a smaller max_length"
    )


class checkpointed:
    """Inside, blocks are computed again in the backward pass, or not."""

    def __init__(self, loaded: LoadedModel, wanted: bool):
        self.model, self.wanted = loaded.model, wanted

    def __enter__(self) -> None:
        if self.wanted:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.model.gradient_checkpointing_disable()


def _probe(loaded: LoadedModel, row: Tokens) -> tuple[Tensor, int]:
    batch = pack([row], ALIGN).to(loaded.device)
    return pack_loss(loaded, batch), len(batch.ids)


def _fixed_bytes(loaded: LoadedModel, row: Tokens) -> int:
    """The peak of one short forward and backward pass: the process, the model, decoded weights, logits, compiled code."""
    loaded.model.train()
    restart_peak()
    with group_parameters_once(loaded.model):
        loss, _tokens = _probe(loaded, row)
        loss.backward()
    loaded.model.zero_grad(set_to_none=True)
    return peak_bytes()


def _bytes_per_token(loaded: LoadedModel, row: Tokens) -> float:
    """What is kept for the backward pass, by token; parameters and what they share with activations not counted."""
    own = {p.untyped_storage().data_ptr() for p in loaded.model.parameters()}
    own |= {b.untyped_storage().data_ptr() for b in loaded.model.buffers()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with group_parameters_once(loaded.model), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        own |= {leaf.untyped_storage().data_ptr() for leaf in _leaves(loaded)}
        loss, tokens = _probe(loaded, row)
        loss.backward()
    loaded.model.zero_grad(set_to_none=True)
    return sum(kept.values()) / tokens


def _leaves(loaded: LoadedModel) -> list[Tensor]:
    """Offsets and scales that serve a whole step."""
    pairs = [getattr(module, "_once", None) or () for module in loaded.model.modules()]
    return [leaf for pair in pairs for leaf in pair if leaf is not None]
