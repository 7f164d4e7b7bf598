"""Combinations and reductions against dense float64 matrices, and against PEFT's own functions on the same tensors."""

from __future__ import annotations

import math
import warnings
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafold.adapters.arithmetic import combine, combine_tensors
from lorafold.adapters.lowrank import (
    LowRank,
    effective_rank,
    padded,
    reduced,
    reduced_dense,
    singular_values,
    stable_rank,
    stacked,
)
from lorafold.config import CombineConfig, RankConfig
from lorafold.config.arithmetic import FACTORWISE, PRUNING, Combination
from lorafold.errors import ConfigError

EXACT = 1e-5  # float32: entries of about 1, products of up to 20 of them


def random(rank: int, out: int, width: int, seed: int, scaling: float = 1.0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(shape, generator=generator) for shape in ((rank, width), (out, rank)))
    return LowRank(a, b, scaling)


def dense(update: LowRank) -> Tensor:
    return update.scaling * (update.b.double() @ update.a.double())


updates = st.builds(
    random,
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(0, 2**32),
    st.floats(-3, 3).filter(lambda s: abs(s) > 0.01),
)


@settings(max_examples=100, deadline=None)
@given(updates)
def test_singular_values_are_those_of_the_product(update: LowRank) -> None:
    """Ranks above both sides included."""
    ours, theirs = singular_values(update), torch.linalg.svdvals(dense(update))
    torch.testing.assert_close(ours, theirs[: len(ours)], atol=1e-11, rtol=1e-11)
    assert not theirs[len(ours) :].gt(1e-11).any()


@settings(max_examples=100, deadline=None)
@given(updates, st.integers(1, 14))
def test_reduction_is_the_best_of_its_rank(update: LowRank, rank: int) -> None:
    """Eckart and Young: the error is exactly the singular values that were cut off, and no rank r is nearer."""
    result = reduced(update, RankConfig(rank))
    values = torch.linalg.svdvals(dense(update))
    error = (dense(result.update) - dense(update)).square().sum()
    total = values.square().sum()
    assert result.update.rank == min(rank, update.rank, *update.shape)
    assert float(error) == pytest.approx(float(values[rank:].square().sum()), abs=1e-10 * float(total))
    assert result.total == pytest.approx(float(total), rel=1e-10)
    assert result.total - result.kept == pytest.approx(float(error), abs=1e-10 * float(total))
    whole = reduced_dense(dense(update), RankConfig(rank))
    torch.testing.assert_close(dense(whole.update), dense(result.update), atol=1e-4, rtol=0)


@settings(max_examples=100, deadline=None)
@given(updates, st.floats(0.01, 1))
def test_the_least_rank_that_keeps_the_energy(update: LowRank, energy: float) -> None:
    result = reduced(update, RankConfig(energy=energy))
    squares = singular_values(update).square()
    rank = result.update.rank
    assert squares[:rank].sum() >= (energy - 1e-12) * squares.sum()
    assert squares[: rank - 1].sum() < energy * squares.sum()
    assert result.share == pytest.approx(float(squares[:rank].sum() / squares.sum()), rel=1e-9)


def test_all_energy_drops_ranks_that_hold_none() -> None:
    """An adapter stacked on itself has half of its ranks; each factor takes the root of the singular values."""
    update = random(4, 30, 40, 0)
    result = reduced(stacked([update, update], [0.5, 0.5]), RankConfig(energy=1 - 1e-12)).update
    assert result.rank == 4
    torch.testing.assert_close(dense(result), dense(update), atol=EXACT, rtol=0)
    values = singular_values(update).float()
    torch.testing.assert_close(result.a.square().sum(1), values, rtol=1e-5, atol=0)
    torch.testing.assert_close(result.b.square().sum(0), values, rtol=1e-5, atol=0)


def test_zero_updates() -> None:
    zero = LowRank(torch.randn(3, 8), torch.zeros(5, 3))
    result = reduced(zero, RankConfig(energy=0.9))
    assert result.share == 1
    assert result.update.rank == 1
    assert not dense(result.update).any()
    assert effective_rank(singular_values(zero)) == stable_rank(singular_values(zero)) == 0


def test_padding_changes_nothing() -> None:
    update = random(3, 5, 7, 0, 0.5)
    assert torch.equal(padded(update, 6).dense(), update.dense())
    assert padded(update, 6).rank == 6


