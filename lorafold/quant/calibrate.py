"""Choosing codes, scales and offsets of affine groups: rounding to nearest, a search, and GPTQ.

* `rtn`: scale and offset span the smallest and largest weight of a group; codes are the nearest.
* `search`: several narrower spans are tried, for each of which codes and a least-squares scale and offset are found in
  turn; the smallest squared error is kept. With a Hessian, errors are weighted by its diagonal, the mean square of
  the inputs.
* `gptq` (arXiv 2210.17323): columns are rounded one after the other, and what each loses is made good in the columns
  that follow, for the smallest error of the layer's output on the calibration rows. The parameters of a group are found
  when its first column is reached: of candidates as those of `search` the pair that leaves the smallest such error. At
  the end parameters are fitted jointly and codes exchanged: `refine.py`. Before that, weights can be moved so that the
  layer makes up for a part of what the layers before it have lost: `recovery`.

Scales and offsets are rounded to the type in which the format stores them before codes are chosen.
"""

# O output rows, G groups in a row, n weights in a group, I = G n inputs

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lorafold.quant.codecs import CODECS
from lorafold.quant.ggml import Codec
from lorafold.quant.refine import refined
from lorafold.quant.solver import best_candidates, candidates, round_columns, squared_errors
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
        damped, factor = _factored(hessian)
        chosen = _gptq(wide, factor, form)
        del factor
        scale, offset, codes = refined(wide, damped, *chosen, form)
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


def _nearest(groups: Tensor, scale: Tensor, offset: Tensor, form: Codec) -> Tensor:
    """Codes [..., n] float32 of weights [..., n]; 0 where the scale is 0."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return ((groups - offset[..., None]) * inverse[..., None]).round_().clamp_(0, form.largest_code)


def _parameters(groups: Tensor, form: Codec, method: Method, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and offset [...] of groups [..., n], as the format stores them; importance [n] or [G, n]."""
    if method == "rtn":
        return _spanning(groups, form)
    rows, weights = _weighted(groups, importance, form)
    scale, offset = _tried(rows, weights, form)
    errors = squared_errors(rows, weights, form.largest_code, scale, offset)
    best = errors.nan_to_num_(nan=torch.inf).argmin(1, keepdim=True)  # not a number: of an overflow
    return scale.gather(1, best).view(groups.shape[:-1]), offset.gather(1, best).view(groups.shape[:-1])


def _spanning(groups: Tensor, form: Codec) -> tuple[Tensor, Tensor]:
    """Scale and offset [...] whose codes reach from the smallest weight of a group [..., n] to the largest."""
    low, high = groups.amin(-1), groups.amax(-1)
    return form.as_stored((high - low) / form.largest_code), form.as_stored(low)


def _weighted(groups: Tensor, importance: Tensor | None, form: Codec) -> tuple[Tensor, Tensor]:
    """Groups as rows [R, n], and what errors in them weigh [1 or G, n]."""
    weights = groups.new_ones(form.group_size) if importance is None else importance
    weights = weights / weights.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) + 1e-3
    return groups.reshape(-1, form.group_size).contiguous(), weights.reshape(-1, form.group_size).contiguous()


def _tried(rows: Tensor, weights: Tensor, form: Codec) -> tuple[Tensor, Tensor]:
    """Scales and offsets [R, S] of groups [R, n], the first those that span them."""
    found = candidates(rows, weights, form.largest_code, _SPANS, _REFITS)
    scale, offset = (
        torch.cat([x[:, None], form.as_stored(y)], 1) for x, y in zip(_spanning(rows, form), found, strict=True)
    )
    return scale, offset


def _gptq(weight: Tensor, factor: Tensor, form: Codec) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset [O, G] and codes [O, G, n]; `factor` as `_factored` gives it."""
    size, width = form.group_size, weight.shape[1]
    left = weight.clone()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for at in range(0, width, size):
        columns, here = left[:, at : at + size].clone(), factor[at : at + size, at : at + size]
        tried = _tried(*_weighted(columns, here.diagonal().square().reciprocal(), form), form)
        best = best_candidates(columns, here, *tried, form.largest_code)
        scale, offset = (x.gather(1, best)[:, 0] for x in tried)
        codes, errors = round_columns(columns, here, scale, offset, form.largest_code)
        left[:, at + size :] -= errors @ factor[at : at + size, at + size :]
        found.append((scale, offset, codes))
    scale, offset, codes = (torch.stack(x, 1) for x in zip(*found, strict=True))
    return scale, offset, codes


def _factored(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """H [I, I] with a mean diagonal of 1, damped until it has an inverse, and upper triangular U with U^T U = H^-1."""
    mean = hessian.diagonal().double().mean().clamp_min(torch.finfo(torch.float64).tiny)
    for damping in (_DAMPING, 10 * _DAMPING, 1.0):
        damped = hessian.double() / mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return damped.float(), torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    raise ValueError(_NOT_FINITE)
