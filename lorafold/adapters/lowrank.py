"""An update as two factors,  s B A,  and what can be said of it without ever forming the product.

With  B = Q_B R_B  and  A^T = Q_A R_A  the singular values of s B A are those of the small matrix  s R_B R_A^T,  and
the best approximation of a rank (Eckart and Young) follows from its SVD, in O((in + out) r^2) instead of
O(in out min(in, out)). All of it in float64.
"""

# r rank, I input features (or groups of them), O output features

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorafold.config import RankConfig


@dataclass(frozen=True)
class LowRank:
    """s B A.

    Attributes:
        a: A [r, I].
        b: B [O, r].
        scaling: s.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """r, of the factors; that of the product may be lower."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.b.shape[0], self.a.shape[1]

    def dense(self) -> Tensor:
        """The product itself [O, I]."""
        return self.scaling * (self.b @ self.a)


@dataclass(frozen=True)
class Reduced:
    """An approximation.

    Attributes:
        update: what is left, with s = 1 and the singular values shared between both factors, float32.
        kept: sum of squared singular values that is left.
        total: sum of all squared singular values: the squared Frobenius norm.
    """

    update: LowRank
    kept: float
    total: float

    @property
    def share(self) -> float:
        """Share of the energy that is left; 1 where there was none."""
        return self.kept / self.total if self.total else 1.0


def singular_values(update: LowRank) -> Tensor:
    """Singular values of s B A, falling, [min(r, I, O)] float64."""
    return torch.linalg.svdvals(_core(update)[0])


def stacked(updates: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of updates, exactly: A's on top of each other, B's side by side; the ranks add up."""
    a = torch.cat([u.a * (w * u.scaling) for u, w in zip(updates, weights, strict=True)])
    return LowRank(a, torch.cat([u.b for u in updates], dim=1))


def reduced(update: LowRank, size: RankConfig) -> Reduced:
    """The best approximation of the given rank, or of the least rank that keeps the given share of the energy."""
    core, q_b, q_a = _core(update)
    u, s, vt = torch.linalg.svd(core, full_matrices=False)
    return _cut(q_b @ u, s, vt @ q_a.T, size)


def reduced_dense(matrix: Tensor, size: RankConfig) -> Reduced:
    """The same of a matrix [O, I] that has no factors, in its own precision."""
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, vt, size)


def padded(update: LowRank, rank: int) -> LowRank:
    """The same update with factors of a higher rank, filled up with zeros."""
    missing = rank - update.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(update.a, (0, 0, 0, missing)), pad(update.b, (0, missing)), update.scaling)


def effective_rank(values: Tensor) -> float:
    """exp(-sum p ln p) with p = values / sum of values (Roy and Vetterli, EUSIPCO 2007); 0 for a zero matrix."""
    total = values.sum()
    if not total:
        return 0.0
    p = values / total
    return math.exp(float(torch.special.entr(p).sum()))


def stable_rank(values: Tensor) -> float:
    """Squared Frobenius norm by squared spectral norm (Rudelson and Vershynin 2007); 0 for a zero matrix."""
    largest = values.max()
    return float((values / largest).square().sum()) if largest else 0.0


def _core(update: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """s R_B R_A^T with Q_B [O, min(r, O)] and Q_A [I, min(r, I)]."""
    q_b, r_b = torch.linalg.qr(update.b.double())
    q_a, r_a = torch.linalg.qr(update.a.double().T)
    return update.scaling * (r_b @ r_a.T), q_b, q_a


def _cut(u: Tensor, s: Tensor, vt: Tensor, size: RankConfig) -> Reduced:
    energies = s.double().square().cumsum(0)
    total = float(energies[-1])
    if size.energy is None:
        rank = min(size.r or 1, len(s))
    else:
        rank = min(int((energies < size.energy * total).sum()) + 1, len(s))
    root = s[:rank].sqrt()
    update = LowRank((root[:, None] * vt[:rank]).float(), (u[:, :rank] * root).float())
    return Reduced(update, float(energies[rank - 1]), total)
