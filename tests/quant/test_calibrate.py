"""Codes, scales and offsets against plain rounding and against GPTQ written out in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lorafold.quant import calibrate
from lorafold.quant.calibrate import quantize, recovery
from lorafold.quant.codecs import CODECS
from lorafold.quant.mlx import mlx_codec
from lorafold.quant.solver import candidates, squared_errors

FORMATS = ("Q4_1", "Q5_1", mlx_codec(2, 32, "F16"), mlx_codec(3, 64, "BF16"), mlx_codec(4, 128, "F32"))
formats = pytest.mark.parametrize("codec", FORMATS)


def _inputs(width: int, rows: int = 600, seed: int = 0) -> Tensor:
    """Inputs whose columns go together, as those of a layer do."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    return torch.randn(rows, width, generator=generator) @ (mix + 0.3 * torch.eye(width))


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
    width, group, codec = 64, 32, mlx_codec(3, 32, "F32")
    weight, x = torch.randn(8, width), _inputs(width)
    hessian = x.T @ x
    ours = quantize(weight, codec, "gptq", hessian)
    form = ours.format
    scale, offset = form.scale(ours.blocks).double(), form.offset(ours.blocks).double()
    damped = hessian.double() + torch.eye(width, dtype=torch.float64) * 0.01 * hessian.double().diagonal().mean()
    left, expected = weight.double().clone(), torch.empty(8, width)
    for i in range(width):
        inverse = torch.linalg.inv(damped[i:, i:])
        s, o = scale[:, i // group], offset[:, i // group]
        expected[:, i] = ((left[:, i] - o) / s).round().clamp(0, 7)
        error = (left[:, i] - (expected[:, i] * s + o)) / inverse[0, 0]
        left[:, i:] -= error[:, None] * inverse[0]
    codes = form.codes(ours.blocks).flatten(1).float()
    assert (codes == expected).float().mean() > 0.99


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
