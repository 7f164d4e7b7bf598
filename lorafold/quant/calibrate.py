"""Choosing codes, scales and offsets of affine groups: rounding to nearest, a search, and GPTQ.

* `rtn`: scale and offset span the smallest and largest weight of a group; codes are the nearest.
* `search`: several narrower spans are tried, for each of which codes and a least-squares scale and offset are found in
  turn; the smallest squared error is kept. With a Hessian, errors are weighted by its diagonal, the mean square of
  the inputs.
* `gptq` (arXiv 2210.17323): columns are rounded one after the other, and what each loses is made good in the columns
  that follow, for the smallest error of the layer's output on the calibration rows. The parameters of a group are those
  of `search`, found when its first column is reached. Before that, `made_good` can move the weights so that the layer
  makes up for a part of what the layers before it have lost.

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
_PROPAGATION_DAMPING = 0.1  # the same where lost inputs are made up for


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


def made_good(weight: Tensor, hessian: Tensor, lost: Tensor, share: float) -> Tensor:
    """A matrix W [O, I] float32, moved so that its output makes up for a share of what its inputs have lost.

    The layer is given X where the unchanged model gives it Y; W + W (Y - X)^T X (X^T X + damping)^-1 comes nearest to
    the output W Y^T. This is quantization error propagation (QEP, arXiv 2504.09629), with its share of a half: with all
    of it the layer follows the rows too closely.

    Args:
        hessian: X^T X [I, I].
        lost: (Y - X)^T X [I, I].

    Raises:
        ValueError: the inputs are not finite.
    """
    wide = hessian.double()
    damped = wide + torch.eye(len(wide), dtype=torch.float64) * (_PROPAGATION_DAMPING * wide.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        if not torch.isfinite(wide).all():
            raise ValueError("the inputs of a layer are not finite on the calibration rows")
        return weight  # all inputs are zero
    moved = torch.cholesky_solve((weight.double() @ lost.double()).T, lower).T
    return weight + share * moved.float()


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
    raise ValueError("the inputs of a layer are not finite on the calibration rows")
