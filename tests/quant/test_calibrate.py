"""Codes, scales and offsets against plain rounding and against GPTQ written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafold.quant import calibrate, refine
from lorafold.quant.calibrate import quantize, recovery
from lorafold.quant.codecs import CODECS
from lorafold.quant.mlx import mlx_codec
from lorafold.quant.refine import fitted, refined
from lorafold.quant.solver import best_candidates, candidates, exchange_codes, round_columns, squared_errors

FORMATS = ("Q4_1", "Q5_1", mlx_codec(2, 32, "F16"), mlx_codec(3, 64, "BF16"), mlx_codec(4, 128, "F32"))
formats = pytest.mark.parametrize("codec", FORMATS)


def _inputs(width: int, rows: int = 600, seed: int = 0) -> Tensor:
    """Inputs whose columns go together, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(rows, width, generator=generator) @ (mix + 0.3 * torch.eye(width))


def _row_errors(weight: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, hessian: Tensor) -> Tensor:
    """(W - V) H (W - V)^T of each row [O] float64."""
    lost = weight.double() - (codes.double() * scale[..., None] + offset[..., None]).flatten(1)
    return ((lost @ hessian.double()) * lost).sum(1)


def _output_error(weight: Tensor, quantized: Tensor, x: Tensor) -> float:
    return float((x @ (quantized - weight).T).square().sum())


@formats
def test_rounding_to_nearest_is_within_half_a_step(codec: str) -> None:
    """And within what rounding scale and offset to their stored type adds, at the largest code."""
    form = CODECS[codec]
    weight = torch.randn(6, 256)
    groups = weight.unflatten(1, (-1, form.group_size))
    step = (groups.amax(-1) - groups.amin(-1)) / ((1 << form.bits) - 1)
    unit = torch.finfo(form.stored).eps
    slack = unit * (groups.abs().amax(-1) + step * (1 << form.bits))
    error = (quantize(weight, codec, "rtn").decode() - weight).abs().unflatten(1, (-1, form.group_size)).amax(-1)
    assert (error <= step / 2 + slack).all()


@formats
def test_each_method_is_better_at_what_it_seeks(codec: str) -> None:
    weight, x = torch.randn(24, 256), _inputs(256)
    hessian = x.T @ x
    near, found = (quantize(weight, codec, method).decode() for method in ("rtn", "search"))  # type: ignore[arg-type]
    weighted = quantize(weight, codec, "search", hessian).decode()
    calibrated = quantize(weight, codec, "gptq", hessian).decode()
    assert (found - weight).square().sum() < (near - weight).square().sum()
    importance = hessian.diagonal()
    by_importance = [float(((w - weight).square() * importance).sum()) for w in (weighted, found)]
    assert by_importance[0] < 1.001 * by_importance[1]  # the inputs are nearly alike in size here
    assert _output_error(weight, calibrated, x) < 0.8 * _output_error(weight, found, x)


