"""The inner loops of choosing codes on a CPU: spans tried for a group, and GPTQ's columns. See `calibrate.py`."""

# R groups of n weights, each with importance [n] of row r mod G; S candidates of scale and offset for each group

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lorafold.kernels.compiled import on_torch_threads

_SUMS = {"reassoc", "contract", "nsz"}  # sums in any order, so that they are computed side by side
_LANES = 16  # rows that are tried side by side, in vectors


def candidates(
    groups: Tensor, importance: Tensor, levels: int, spans: tuple[float, ...], refits: int
) -> tuple[Tensor, Tensor]:
    """Scale and offset [R, S] of groups [R, n] for each share of the whole span, refitted by least squares."""
    scale, offset = (groups.new_empty(len(groups), len(spans)) for _ in range(2))
    shares = np.array(spans, np.float32)
    on_torch_threads(
        _candidates,
        groups.numpy(),
        importance.numpy(),
        np.float32(levels),
        shares,
        refits,
        scale.numpy(),
        offset.numpy(),
    )
    return scale, offset


def squared_errors(groups: Tensor, importance: Tensor, levels: int, scale: Tensor, offset: Tensor) -> Tensor:
    """Weighted squared error [R, S] of groups [R, n] rounded with scale and offset [R, S]."""
    out = groups.new_empty(scale.shape)
    arrays = (x.contiguous().numpy() for x in (scale, offset, out))
    on_torch_threads(_squared_errors, groups.numpy(), importance.numpy(), np.float32(levels), *arrays)
    return out