@pytest.mark.parametrize(
    ("values", "effective", "stable"),
    [
        ([2.0, 2.0, 2.0, 2.0], 4.0, 4.0),
        ([3.0, 0.0, 0.0], 1.0, 1.0),
        ([3.0, 1.0], math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)), 10 / 9),  # p = 3/4, 1/4
    ],
)
def test_ranks_by_hand(values: list[float], effective: float, stable: float) -> None:
    assert effective_rank(torch.tensor(values).double()) == pytest.approx(effective, rel=1e-12)
    assert stable_rank(torch.tensor(values).double()) == pytest.approx(stable, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 20),
    st.lists(st.tuples(st.integers(1, 6), st.floats(-2, 2), st.floats(-2, 2)), min_size=1, max_size=4),
)
def test_cat_is_the_weighted_sum(out: int, width: int, parts: list[tuple[int, float, float]]) -> None:
    """Scaling, adding and subtracting, of any ranks."""
    given_updates = [random(rank, out, width, i, scaling) for i, (rank, scaling, _) in enumerate(parts)]
    weights = [weight for _, _, weight in parts]
    result = combine(given_updates, weights, CombineConfig(tuple(weights)), torch.Generator())
    wanted = sum(w * dense(u) for u, w in zip(given_updates, weights, strict=True))
    assert isinstance(wanted, Tensor)
    assert result.rank == sum(update.rank for update in given_updates)
    torch.testing.assert_close(dense(result), wanted, atol=1e-4, rtol=0)  # up to 24 products of up to 4 times 16
    nothing = combine([given_updates[0]] * 2, [1, -1], CombineConfig((1, -1)), torch.Generator())
    assert not dense(nothing).abs().gt(1e-12).any()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FACTORWISE),
    st.integers(1, 6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.lists(st.tuples(st.floats(-2, 2), st.floats(0.1, 2)), min_size=1, max_size=4),
    st.floats(0.05, 1),
    st.sampled_from(["total", "frequency"]),
    st.integers(0, 2**32),
)
def test_factorwise_combinations_are_pefts(
    kind: str,
    rank: int,
    out: int,
    width: int,
    parts: list[tuple[float, float]],
    density: float,
    sign: Any,
    seed: int,
) -> None:
    """The functions PEFT calls, on the same tensors and, where entries are dropped, with the same random numbers."""
    merge = pytest.importorskip("peft.utils.merge_utils")
    given_updates = [random(rank, out, width, i, scaling) for i, (_, scaling) in enumerate(parts)]
    weights = [weight for weight, _ in parts]
    config = CombineConfig(tuple(weights), kind, density if kind in PRUNING else None, None, sign)  # type: ignore[arg-type]
    ours = combine(given_updates, weights, config, torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    scaled = [w * s for w, s in parts]
    signed = torch.tensor([math.sqrt(abs(c)) * (1 if c >= 0 else -1) for c in scaled])
    options: dict[str, Any] = {"density": density} if kind in PRUNING else {}
    options |= {"majority_sign_method": sign} if kind.endswith("ties") else {}
    function = getattr(merge, {"linear": "task_arithmetic"}.get(kind, kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a density of 1 prunes nothing, which PEFT warns of
        a = function([u.a for u in given_updates], signed, **options)
        b = function([u.b for u in given_updates], signed.abs(), **options)
    torch.testing.assert_close(ours.a, a, atol=EXACT, rtol=0)
    torch.testing.assert_close(ours.b, b, atol=EXACT, rtol=0)


def test_what_dare_drops_is_made_up_for() -> None:
    """Over many seeds the mean is the linear combination, and the share of entries is the density."""
    tensors, weights = [random(1, 40, 50, i).b @ random(1, 40, 50, i).a for i in range(2)], [0.7, -0.4]
    config = CombineConfig((0.7, -0.4), "dare_linear", 0.3)
    draws = torch.stack(
        [combine_tensors(tensors, weights, config, torch.Generator().manual_seed(seed)) for seed in range(400)]
    )
    wanted = 0.7 * tensors[0] - 0.4 * tensors[1]
    spread = draws.std(0) / 20  # of the mean of 400
    assert ((draws.mean(0) - wanted).abs() < 5 * spread + 1e-6).all()
    assert float((draws != 0).double().mean()) == pytest.approx(1 - 0.7**2, abs=0.002)  # 800,000 entries
    again = combine_tensors(tensors, weights, config, torch.Generator().manual_seed(3))
    assert torch.equal(again, draws[3])


def test_one_adapter_is_scaled_by_every_combination() -> None:
    update = random(3, 9, 8, 0, 0.5)
    for kind in get_args(Combination):
        config = CombineConfig((-0.3,), kind, 1.0 if kind in PRUNING else None)
        result = combine([update], [-0.3], config, torch.Generator())
        torch.testing.assert_close(dense(result), -0.3 * dense(update), atol=EXACT, rtol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"combination": "sum"}, ["'sum'", "magnitude_prune"]),
        ({"combination": "ties"}, ["needs a density"]),
        ({"density": 0.5}, ["means nothing to cat"]),
        ({"combination": "ties", "density": 0.0}, ["density is 0.0"]),
        ({"combination": "linear", "r": 0}, ["r means nothing to linear", "r is 0"]),
        ({"majority_sign_method": "all", "seed": -1}, ["'all'", "seed is -1"]),
        ({"weights": (1.0, math.nan)}, ["finite"]),
    ],
)
def test_impossible_combinations_are_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        CombineConfig(**{"weights": (1.0,)} | options)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("options", [{}, {"r": 2, "energy": 0.5}, {"r": 0}, {"energy": 1.5}, {"energy": 0.0}])
def test_impossible_sizes_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"either r, a rank, or energy|must be positive|must lie in \(0, 1\]"):
        RankConfig(**options)