def test_gptq_is_its_definition() -> None:
    """Column by column with the inverse of the remaining Hessian, in float64: the same codes but for ties."""
    width, group, form = 64, 32, CODECS[mlx_codec(3, 32, "F32")]
    weight, x = torch.randn(8, width), _inputs(width)
    hessian = (x.T @ x).double()
    damped, factor = calibrate._factored(hessian.float())
    wanted = hessian / hessian.diagonal().mean() + torch.eye(width, dtype=torch.float64) * 0.01
    torch.testing.assert_close(damped.double(), wanted, rtol=1e-5, atol=1e-7)
    scale, offset, codes = calibrate._gptq(weight, factor, form)
    left, expected, total = weight.double().clone(), torch.empty(8, width), torch.zeros(8, dtype=torch.float64)
    for i in range(width):
        inverse = torch.linalg.inv(wanted[i:, i:])
        s, o = scale[:, i // group].double(), offset[:, i // group].double()
        expected[:, i] = ((left[:, i] - o) / s).round().clamp(0, 7)
        lost = left[:, i] - (expected[:, i] * s + o)
        total += lost.square() / inverse[0, 0]
        left[:, i:] -= (lost / inverse[0, 0])[:, None] * inverse[0]
    assert (codes.flatten(1) == expected).float().mean() > 0.99
    error = _row_errors(weight, scale, offset, codes, wanted)
    torch.testing.assert_close(error, total, rtol=1e-2, atol=0)  # what `best_candidates` sums up is the layer's error


def test_gptq_is_refined(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what `refined` makes of GPTQ's choice; candidates weigh errors by what they cost there."""
    weight, hessian, *chosen = _rounded("Q4_1")
    given: list[Tensor] = []
    monkeypatch.setattr(
        calibrate, "candidates", lambda rows, weights, *rest: given.append(weights) or candidates(rows, weights, *rest)
    )
    written = quantize(weight, "Q4_1", "gptq", hessian)
    form, (damped, factor) = CODECS["Q4_1"], calibrate._factored(hessian)
    again = refined(weight, damped, *calibrate._gptq(weight, factor, form), form)
    assert torch.equal(form.scale(written.blocks), again[0])
    assert torch.equal(form.offset(written.blocks), again[1])
    assert torch.equal(form.codes(written.blocks).float(), again[2])
    alone = float(_row_errors(weight, *chosen, hessian).sum())
    assert float(_row_errors(weight, *again, hessian).sum()) < 0.97 * alone
    cost = factor.diagonal()[:32].square().reciprocal()
    torch.testing.assert_close(given[0][0], cost / cost.mean() + 1e-3)


def test_parameters_of_a_group_leave_the_smallest_error() -> None:
    """Of those that are tried, each rounded as GPTQ does: against `round_columns`, one after the other."""
    columns, x = torch.randn(12, 32), _inputs(32)
    factor = calibrate._factored(x.T @ x)[1]
    scale = (columns.amax(1) - columns.amin(1))[:, None] / 7 * torch.tensor([1.0, 0.9, 0.8, 0.7])
    offset = columns.amin(1)[:, None] + torch.rand(12, 4) * 0.2
    scale[3, 1], offset[4, 2] = torch.inf, torch.nan
    errors = [round_columns(columns.clone(), factor, scale[:, i], offset[:, i], 7)[1] for i in range(4)]
    losses = torch.stack([e.square().sum(1) for e in errors], 1).nan_to_num(nan=torch.inf)
    assert torch.equal(best_candidates(columns, factor, scale, offset, 7), losses.argmin(1, keepdim=True))


@formats
@pytest.mark.parametrize("method", ["rtn", "search", "gptq"])
def test_groups_without_spread_and_inputs_that_never_come(codec: str, method: str) -> None:
    """Equal weights are kept as the offset stores them; a layer whose inputs were all zero is still quantized."""
    weight = torch.full((3, 256), 0.3)
    weight[1] = 0
    weight[2] = torch.linspace(-1, 1, 256)
    stored = weight.to(CODECS[codec].stored).float()
    decoded = quantize(weight, codec, method, torch.zeros(256, 256)).decode()  # type: ignore[arg-type]
    assert torch.equal(decoded[:2], stored[:2])
    assert (decoded[2] - weight[2]).abs().max() < 0.5


@pytest.mark.parametrize("scale", [1e-7, 1e-3, 1e4])
@formats
def test_sizes_of_weights(codec: str, scale: float) -> None:
    """Far smaller or larger weights than usual: as good, down to the smallest numbers that the parameters can be."""
    weight = torch.randn(4, 256) * scale
    decoded = quantize(weight, codec, "search").decode()
    smallest = torch.finfo(CODECS[codec].stored).smallest_normal * torch.finfo(CODECS[codec].stored).eps
    bound = {2: 0.45, 3: 0.25, 4: 0.15, 5: 0.08}[CODECS[codec].bits] * scale + 32 * smallest
    assert (decoded - weight).square().mean().sqrt() < bound


def _rounded(codec: str, width: int = 256, rows: int = 10) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Weights, a Hessian, and what GPTQ makes of both."""
    weight, x = torch.randn(rows, width), _inputs(width)
    hessian, factor = calibrate._factored(x.T @ x)
    return weight, hessian, *calibrate._gptq(weight, factor, CODECS[codec])


def test_parameters_are_fitted_as_least_squares_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against lstsq in float64, a row at a time; three rows of equations at once, which is not a divisor of ten."""
    codec = mlx_codec(3, 32, "F32")
    weight, hessian, scale, offset, codes = _rounded(codec, 128)
    monkeypatch.setattr(refine, "_FITTED_BYTES", 3 * 32 * 4 * 4)
    monkeypatch.setattr(refine, "_RIDGE", 1e-12)
    found = fitted(weight, hessian, scale, offset, codes, CODECS[codec])
    root = torch.linalg.cholesky(hessian.double()).T
    for r in range(len(weight)):
        columns = [torch.block_diag(*codes[r].double()[:, None]).T, torch.block_diag(*torch.ones(4, 1, 32).double()).T]
        fit = torch.linalg.lstsq(root @ torch.cat(columns, 1), root @ weight[r].double()).solution
        torch.testing.assert_close(torch.cat([x[r] for x in found]).double(), fit, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("codec", [*FORMATS, mlx_codec(8, 32, "BF16")])
def test_each_step_of_refining_lowers_the_error_of_every_row(codec: str) -> None:
    """Also where parameters are stored so coarsely that the best ones, rounded, are worse than those of before."""
    weight, hessian, scale, offset, codes = _rounded(codec)
    form = CODECS[codec]
    codes[2, 1] = 0  # so that this scale is any number
    before = _row_errors(weight, scale, offset, codes, hessian)
    new = fitted(weight, hessian, scale, offset, codes, form)
    after = _row_errors(weight, *new, codes, hessian)
    assert (after <= before * (1 + 1e-4)).all()
    assert after[2] < before[2]
    assert all(torch.equal(form.as_stored(x), x) for x in new)
    lost = (weight - (codes * new[0][..., None] + new[1][..., None]).flatten(1)) @ hessian
    exchanged = codes.clone()
    exchange_codes(exchanged, lost, hessian, new[0], form.largest_code, 1)
    last = _row_errors(weight, *new, exchanged, hessian)
    assert (last <= after * (1 + 1e-4)).all()
    total = [float(x.sum()) for x in (before, after, last)]
    scale, offset, codes = refined(weight, hessian, scale, offset, codes, form)
    whole = float(_row_errors(weight, scale, offset, codes, hessian).sum())
    more = fitted(weight, hessian, scale, offset, codes, form)  # nothing is left to be fitted
    assert float(_row_errors(weight, *more, codes, hessian).sum()) > 0.999 * whole
    assert whole < (1 if form.bits < 5 else 1 + 1e-4) * total[2]
    assert whole < (0.97 if form.bits < 5 else 1.0) * total[0]


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_parameters_costs_no_row_anything(bits: int) -> None:
    """Offsets far from zero, in bfloat16, are stored in coarser steps than the weights: rows stay or gain."""
    codec = mlx_codec(bits, 32, "BF16")
    weight, x = torch.randn(64, 256) * 0.1 + 3, _inputs(256)
    hessian, factor = calibrate._factored(x.T @ x)
    scale, offset, codes = calibrate._gptq(weight, factor, CODECS[codec])
    before = _row_errors(weight, scale, offset, codes, hessian)
    after = _row_errors(weight, *fitted(weight, hessian, scale, offset, codes, CODECS[codec]), codes, hessian)
    assert (after <= before * (1 + 1e-4)).all()
    if bits == 4:
        assert (after < before).float().mean() > 0.9


def test_parameters_that_overflow_stay() -> None:
    """And the rest of their row is fitted."""
    form = CODECS["Q4_1"]
    weight, hessian, scale, offset, codes = _rounded("Q4_1", 64, 4)
    weight[1, :32] = torch.linspace(-65504, 65504, 32)
    scale[1, 0], offset[1, 0], codes[1, 0] = 8732, -65504, torch.linspace(0, 15, 32).round()
    weight[1, 3] = -3e6  # the best offset would be less than float16 has
    before = _row_errors(weight, scale, offset, codes, hessian)
    new = fitted(weight, hessian, scale, offset, codes, form)
    assert all(x.isfinite().all() for x in new)
    assert (_row_errors(weight, *new, codes, hessian) <= before * (1 + 1e-4)).all()


def test_scales_too_small_to_be_divided_by() -> None:
    """In float32 such a scale has no reciprocal; its group is rounded to its offset, not to something undefined."""
    torch.manual_seed(0)
    weight = torch.randn(2, 64) * 0.1
    weight[0, :32] = torch.randn(32) * 1e-39
    found = quantize(weight, mlx_codec(4, 32, "F32"), "gptq", torch.eye(64))
    assert (found.decode() - weight).square().sum() < 0.02


def test_codes_are_exchanged_until_no_other_is_better() -> None:
    """In float64 no code beside its neighbours leaves a smaller error, and what is lost is kept up to date."""
    codec = mlx_codec(2, 32, "F32")
    weight, hessian, scale, offset, codes = _rounded(codec, 64)
    before = codes.clone()
    lost = (weight - (codes * scale[..., None] + offset[..., None]).flatten(1)) @ hessian
    exchange_codes(codes, lost, hessian, scale, 3, 100)
    assert (codes != before).any()
    assert codes.min() >= 0
    assert codes.max() <= 3
    rest = (weight - (codes * scale[..., None] + offset[..., None]).flatten(1)) @ hessian
    torch.testing.assert_close(lost, rest, rtol=0, atol=1e-4 * float(rest.abs().max()))
    error = _row_errors(weight, scale, offset, codes, hessian)
    for group in range(2):
        for i in range(32):
            for step in (-1, 1):
                other = codes.clone()
                other[:, group, i] = (other[:, group, i] + step).clamp(0, 3)
                assert (_row_errors(weight, scale, offset, other, hessian) >= error * (1 - 1e-5)).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([[float("nan")] * 32]), "Q4_1", "rtn")
    with pytest.raises(ValueError, match="divide"):
        quantize(torch.zeros(2, 48), "Q4_1", "rtn")
    with pytest.raises(ValueError, match="too large"):
        quantize(torch.linspace(-1e6, 1e6, 32)[None], "Q4_1", "rtn")
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.randn(2, 32), "Q4_1", "gptq", torch.full((32, 32), float("nan")))


@pytest.mark.parametrize("common", [0.0, 50.0])
@pytest.mark.parametrize("levels", [3, 7, 31])
def test_spans_are_refitted_as_least_squares_says(levels: int, common: float) -> None:
    """Against weighted polyfit in float64, one refit; float32 loses digits of weights with much in common."""
    groups, importance = torch.randn(12, 32) + common, torch.rand(4, 32) + 0.1
    scale, offset = candidates(groups, importance, levels, (1.0, 0.7), 1)
    for r, group in enumerate(groups.double()):
        root = importance[r % 4].double().sqrt()
        low, high = group.min(), group.max()
        for s, share in enumerate((1.0, 0.7)):
            step = share * (high - low) / levels
            codes = ((group - ((low + high) / 2 - step * levels / 2)) / step).round().clamp(0, levels)
            fit = torch.linalg.lstsq(torch.stack([codes, torch.ones(32).double()], 1) * root[:, None], group * root)
            assert torch.allclose(
                torch.stack([scale[r, s], offset[r, s]]).double(), fit.solution, rtol=1e-5 * (1 + common)
            )
    errors = squared_errors(groups, importance, levels, scale, offset).double()
    wide, weights = groups.double()[:, None], importance.double()[torch.arange(12) % 4][:, None]
    s, o = scale.double()[..., None], offset.double()[..., None]
    expected = (((wide - o) / s).round().clamp(0, levels) * s + o - wide).square().mul(weights).sum(-1)
    assert torch.allclose(errors, expected, rtol=1e-4 * (1 + common))


def test_overflowing_candidates_are_passed_over() -> None:
    """Nothing overflows at the largest float16 weights; near the limit of float32 nearest is what is left."""
    for size, codec in ((6e4, "Q4_1"), (1e38, mlx_codec(4, 32, "F32"))):
        weight = (torch.rand(2, 32) - 0.5) * size
        near, found = (quantize(weight, codec, method).decode() for method in ("rtn", "search"))  # type: ignore[arg-type]
        assert torch.isfinite(found).all()
        assert (found - weight).double().square().sum() <= (near - weight).double().square().sum() * (1 + 1e-6)


def test_what_inputs_have_lost_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """With next to no damping the weights are the least-squares solution in float64."""
    weight, wanted = torch.randn(8, 64), _inputs(64)
    given = wanted + 0.3 * torch.randn(wanted.shape)
    best = torch.linalg.lstsq(given.double(), wanted.double() @ weight.double().T).solution.T.float()
    monkeypatch.setattr(calibrate, "_RECOVERY_DAMPING", 1e-9)
    moved = weight + weight @ recovery(given.T @ given, (wanted - given).T @ given)
    torch.testing.assert_close(moved, best, rtol=1e-4, atol=1e-4)


def test_damping_keeps_weights_near_what_they_were() -> None:
    """With fewer rows than inputs, as calibration often has; and inputs that are all zero change nothing."""
    weight, wanted = torch.randn(8, 64), _inputs(64, rows=20)
    given = wanted + 0.3 * torch.randn(wanted.shape)
    moved = weight + weight @ recovery(given.T @ given, (wanted - given).T @ given)
    assert 0 < (moved - weight).norm() < 0.5 * weight.norm()
    lost = [(given @ w.T - wanted @ weight.T).norm() for w in (weight, moved)]
    assert lost[1] < lost[0]
    nothing = torch.zeros(64, 64)
    assert not recovery(nothing, nothing).any()


@pytest.mark.parametrize("broken", [0, 1])
def test_inputs_that_are_not_finite_are_refused(broken: int) -> None:
    sums = [torch.eye(64), torch.eye(64)]
    sums[broken][3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite on the calibration rows"):
        recovery(*sums)