def round_columns(columns: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Codes and errors [O, n] of columns [O, n] rounded one after the other, as GPTQ does.

    Args:
        columns: changed in place, each by what those before it lost.
        factor: upper triangular [n, n].
        scale, offset: [O].
    """
    codes, errors = columns.new_empty(columns.shape), columns.new_empty(columns.shape)
    arrays = (x.numpy() for x in (columns, factor.contiguous(), scale, offset, codes, errors))
    on_torch_threads(_round_columns, *arrays, np.float32(levels))
    return codes, errors


def best_candidates(columns: Tensor, factor: Tensor, scale: Tensor, offset: Tensor, levels: int) -> Tensor:
    """Which of each row's scales and offsets [O, S] makes the squared errors of `round_columns` least: int64 [O, 1]."""
    best = columns.new_zeros(len(columns), 1, dtype=torch.int64)
    arrays = (x.contiguous().numpy() for x in (columns, factor, scale, offset))
    on_torch_threads(_best_candidates, *arrays, np.float32(levels), best.numpy()[:, 0])
    return best


def exchange_codes(codes: Tensor, lost: Tensor, hessian: Tensor, scale: Tensor, levels: int, times: int) -> None:
    """Give each weight in turn the code [O, G, n] of the least error (W - V) H (W - V)^T, all others as they are.

    Args:
        codes: changed in place.
        lost: (W - V) H [O, I], V being what the codes stand for; changed in place.
        hessian: H [I, I].
        scale: [O, G].
        times: how often all weights of a row are gone through, unless none has changed.
    """
    arrays = (x.contiguous().numpy() for x in (hessian, scale))
    on_torch_threads(_exchange_codes, codes.numpy(), lost.numpy(), *arrays, np.float32(levels), times)


@njit(inline="always")
def _code(weight, inverse, offset, levels):
    return min(max(np.rint((weight - offset) * inverse), np.float32(0)), levels)


@njit(inline="always")
def _inverse(scale):
    inverse = np.float32(1) / scale if scale != 0 else np.float32(0)
    return inverse if np.isfinite(inverse) else np.float32(0)


@njit(parallel=True, cache=True, fastmath=_SUMS)
def _candidates(groups, importance, levels, shares, refits, scales, offsets):
    n = groups.shape[1]
    for r in prange(groups.shape[0]):
        w, a = groups[r], importance[r % len(importance)]
        low, high, total, mean = w[0], w[0], np.float32(0), np.float32(0)
        for j in range(n):
            low, high = min(low, w[j]), max(high, w[j])
        for j in range(n):
            total += a[j]
            mean += a[j] * (w[j] - low)
        for i in range(len(shares)):
            scale = shares[i] * (high - low) / levels
            offset = (low + high) / np.float32(2) - scale * levels / np.float32(2)
            for _ in range(refits):
                inverse, code_sum, square, product = _inverse(scale), np.float32(0), np.float32(0), np.float32(0)
                for j in range(n):
                    code = _code(w[j], inverse, offset, levels)
                    code_sum += a[j] * code
                    square += a[j] * code * code
                    product += a[j] * code * (w[j] - low)
                spread = square - code_sum * code_sum / total
                if spread > np.float32(1e-6) * square:  # not all codes agree
                    scale = (product - code_sum * mean / total) / spread
                    offset = low + (mean - scale * code_sum) / total
            scales[r, i], offsets[r, i] = scale, offset


@njit(parallel=True, cache=True, fastmath=_SUMS)
def _squared_errors(groups, importance, levels, scales, offsets, out):
    for r in prange(groups.shape[0]):
        w, a = groups[r], importance[r % len(importance)]
        for i in range(scales.shape[1]):
            scale, offset = scales[r, i], offsets[r, i]
            inverse, error = _inverse(scale), np.float32(0)
            for j in range(groups.shape[1]):
                lost = w[j] - (_code(w[j], inverse, offset, levels) * scale + offset)
                error += a[j] * lost * lost
            out[r, i] = error


@njit(parallel=True, cache=True)
def _round_columns(columns, factor, scales, offsets, codes, errors, levels):
    n = columns.shape[1]
    for r in prange(columns.shape[0]):
        w, scale, offset, inverse = columns[r], scales[r], offsets[r], _inverse(scales[r])
        for i in range(n):
            code = _code(w[i], inverse, offset, levels)
            error = (w[i] - (code * scale + offset)) / factor[i, i]
            for j in range(i, n):
                w[j] -= error * factor[i, j]
            codes[r, i], errors[r, i] = code, error


@njit(parallel=True, cache=True, fastmath=_SUMS)
def _best_candidates(columns, factor, scales, offsets, levels, best):
    rows, n = columns.shape
    for part in prange((rows + _LANES - 1) // _LANES):
        first = part * _LANES
        count = min(_LANES, rows - first)
        given, w = np.zeros((n, _LANES), np.float32), np.empty((n, _LANES), np.float32)  # rows side by side
        scale, offset, inverse = (
            np.zeros(_LANES, np.float32),
            np.zeros(_LANES, np.float32),
            np.zeros(_LANES, np.float32),
        )
        error, loss = np.zeros(_LANES, np.float32), np.empty(_LANES, np.float32)
        least = np.full(_LANES, np.inf, np.float32)
        for lane in range(count):
            given[:, lane] = columns[first + lane]
        for s in range(scales.shape[1]):
            for lane in range(count):
                scale[lane], offset[lane] = scales[first + lane, s], offsets[first + lane, s]
                inverse[lane] = _inverse(scale[lane])
            w[:] = given
            loss[:] = 0
            for i in range(n):
                for lane in range(_LANES):
                    code = _code(w[i, lane], inverse[lane], offset[lane], levels)
                    error[lane] = (w[i, lane] - (code * scale[lane] + offset[lane])) / factor[i, i]
                    loss[lane] += error[lane] * error[lane]
                for j in range(i + 1, n):
                    share = factor[i, j]
                    for lane in range(_LANES):
                        w[j, lane] -= error[lane] * share
            for lane in range(count):
                if loss[lane] < least[lane]:  # not where it overflows
                    least[lane], best[first + lane] = loss[lane], s


@njit(parallel=True, cache=True, fastmath=_SUMS)
def _exchange_codes(codes, lost, hessian, scales, levels, times):
    groups, n = codes.shape[1:]
    for r in prange(codes.shape[0]):
        for _ in range(times):
            changed = False
            for g in range(groups):
                scale, inverse = scales[r, g], _inverse(scales[r, g])
                for i in range(n):
                    j, old = g * n + i, codes[r, g, i]
                    wanted = np.rint(old + lost[r, j] / hessian[j, j] * inverse)
                    code = min(max(wanted, np.float32(0)), levels)
                    if code != old:
                        codes[r, g, i], changed = code, True
                        step = (code - old) * scale
                        for k in range(lost.shape[1]):
                            lost[r, k] -= step * hessian[j, k]
            if not changed:
                break
