"""Training within a given memory: what a token costs is counted, what everything else costs is measured.

The peak of a step stands at the end of a forward pass, when all activations that the backward pass needs are kept. They
grow with the tokens computed at once, which may be traded for time and change no result; so does checkpointing, which
keeps the inputs of the blocks only.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
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
LARGEST_MICRO_BATCH = 4096  # tokens; larger ones are no faster
TRIED = 256  # tokens of the pass that is measured
_TIMES = 4  # as many rows show what a token takes at the peak
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


Pass = Callable[[int], tuple[Tensor, int]]  # the loss of some rows, as often as it says, and the tokens it took


@dataclass(frozen=True)
class Trial:
    """What is tried to find out what a step takes.

    Attributes:
        loss: a pass over rows of `TRIED` tokens or more.
        longest: tokens of the longest row.
        spare: tokens that may be computed beyond a limit, or beyond the longest row.
        most: tokens of which more at once bring nothing.
        held: bytes that a step holds whatever is computed at once.
        measured: a pass holds more by token than what it keeps and one block, so that has to be measured, too.
        cut: what a step may have fewer of, for the user.
        what: a row, for the user.
    """

    loss: Pass
    longest: int
    spare: int
    most: int = LARGEST_MICRO_BATCH
    held: int = 0
    measured: bool = True
    cut: str = ""
    what: str = "row"


def plan_within(budget: int, loaded: LoadedModel, trial: Trial, most: int, checkpointing: bool = False) -> Plan:
    """The largest micro-batches that stay below a budget, with checkpointing only if nothing else does.

    Args:
        budget: bytes of the process, or of the GPU where the model is on one.
        loaded: the model, with its adapters.
        trial: a pass as those of training, and what rows there are.
        most: tokens of a micro-batch that are never exceeded.
        checkpointing: is used in any case; the model can do it.

    Raises:
        TrainingError: the longest row does not fit, and the message says what would.
    """
    free_at_once()
    training, needed = loaded.model.training, 0.0
    loaded.model.train()
    try:
        ways = _ways(loaded, trial, budget)
    finally:
        loaded.model.train(training)
    for way in ways:
        fixed = way.fixed + trial.held
        tokens = int((budget * (1 - _SPARE) - fixed) / way.each) - trial.spare
        if way.checkpointing or not checkpointing:
            if tokens >= trial.longest:
                return Plan(min(tokens, most), way.checkpointing, budget, tokens)
            needed = (fixed + way.each * (trial.longest + trial.spare)) / (1 - _SPARE)
    raise TrainingError(
        f"memory: the longest {trial.what} has {trial.longest} tokens, which takes {needed / 1e9:.2f} GB with this "
        f"model and adapter, and {budget / 1e9:.2f} GB are allowed; allow more, or "
        + (trial.cut if trial.held > needed / 4 else f"cut {trial.what}s with a smaller max_length")
    )


def trial_of_packs(loaded: LoadedModel, rows: Sequence[Tokens]) -> Trial:
    """Training rows of a language model, whose kernels put gradients where activations stood."""
    return Trial(pass_over(loaded, _to_try(loaded, rows)), max(map(len, rows)), WHOLE, measured=False)


def pass_over(loaded: LoadedModel, rows: Sequence[Tokens]) -> Pass:
    """A pack of rows."""

    def loss(times: int) -> tuple[Tensor, int]:
        batch = packed(loaded, [*rows] * times)
        return pack_loss(loaded, batch), len(batch.ids)

    return loss


@dataclass(frozen=True)
class _Way:
    """Bytes of everything but activations, and of these by token."""

    checkpointing: bool
    fixed: float
    each: float


def _ways(loaded: LoadedModel, trial: Trial, budget: int) -> list[_Way]:
    """To compute a step, as measured with a pass; the faster first."""
    each, kept = _kept_by_token(loaded, trial.loss)
    block = each / loaded.model.config.get_text_config().num_hidden_layers
    if not loaded.model.supports_gradient_checkpointing:
        return [_Way(False, *_measured(loaded, trial, each, 2 * block, budget))]
    with checkpointed(loaded, True):
        less, kept_less = _kept_by_token(loaded, trial.loss)
        fixed, again = _measured(loaded, trial, less, 2 * block, budget)
    besides = again - less
    if not trial.measured:  # of a block that is computed again, whose gradients take the place of what it keeps
        besides, again = 0.0, less + block
    return [_Way(False, fixed + max(0.0, kept - kept_less), each + besides), _Way(True, fixed, again)]


def _measured(loaded: LoadedModel, trial: Trial, kept: float, foreseen: float, budget: int) -> tuple[float, float]:
    """Bytes of everything but activations, and by token of all that a pass holds at its peak.

    Args:
        kept: bytes by token that are kept until the backward pass.
        foreseen: bytes by token beside these, where a pass over more rows could take more than is allowed.
    """
    peak, tokens = _peak_of(loaded, trial.loss, 1)
    if not trial.measured:
        return peak - kept * tokens, kept
    by_token = kept + foreseen
    if peak + (_TIMES - 1) * by_token * tokens < budget:
        higher, more = _peak_of(loaded, trial.loss, _TIMES)
        by_token = max(kept, (higher - peak) / (more - tokens))
    return peak - by_token * tokens, by_token


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
    loaded.model.disable_input_require_grads()  # transformers lets embeddings ask for gradients, and never ends that
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
    """Rows of `TRIED` tokens, or some more, all supervised; long ones where attention weights are kept."""
    if loaded.row_align == 1:
        row = min(rows, key=lambda row: abs(len(row) - TRIED))
        row = replace(row, ids=row.ids[:TRIED], supervised=row.supervised[:TRIED])
    else:
        row = max(rows, key=lambda row: (len(row) <= KEPT_TOKENS, len(row) if len(row) <= KEPT_TOKENS else -len(row)))
    return [replace(row, supervised=[False] + [True] * (len(row) - 1))] * math.ceil(TRIED / len(row))


def _peak_of(loaded: LoadedModel, loss: Pass, times: int) -> tuple[float, int]:
    """Bytes of the process at the peak of a step over so many times the rows, and the tokens of these."""
    tokens = 0
    for _ in range(2):  # the first compiles what is not compiled yet
        restart_peak()
        with parameters_once(loaded.model):
            value, tokens = loss(times)
            value.backward()
        del value
        loaded.model.zero_grad(set_to_none=True)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    return peak_bytes() + _TRAINED_BYTES * trained, tokens


def _kept_by_token(loaded: LoadedModel, loss: Pass) -> tuple[float, float]:
    """Bytes kept for the backward pass by token, which as many rows again keep beyond these; the rest.

    The rest is of weights that are made for a pass, where an adapter changes them before they are used.
    """
    (some, fewer), (rest, more) = (_bytes_kept(loaded, loss, times) for times in (1, 2))
    each = (rest - some) / (more - fewer)
    return each, some - each * fewer


def _bytes_kept(loaded: LoadedModel, loss: Pass, times: int = 1) -> tuple[int, int]:
    """Bytes that a backward pass would find kept of so many times the rows, and their tokens, without parameters.

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
        _, tokens = loss(times)
    return sum(kept.values()), tokens
