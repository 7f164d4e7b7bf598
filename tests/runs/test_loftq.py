"""LoftQ: the error falls step by step and below that of the packed weight alone; the steps are PEFT's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lorafold.quant.calibrate import quantize
from lorafold.quant.codecs import CODECS
from lorafold.quant.weight import QuantizedWeight, encode
from lorafold.runs.loftq import Fitted, alternate

FORMATS = [
    *(("NF4", "rtn"), ("NF4-DQ", "rtn"), ("INT8", "rtn")),
    *((codec, method) for codec in ("Q4_1", "Q5_1") for method in ("rtn", "search")),
    *((f"MLX{bits}-G64-F16", method) for bits in (2, 3, 4, 5, 6, 8) for method in ("rtn", "search")),
]


def quantizer(codec: str, method: str) -> partial[QuantizedWeight]:
    if CODECS[codec].affine:
        return partial(quantize, codec=codec, method=method)
    return partial(encode, codec=codec)


def matrix(seed: int = 0) -> Tensor:
    """Weights like those of a model: random, with a few large rows and columns."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(96, 128, generator=generator) * 0.02
    w[::17] *= 4
    w[:, ::29] *= 3
    return w


def error(fitted: Fitted, w: Tensor) -> float:
    return float(fitted.residual(w).double().norm() / w.double().norm())


@pytest.mark.parametrize(("codec", "method"), FORMATS)
def test_the_error_falls_and_is_below_that_of_the_packed_weight_alone(codec: str, method: str) -> None:
    """Of every format that `lorafold quantize` writes; a first step takes a third of the error already, at r = 8."""
    w, quantized = matrix(), quantizer(codec, method)
    found = [alternate(w, quantized, 8, steps) for steps in (1, 2, 3, 5)]
    errors = [error(Fitted(quantized(w)), w), *(error(fitted, w) for fitted in found)]
    assert errors[1] < 0.75 * errors[0]
    assert errors[1:] == sorted(errors[1:], reverse=True)
    assert errors[4] < 0.97 * errors[1]
    for fitted in found:
        assert fitted.update is not None
        assert fitted.update.rank == 8


def test_the_first_step_is_the_best_approximation() -> None:
    """Eckart and Young in float64; float32's SVD keeps six digits of a norm."""
    w = matrix()
    quantized = quantizer("MLX2-G64-F16", "rtn")
    values = torch.linalg.svdvals((w - quantized(w).decode()).double())
    left = alternate(w, quantized, 5, 1).residual(w).double().norm()
    assert float(left) == pytest.approx(float(values[5:].norm()), rel=1e-5)


def test_a_step_that_makes_it_worse_is_not_kept() -> None:
    """Two codes for a matrix, of which the second time the worse is chosen."""
    w, calls = matrix(), []

    def worse_every_time(goal: Tensor) -> QuantizedWeight:
        calls.append(goal)
        return quantize(w * (1 + 0.5 * (len(calls) - 1)), "Q4_1", "rtn")

    first = alternate(w, lambda _: quantize(w, "Q4_1", "rtn"), 4, 1)
    assert error(alternate(w, worse_every_time, 4, 3), w) == error(first, w)
    assert len(calls) == 3


@pytest.mark.parametrize("steps", [1, 4])
def test_the_steps_are_those_of_peft(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's own loftq_init with bitsandbytes' NF4, its tensors sent to the CPU where it says cuda.

    The products of the factors, whose signs are free; both SVDs are float32's.
    """
    pytest.importorskip("bitsandbytes")
    utils = pytest.importorskip("peft.utils.loftq_utils")
    original = torch.Tensor.to

    def here(tensor: Tensor, *args: object, **options: object) -> Tensor:
        args = tuple("cpu" if str(a).startswith("cuda") else a for a in args)
        options = {k: "cpu" if str(v).startswith("cuda") else v for k, v in options.items()}
        return original(tensor, *args, **options)  # type: ignore[call-overload, no-any-return]

    w = matrix()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", here)
        weight, a, b = utils.loftq_init(w, 4, 8, steps)
    ours = alternate(w, quantizer("NF4", "rtn"), 8, steps)
    assert ours.update is not None
    apart = ours.weight.decode() != weight
    assert apart.float().mean() < 0.01  # a weight in the middle between two codes may go either way
    if steps == 1:
        assert not apart.any()
    torch.testing.assert_close(ours.update.dense(), b @ a, atol=1e-4 if steps > 1 else 1e-6, rtol=0)
    assert error(ours, w) == pytest.approx(float((w - weight - b @ a).norm() / w.norm()), rel=1e-4)
