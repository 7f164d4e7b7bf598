"""Choosing codes, scales and offsets of affine groups: rounding to nearest, a search, and GPTQ.

* `rtn`: scale and offset span the smallest and largest weight of a group; codes are the nearest.
* `search`: several narrower spans are tried, for each of which codes and a least-squares scale and offset are found in
  turn; the smallest squared error is kept. With a Hessian, errors are weighted by its diagonal, the mean square of
  the inputs.
* `gptq` (arXiv 2210.17323): columns are rounded one after the other, and what each loses is made good in the columns
  that follow, for the smallest error of the layer's output on the calibration rows. The parameters of a group are those
  of `search`, found when its first column is reached. Before that, weights can be moved so that the layer makes up
  for a part of what the layers before it have lost: `recovery`.

Scales and offsets are rounded to the type in which the format stores them before codes are chosen.
"""

# O output rows, G groups in a row, n weights in a group, I = G n inputs

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lorafold.quant.codecs import CODECS
from lorafold.quant.ggml import Codec
from lorafold.quant.solver import candidates, round_columns, squared_errors
from lorafold.quant.weight import QuantizedWeight, check_encodable

Method = Literal["rtn", "search", "gptq"]
_SPANS = tuple(1 - 0.05 * i for i in range(11))  # shares of the whole span that `search` tries
_REFITS = 2
_DAMPING = 0.01  # of the mean diagonal of the Hessian, added to it
_RECOVERY_DAMPING = 0.1  # the same where lost inputs are made up for
_NOT_FINITE = "the inputs of a layer are not finite on the calibration rows"


def quantize(weight: Tensor, codec: str, method: Method, hessian: Tensor | None = None) -> QuantizedWeight:
    """A dense matrix [O, I] in an affine format.

    Args:
        codec: the name of a format with a scale and an offset for each group of I.
        hessian: X^T X [I, I] float32 of the layer's inputs X; needed by `gptq`, used by `search`.

    Raises:
        ValueError: a weight is not finite, a parameter overflows the format, or groups do not divide I.
    """
    form = CODECS[codec]
    assert form.affine
    out, width = weight.shape
    check_encodable(weight, form)
    wide, hessian = weight.float().cpu(), None if hessian is None else hessian.cpu()
    if method == "gptq":
        assert hessian is not None
        scale, offset, codes = _gptq(wide, hessian, form)
    else:
        importance = None if hessian is None else hessian.diagonal().unflatten(0, (-1, form.group_size))
        groups = wide.unflatten(1, (-1, form.group_size))
        scale, offset = _parameters(groups, form, method, importance)
        codes = _nearest(groups, scale, offset, form)
    if not (torch.isfinite(scale).all() and torch.isfinite(offset).all()):
        raise ValueError(f"a scale or offset is too large for {form.stored}")
    return QuantizedWeight(codec, (out, width), form.assemble(scale, offset, codes.to(torch.uint8)))


def recovery(hessian: Tensor, lost: Tensor) -> Tensor:
    """R [I, I] float32, so that W + W R makes up for what the inputs of a matrix W [O, I] have lost.

    The layer is given X where the unchanged model gives it Y. R = (Y - X)^T X (X^T X + d)^-1, with a tenth of the mean
    diagonal as d, has the least |(W + W R) X^T - W Y^T|^2 + d |W R|^2. This is quantization error propagation (QEP,
    arXiv 2504.09629), where a half of the step W R is taken.

    Args:
        hessian: X^T X [I, I].
        lost: (Y - X)^T X [I, I].

    Raises:
        ValueError: inputs are not finite.
    """
    if not (torch.isfinite(hessian).all() and torch.isfinite(lost).all()):
        raise ValueError(_NOT_FINITE)
    damped = hessian.double()
    damped.diagonal().add_(_RECOVERY_DAMPING * damped.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return torch.zeros_like(lost)  # all inputs are zero
    return torch.cholesky_solve(lost.double().T, lower).T.float()


def _levels(form: Codec) -> int:
    return (1 << form.bits) - 1


def _stored(values: Tensor, form: Codec) -> Tensor:
    return values.to(form.stored).float()


def _nearest(groups: Tensor, scale: Tensor, offset: Tensor, form: Codec) -> Tensor:
    """Codes [..., n] float32 of weights [..., n]; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((groups - offset[..., None]) * inverse[..., None]).round_().clamp_(0, _levels(form))


def _parameters(groups: Tensor, form: Codec, method: Method, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and offset [...] of groups [..., n], as the format stores them; importance [n] or [G, n]."""
    low, high = groups.amin(-1), groups.amax(-1)
    spanning = _stored((high - low) / _levels(form), form), _stored(low, form)
    if method == "rtn":
        return spanning
    weights = groups.new_ones(form.group_size) if importance is None else importance
    weights = weights / weights.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) + 1e-3
    weights, rows = weights.reshape(-1, form.group_size).contiguous(), groups.reshape(-1, form.group_size).contiguous()
    found = candidates(rows, weights, _levels(form), _SPANS, _REFITS)
    tried = [
        torch.cat([first.reshape(-1, 1), _stored(more, form)], 1) for first, more in zip(spanning, found, strict=True)
    ]
    errors = squared_errors(rows, weights, _levels(form), *tried).nan_to_num_(nan=torch.inf)  # of an overflow
    best = errors.argmin(1, keepdim=True)
    return tried[0].gather(1, best).view_as(low), tried[1].gather(1, best).view_as(low)


def _gptq(weight: Tensor, hessian: Tensor, form: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset [O, G] and codes [O, G, n]."""
    size, width = form.group_size, weight.shape[1]
    left = weight.clone()
    factor = _inverse_factor(hessian)
    importance = hessian.diagonal()
    scales, offsets, codes = [], [], []
    for at in range(0, width, size):
        columns, here = left[:, at : at + size].clone(), factor[at : at + size, at : at + size]
        scale, offset = _parameters(columns, form, "search", importance[at : at + size])
        chosen, errors = round_columns(columns, here, scale, offset, _levels(form))
        left[:, at + size :] -= errors @ factor[at : at + size, at + size :]
        scales.append(scale)
        offsets.append(offset)
        codes.append(chosen)
    return torch.stack(scales, 1), torch.stack(offsets, 1), torch.stack(codes, 1)


def _inverse_factor(hessian: Tensor) -> Tensor:
    """Upper triangular U [I, I] with U^T U = H^-1, H being damped until it has an inverse."""
    diagonal = hessian.diagonal().double()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    for damping in (_DAMPING, 10 * _DAMPING, 1.0):
        damped = hessian.double() + torch.eye(len(hessian), dtype=torch.float64) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    raise ValueError(_NOT_FINITE)
