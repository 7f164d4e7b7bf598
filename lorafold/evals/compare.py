"""How closely a runtime agrees with the torch model on the same tokens.

A runtime rounds activations (llama.cpp to 8 bits) and so never agrees exactly. The yardstick is the null run: the
untouched base file against the base model. A folded file must agree with the trained model as closely as that.
"""

# T tokens of a row, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F

from lorafold.data.tokens import Tokens
from lorafold.models.load import LoadedModel

# bounds on a folded file, relative to the null run
KL_FACTOR, TOP1_LOSS, LOSS_SLACK = 1.5, 0.01, 0.002
KL_ROUNDING = 1e-6  # nats that float32 logits alone may leave, of either sign
SMALL_KL, SMALL_KL_FACTOR = 5e-4, 3.0  # below, as float16 leaves it, a few tokens make the mean; more is left to them
# Two shares of some 4 % over T tokens differ by chance by sqrt(2 * 0.04 * 0.96 / T): 0.6 points at 2,000, 0.9 at 1,000,
# 3 at 85. So top-1 agreement may fall by a point and two such standard errors more. The KL averages over whole
# distributions and is steady long before.
STANDARD_ERRORS = 2.0
ENOUGH_TOKENS = 1000


class Runtime(Protocol):
    """What executes a model file."""

    def logits(self, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Logits after each token of a row, block by block: (position of the first, float32 [tokens, V])."""
        ...


@dataclass(frozen=True)
class Agreement:
    """Torch against a runtime, over all next-token predictions of some rows.

    Attributes:
        tokens: number of predictions compared.
        mean_kl: mean KL(torch || runtime) in nats.
        top1: share of predictions whose likeliest token is the same.
        loss_torch, loss_runtime: mean cross-entropy of the actual next tokens, in nats.
    """

    tokens: int
    mean_kl: float
    top1: float
    loss_torch: float
    loss_runtime: float

    @property
    def loss_gap(self) -> float:
        """|loss_torch - loss_runtime|."""
        return abs(self.loss_torch - self.loss_runtime)

    def as_close_as(self, null: Agreement) -> list[str]:
        """Bounds that this agreement breaks, measured against the null run; empty when it is as close.

        Below `ENOUGH_TOKENS` predictions only the KL is judged.
        """
        broken = []
        small = min(SMALL_KL_FACTOR * null.mean_kl, SMALL_KL)
        allowed = max(KL_FACTOR * null.mean_kl, small, KL_ROUNDING)
        if not self.mean_kl <= allowed:  # so written, what is not a number fails too
            bound = f"{allowed:.2e}, what rounding may leave where the null run has {null.mean_kl:.2e}"
            broken.append(f"mean KL {self.mean_kl:.2e} is over {bound}")
        if self.tokens < ENOUGH_TOKENS:
            return broken
        by_chance = math.sqrt(2 * null.top1 * (1 - null.top1) / self.tokens)
        margin = TOP1_LOSS + STANDARD_ERRORS * by_chance
        if not self.top1 >= null.top1 - margin:
            points = f"{100 * margin:.1f} points"
            broken.append(f"top-1 agreement {self.top1:.2%} is over {points} below the null run's {null.top1:.2%}")
        if not self.loss_gap <= null.loss_gap + LOSS_SLACK:
            broken.append(f"the losses are {self.loss_gap:.4f} apart, the null run's {null.loss_gap:.4f}")
        return broken


@torch.no_grad()
def agreement(
    loaded: LoadedModel,
    runtime: Runtime,
    rows: Iterable[Tokens],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> Agreement:
    """Compare next-token distributions over rows, until `max_tokens` predictions are reached.

    Args:
        loaded: the torch model; float32 makes a fair reference.
        runtime: the file in llama.cpp or MLX, with a vocabulary of the same size.
        progress: called with the number of predictions done after each row.
    """
    kl = hits = loss_torch = loss_runtime = 0.0
    count = 0
    for row in rows:
        if count >= max_tokens:
            break
        ids = torch.tensor(row.ids)
        ours = loaded.model(input_ids=ids[None].to(loaded.device), use_cache=False).logits[0].float().cpu()
        for start, block in runtime.logits(row.ids):
            theirs = torch.from_numpy(block)
            end = min(start + len(theirs), len(ids) - 1)  # the last position predicts nothing known
            if end <= start:
                continue
            p, q = ours[start:end].log_softmax(-1), theirs[: end - start].log_softmax(-1)
            target = ids[start + 1 : end + 1]
            kl += float(F.kl_div(q, p, log_target=True, reduction="sum"))
            hits += int((p.argmax(-1) == q.argmax(-1)).sum())
            loss_torch += float(F.nll_loss(p, target, reduction="sum"))
            loss_runtime += float(F.nll_loss(q, target, reduction="sum"))
        count += len(ids) - 1
        if progress:
            progress(len(ids) - 1)
    return Agreement(count, kl / count, hits / count, loss_torch / count, loss_runtime / count)


def runtime_loss(runtime: Runtime, rows: Iterable[Tokens], progress: Callable[[int], None] | None = None) -> float:
    """Mean cross-entropy (nats) per supervised token of a file as its runtime computes it."""
    total, count = 0.0, 0
    for row in rows:
        supervised = torch.tensor(row.supervised)
        ids = torch.tensor(row.ids)
        for start, block in runtime.logits(row.ids):
            end = min(start + len(block), len(ids) - 1)
            if end <= start:
                continue
            keep = supervised[start + 1 : end + 1]
            log_p = torch.from_numpy(block)[: end - start][keep].log_softmax(-1)
            total += float(F.nll_loss(log_p, ids[start + 1 : end + 1][keep], reduction="sum"))
        count += int(supervised.sum())
        if progress:
            progress(1)
    return total / count
