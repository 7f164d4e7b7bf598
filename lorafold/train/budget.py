"""Training within a given memory: what a token costs is counted, what everything else costs is measured.

The peak of a step stands at the end of a forward pass, when all activations that the backward pass needs are kept. They
grow with the tokens computed at once, which may be traded for time and change no result; so does checkpointing, which
keeps the inputs of the blocks only.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from lorafold.adapters.adapted import parameters_once
from lorafold.data.tokens import Tokens
from lorafold.errors import DataError, TrainingError
from lorafold.evals.loss import WHOLE, pack_loss, packed
from lorafold.models.attention import KEPT_TOKENS
from lorafold.models.heap import free_at_once
from lorafold.models.load import LoadedModel
from lorafold.train.memory import peak_bytes, restart_peak

_SPARE = 0.05  # of the budget: memory in pieces
_TRIED = 256  # tokens of the pass that is measured
_TRAINED_BYTES = 12  # of a trained number: its gradient and two moments


@dataclass(frozen=True)
class Plan:
    """How a step is computed.

    Attributes:
        micro_batch_tokens: most tokens at once; a longer row stands alone.
        checkpointing: whether blocks are computed again in the backward pass.
        budget: bytes that the process may have; None where nobody said.
        longest: tokens of the longest row that fits the budget.
    """

    micro_batch_tokens: int
    checkpointing: bool
    budget: int | None = None
    longest: int | None = None

    def describe(self) -> str:
        """For the user."""
        again = ", blocks computed again in the backward pass" if self.checkpointing else ""
        limit = f" to stay below {self.budget / 1e9:.2f} GB" if self.budget else ""
        return f"micro-batches of up to {self.micro_batch_tokens:,} tokens{again}{limit}"


def plan_within(
    budget: int, loaded: LoadedModel, rows: Sequence[Tokens], most: int, checkpointing: bool = False
) -> Plan:
    """The largest micro-batches that stay below a budget, with checkpointing only if nothing else does.

    Args:
        budget: bytes of the process, or of the GPU where the model is on one.
        loaded: the model, with its adapters.
        rows: the training rows.
        most: tokens of a micro-batch that are never exceeded.
        checkpointing: is used in any case; the model can do it.

    Raises:
        TrainingError: the longest row does not fit, and the message says what would.
    """
    free_at_once()
    longest, needed = max(len(row) for row in rows), 0.0
    training = loaded.model.training
    loaded.model.train()
    try:
        ways = _ways(loaded, _to_try(loaded, rows))
    finally:
        loaded.model.train(training)
    for way in ways:
        tokens = int((budget * (1 - _SPARE) - way.fixed) / way.each) - WHOLE
        if way.checkpointing or not checkpointing:
            if tokens >= longest:
                return Plan(min(tokens, most), way.checkpointing, budget, tokens)
            needed = (way.fixed + way.each * (longest + WHOLE)) / (1 - _SPARE)
    raise TrainingError(
        f"memory: the longest row has {longest} tokens, which takes {needed / 1e9:.2f} GB with this model and "
        f"adapter, and {budget / 1e9:.2f} GB are allowed; allow more, or cut rows with a smaller max_length"
    )


@dataclass(frozen=True)
class _Way:
    """Bytes of everything but activations, and of these by token."""

    checkpointing: bool
    fixed: float
    each: float


def _ways(loaded: LoadedModel, rows: Sequence[Tokens]) -> list[_Way]:
    """To compute a step, as measured with rows; the faster first."""
    each, kept = _kept_by_token(loaded, rows)
    if not loaded.model.supports_gradient_checkpointing:
        return [_Way(False, _fixed_bytes(loaded, rows, each), each)]
    with checkpointed(loaded, True):
        less, kept_less = _kept_by_token(loaded, rows)
        fixed = _fixed_bytes(loaded, rows, less)
    block = each / loaded.model.config.get_text_config().num_hidden_layers  # the one that is computed again
    return [_Way(False, fixed + max(0.0, kept - kept_less), each), _Way(True, fixed, less + block)]


def check_fits(plan: Plan, rows: Sequence[Tokens]) -> None:
    """Refuse a row that was not known when the plan was made and does not fit the budget.

    Raises:
        DataError: names the row.
    """
    longest = max(rows, key=len)
    if plan.longest is not None and len(longest) > plan.longest:
        raise DataError(
            f"memory: row {longest.row} of the data has {len(longest):,} tokens, and {plan.longest:,} fit the memory "
            "that is allowed; allow more, or cut rows with a smaller max_length"
        )


@contextlib.contextmanager
def checkpointed(loaded: LoadedModel, wanted: bool) -> Iterator[None]:
    """Inside, blocks are computed again in the backward pass, or not.

    Raises:
        TrainingError: transformers cannot do that with this model.
    """
    if not wanted:
        yield
        return
    check_checkpointing(loaded)
    with warnings.catch_warnings():  # transformers has newer names for both
        warnings.simplefilter("ignore", FutureWarning)
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            loaded.model.gradient_checkpointing_disable()


def check_checkpointing(loaded: LoadedModel) -> None:
    """Refuse a model that transformers cannot compute again in the backward pass.

    Raises:
        TrainingError: names its class.
    """
    if not loaded.model.supports_gradient_checkpointing:
        kind = type(loaded.model).__name__
        raise TrainingError(f"gradient_checkpointing: transformers cannot do it with {kind}; leave it out")


def _to_try(loaded: LoadedModel, rows: Sequence[Tokens]) -> list[Tokens]:
    """Rows of `_TRIED` tokens, or some more, all supervised; long ones where attention weights are kept."""
    if loaded.row_align == 1:
        row = min(rows, key=lambda row: abs(len(row) - _TRIED))
        row = replace(row, ids=row.ids[:_TRIED], supervised=row.supervised[:_TRIED])
    else:
        row = max(rows, key=lambda row: (len(row) <= KEPT_TOKENS, len(row) if len(row) <= KEPT_TOKENS else -len(row)))
    return [replace(row, supervised=[False] + [True] * (len(row) - 1))] * math.ceil(_TRIED / len(row))


def _fixed_bytes(loaded: LoadedModel, rows: Sequence[Tokens], each: float) -> float:
    """Bytes of everything but activations (process, model, decoded weights, logits, optimizer), measured in a pass.

    Args:
        each: bytes that this pass keeps by token; little where blocks are computed again.
    """
    batch = packed(loaded, rows)
    for _ in range(2):  # the first compiles what is not compiled yet
        restart_peak()
        with parameters_once(loaded.model):
            pack_loss(loaded, batch).backward()
        loaded.model.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    return peak_bytes() - each * len(batch.ids) + _TRAINED_BYTES * trained


def _kept_by_token(loaded: LoadedModel, rows: Sequence[Tokens]) -> tuple[float, float]:
    """Bytes kept for the backward pass by token, which as many rows again, or some more, keep beyond these; the rest.

    The rest is of weights that are made for a pass, where an adapter changes them before they are used.
    """
    again = math.ceil(WHOLE / sum(map(len, rows)))
    (some, fewer), (rest, more) = (_bytes_kept(loaded, [*rows] * times) for times in (1, 1 + again))
    each = (rest - some) / (more - fewer)
    return each, some - each * fewer


def _bytes_kept(loaded: LoadedModel, rows: Sequence[Tokens]) -> tuple[int, int]:
    """Bytes that a backward pass would find kept of rows, and their tokens; parameters are not counted.

    Nothing is kept for it: each tensor is counted and dropped, so that counting takes no more than an evaluation.
    """
    own = {StorageWeakRef(t.untyped_storage()) for t in [*loaded.model.parameters(), *loaded.model.buffers()]}
    kept: dict[StorageWeakRef, int] = {}  # a reference keeps another tensor from having the same name

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if (name := StorageWeakRef(storage)) not in own:
            kept[name] = storage.nbytes()

    def find(_: None) -> Tensor:
        raise AssertionError("no backward pass follows")

    with parameters_once(loaded.model), torch.autograd.graph.saved_tensors_hooks(count, find):
        batch = packed(loaded, rows)
        pack_loss(loaded, batch)
    return sum(kept.values()), len(batch.ids)
