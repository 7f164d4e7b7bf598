"""What GPTQ has chosen, made better: all parameters of a row fitted jointly, and codes exchanged for better ones."""

# O output rows, G groups in a row, n weights in a group, I = G n inputs; V [O, I] is what scale, offset and codes mean

from __future__ import annotations

import torch
from torch import Tensor

from lorafold.quant.ggml import Codec
from lorafold.quant.solver import exchange_codes

_EXCHANGES = 6  # times that all codes are looked at, unless none has changed
_RIDGE = 1e-4  # of the diagonal, added to it where parameters are fitted
_DAMPING = 0.03  # of the mean diagonal, added to it where codes are exchanged: few rows would lead them astray
_FITTED_BYTES = 1 << 26  # of the equations that are solved at once; three times as much is held


def refined(
    weight: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, form: Codec
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and offset [O, G] and codes [O, G, n] of a smaller error tr (W - V) H (W - V)^T.

    GPTQ finds the parameters of a group when only what comes before it is rounded, and each code once. Here all
    parameters of a row are fitted to its codes (arXiv 2602.02126 does so with scales), each code in turn becomes the
    best beside all others (coordinate descent, as in QuantEase, arXiv 2309.01885), and parameters are fitted again.

    Args:
        weight: W [O, I] float32.
        hessian: H [I, I] float32, X^T X of the layer's inputs and a damping that makes it positive definite.
        codes: changed in place.
    """
    scale, offset = fitted(weight, hessian, scale, offset, codes, form)
    damped = hessian.clone()
    damped.diagonal().add_(_DAMPING * hessian.diagonal().mean())
    lost = (weight - _values(scale, offset, codes)) @ damped
    exchange_codes(codes, lost, damped, scale, form.largest_code, _EXCHANGES)
    return *fitted(weight, hessian, scale, offset, codes, form), codes


def _values(scale: Tensor, offset: Tensor, codes: Tensor) -> Tensor:
    """Weights [O, I] of codes [O, G, n]."""
    return (codes * scale[..., None] + offset[..., None]).flatten(1)


def fitted(
    weight: Tensor, hessian: Tensor, scale: Tensor, offset: Tensor, codes: Tensor, form: Codec
) -> tuple[Tensor, Tensor]:
    """Scales and offsets [O, G] of the least (W - V) H (W - V)^T for each row, V being what codes [O, G, n] stand for.

    The 2 G equations M t = b of each row are solved for the change t of its parameters. They are rounded to what the
    format stores one after the other, from the last, and those that follow make up for what rounding has cost, as
    GPTQ does with weights. A row whose error does not fall stays as it is.
    """
    out, count, size = codes.shape
    pooled = hessian.unflatten(1, (count, size)).sum(-1)  # H 1 of each group [I, G]
    both = pooled.unflatten(0, (count, size)).sum(1).double()
    scales, offsets = scale.clone(), offset.clone()
    for rows in torch.arange(out).split(max(1, _FITTED_BYTES // (32 * count * count))):
        code = codes[rows]
        lost = (weight[rows] - _values(scale[rows], offset[rows], code)) @ hessian
        wanted = torch.cat([(lost.view_as(code) * code).sum(-1), lost.view_as(code).sum(-1)], 1).double()
        matrix = hessian.new_empty(len(rows), 2 * count, 2 * count, dtype=torch.float64)
        matrix[:, count:, count:] = both
        for group in range(count):
            part, here = slice(group * size, (group + 1) * size), code[:, group]
            through = (here @ hessian[part, group * size :]).view_as(code[:, group:])
            matrix[:, group, group:count] = matrix[:, group:count, group] = (through * code[:, group:]).sum(-1)
            matrix[:, group, count:] = here @ pooled[part]
        matrix[:, count:, :count] = matrix[:, :count, count:].mT
        # the codes of a group may all agree, and no row may reach it
        matrix.diagonal(dim1=1, dim2=2).mul_(1 + _RIDGE).add_(torch.finfo(torch.float64).tiny)
        lower, _ = torch.linalg.cholesky_ex(matrix)
        change = torch.cholesky_solve(wanted[..., None], lower)[..., 0]
        step = _rounded(change, lower.mT, torch.cat([scale[rows], offset[rows]], 1), form)
        gain = (step * (2 * wanted - (matrix @ step[..., None])[..., 0])).sum(1, keepdim=True)
        for kept, part in zip((scales, offsets), torch.where(gain > 0, step, 0.0).chunk(2, 1), strict=True):
            kept[rows] = (kept[rows] + part).float()
    return scales, offsets


def _rounded(change: Tensor, factor: Tensor, old: Tensor, form: Codec) -> Tensor:
    """Changes [R, P] near those of least error that lead from old parameters to such as the format stores.

    Args:
        change: of least error, float64.
        factor: upper triangular U [R, P, P] with U^T U = M.
        old: parameters [R, P] float32.
    """
    step = change.clone()
    for k in reversed(range(change.shape[1])):
        after = slice(k + 1, None)
        cost = (factor[:, k, after] * (step[:, after] - change[:, after])).sum(1) / factor[:, k, k]
        stored = form.as_stored((old[:, k] + change[:, k] - cost).float())
        step[:, k] = torch.where(stored.isfinite(), stored.double() - old[:, k], 0.0)  # overflow: as it was
    return step
