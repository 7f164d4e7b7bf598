"""The elementwise work of a transformer block on a CPU: one pass over bfloat16 or float32 numbers instead of a torch
operation per sign, with float32 in between.

Each function has torch operations as its oracle, in `norms.py`, `gated.py` and in transformers' attention; these are
used for other types and devices.
"""

# bfloat16 numbers are uint16 here, the upper half of a float32; a `kind` is a zero of a row's type
# T tokens, N features of a token, H heads, D head width

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import config, extending, njit, prange, types
from torch import Tensor

from lorafold.kernels.compiled import address, empty, on_torch_threads, round_bfloat16
from lorafold.kernels.rows import (
    logits_row,
    pool_row,
    probabilities_row,
    rms_norm_backward_row,
    rms_norm_row,
    swiglu_backward_row,
    swiglu_row,
)

SAFE = {"reassoc", "contract"}  # sums in any order; infinities and NaN stay what they are
LOG2E = np.float32(1.4426950408889634)
_FEWEST_ROWS = 16  # of float32: for a token at a time torch is faster
_KINDS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}


def usable(x: Tensor) -> bool:
    """Whether the kernels cover this tensor."""
    if config.DISABLE_JIT or x.device.type != "cpu" or x.dtype not in _KINDS or torch.compiler.is_compiling():  # type: ignore[attr-defined]
        return False
    width = x.shape[-1] if x.dim() else 1
    return width % 16 == 0 and (x.dtype == torch.bfloat16 or x.numel() >= _FEWEST_ROWS * width)


def raw(x: Tensor) -> np.ndarray:
    """The numbers, bfloat16 as words; a copy of what is not contiguous."""
    x = x.detach().contiguous()
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _rows(x: Tensor) -> np.ndarray:
    return raw(x).reshape(-1, x.shape[-1])


def _whole(x: Tensor) -> np.ndarray:
    assert x.shape[-1] % 16 == 0
    return _rows(x)


def widen(source: np.ndarray, w: np.ndarray) -> None:
    """w = source in float32; for compiled code, as are the next two."""


def widened(number: Any) -> Any:
    """One number in float32."""


def narrow(w: np.ndarray, out: np.ndarray) -> None:
    """out = w, rounded to bfloat16 where it holds words."""


@extending.overload(widen)
def _widen(source, w):  # noqa: ARG001 (numba's protocol)
    def words(source, w):
        bits = w.view(np.uint32)
        for j in range(len(source)):
            bits[j] = np.uint32(source[j]) << np.uint32(16)

    def floats(source, w):
        for j in range(len(source)):
            w[j] = source[j]

    return words if source.dtype == types.uint16 else floats


@extending.overload(widened)
def _widened(number):
    def word(number):
        return np.int32(np.uint32(number) << np.uint32(16)).view(np.float32)

    return word if number == types.uint16 else lambda number: number


@extending.overload(narrow)
def _narrow(w, out):  # noqa: ARG001 (numba's protocol)
    def words(w, out):
        round_bfloat16(w.view(np.uint32), out)

    def floats(w, out):
        for j in range(len(w)):
            out[j] = w[j]

    return words if out.dtype == types.uint16 else floats


@njit(inline="always")
def _wide(source):
    w = np.empty(len(source), np.float32)
    widen(source, w)
    return w


@njit(inline="always")
def exp2(x):
    """2^x, and 2^-126 for all that is smaller; relative error below 3e-7; x below 127; NaN stays NaN."""
    x = np.float32(-126) if x < np.float32(-126) else x
    whole = np.floor(x + np.float32(0.5))
    f = x - whole  # in [-1/2, 1/2): the Taylor series of exp(f ln 2)
    p = np.float32(1.5403530e-4)
    p = p * f + np.float32(1.3333558e-3)
    p = p * f + np.float32(9.6181291e-3)
    p = p * f + np.float32(5.5504109e-2)
    p = p * f + np.float32(2.4022651e-1)
    p = p * f + np.float32(6.9314718e-1)
    p = p * f + np.float32(1)
    return p * np.int32((np.int32(whole) + 127) << 23).view(np.float32)


@njit(parallel=True, cache=True)
def _rms_norm(x, weight, eps, out, rstd):
    for t in prange(x.shape[0]):
        place = rstd.ctypes.data + 4 * t
        rms_norm_row(x.dtype.type(0), address(x, t, 0), weight.ctypes.data, x.shape[1], eps, address(out, t, 0), place)


@njit(parallel=True, cache=True)
def _rms_norm_backward(x, weight, rstd, dy, dx):
    for t in prange(x.shape[0]):
        here = (address(dy, t, 0), x.shape[1], address(dx, t, 0))
        rms_norm_backward_row(x.dtype.type(0), address(x, t, 0), weight.ctypes.data, rstd[t], *here)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x) and 1 / rms(x) [...] float32, over the last dimension of x [..., N]."""
    out, rstd = empty(*x.shape, dtype=x.dtype), torch.empty(x.shape[:-1])
    factors = weight.detach().float().numpy()
    on_torch_threads(_rms_norm, _whole(x), factors, np.float32(eps), _whole(out), rstd.view(-1).numpy())
    return out, rstd


def rms_norm_backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x."""
    dx = empty(*x.shape, dtype=x.dtype)
    factors = weight.detach().float().numpy()
    on_torch_threads(_rms_norm_backward, _whole(x), factors, rstd.view(-1).numpy(), _whole(dy), _whole(dx))
    return dx


@njit(parallel=True, cache=True)
def _swiglu(kind, rows, n, gate, up, stride, out, out_stride):
    for t in prange(rows):
        swiglu_row(kind, gate + stride * t, up + stride * t, n, out + out_stride * t)


@njit(parallel=True, cache=True)
def _swiglu_backward(kind, rows, n, gate, up, dy, dy_stride, d_gate, d_up, stride):
    for t in prange(rows):
        at = stride * t
        swiglu_backward_row(kind, gate + at, up + at, dy + dy_stride * t, n, d_gate + at, d_up + at)


def _lines(*parts: Tensor) -> list[Tensor]:
    """Parts as rows [T, N] the same number of bytes apart, as they lie if that can be."""
    assert parts[0].shape[-1] % 16 == 0
    rows = [x.detach().reshape(-1, x.shape[-1]) for x in parts]
    regular = len({x.stride() for x in rows}) == 1 and rows[0].stride(1) == 1
    return rows if regular and len(rows[0]) > 1 else [x.contiguous() for x in rows]


def _apart(rows: Tensor) -> int:
    """Bytes from row to row of [T, N]; torch says anything of a single row."""
    return rows.itemsize * (rows.stride(0) if len(rows) > 1 else rows.shape[1])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [..., N]; gate and up may be halves of one tensor."""
    out = empty(*gate.shape, dtype=gate.dtype)
    gate, up = _lines(gate, up)
    kind, places = _KINDS[gate.dtype], (gate.data_ptr(), up.data_ptr(), _apart(gate))
    on_torch_threads(_swiglu, kind, *gate.shape, *places, out.data_ptr(), out.itemsize * out.shape[-1])
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, dy: Tensor, room: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` with respect to gate and up, in a room that lies as these do, if there is one."""
    d_gate, d_up = room or (empty(*gate.shape, dtype=gate.dtype), empty(*gate.shape, dtype=gate.dtype))
    kind, n, dy = _KINDS[gate.dtype], gate.shape[-1], dy.contiguous()
    given, results = _lines(gate, up), _lines(d_gate, d_up)
    if _apart(given[0]) != _apart(results[0]):
        given = [x.contiguous() for x in given]
    addresses = [given[0].data_ptr(), given[1].data_ptr(), dy.data_ptr(), dy.itemsize * n]
    addresses += [results[0].data_ptr(), results[1].data_ptr(), _apart(results[0])]
    on_torch_threads(_swiglu_backward, kind, len(given[0]), n, *addresses)
    return d_gate, d_up


@njit(parallel=True, cache=True)
def _cross_entropy(logits, targets, changes, losses, found):
    for t in prange(logits.shape[0]):
        row, width, target = address(logits, t, 0), logits.shape[1], targets[t]
        logits_row(logits.dtype.type(0), row, width, address(found, t, 0))
        largest, total = found[t, 0], found[t, 1]
        chosen = widened(logits[t, target]) - largest
        losses[t] = np.log(total) - chosen
        if changes:
            probabilities_row(logits.dtype.type(0), row, width, largest, total)
            rest = np.empty(1, np.float32)
            rest[0] = np.exp(chosen) / total - np.float32(1)
            narrow(rest, logits[t, target : target + 1])


def cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """The cross-entropy of each row of logits [S, V] with a target [S], float32 [S].

    With `gradient` the logits become its gradient, softmax less one at the target, in place.
    """
    assert logits.is_contiguous()
    losses, found = torch.empty(len(logits)), torch.empty(len(logits), 2)
    on_torch_threads(_cross_entropy, raw(logits), targets.numpy(), gradient, losses.numpy(), found.numpy())
    return losses


@njit(parallel=True, cache=True)
def _pool(x, group, out):
    for t in prange(x.shape[0]):
        pool_row(x.dtype.type(0), address(x, t, 0), x.shape[1], group, address(out, t, 0))


def pool(x: Tensor, group: int) -> Tensor:
    """The sum of each `group` features that follow one another, a multiple of 16: [..., N] -> [..., N / group]."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // group)
    on_torch_threads(_pool, _whole(x), group, _rows(out))
    return out


@njit(parallel=True, cache=True)
def _rotate(source, cos, sin, starts, lengths, out, back):
    tokens, half = cos.shape[0], cos.shape[1] // 2
    heads = source.shape[0] // tokens
    for t in prange(tokens):
        row = np.searchsorted(starts, t, side="right") - 1
        c, s = _wide(cos[t]), _wide(sin[t])
        a, b = np.empty(2 * half, np.float32), np.empty(2 * half, np.float32)
        for h in range(heads):
            by_token, by_head = t * heads + h, starts[row] * heads + h * lengths[row] + t - starts[row]
            widen(source[by_head if back else by_token], a)
            for j in range(half):
                b[j] = a[j] * c[j] - a[j + half] * s[j]
                b[j + half] = a[j + half] * c[j + half] + a[j] * s[j + half]
            narrow(b, out[by_token if back else by_head])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [T, H * D] with cos and sin [T, D].

    Returns:
        [T * H, D], ordered by row of the pack, then head, then token: what the matrix products of attention read.
    """
    out = torch.empty(x.numel() // cos.shape[-1], cos.shape[-1], dtype=x.dtype)
    source = raw(x).reshape(out.shape)
    on_torch_threads(_rotate, source, raw(cos), raw(sin), *_bounds(segments), raw(out), False)
    return out


def rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
    """The gradient of `rotate` with respect to x, [T, H * D], for dy [T * H, D]: the rotation's transpose."""
    dx = torch.empty(dy.shape, dtype=dy.dtype)
    transposed = -sin.roll(sin.shape[-1] // 2, dims=-1)
    on_torch_threads(_rotate, raw(dy), raw(cos), raw(transposed), *_bounds(segments), raw(dx), True)
    return dx.view(len(cos), -1)


def _bounds(segments: list[int]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array(segments, np.int64)
    return np.cumsum(lengths) - lengths, lengths


@njit(parallel=True, cache=True, fastmath=SAFE)
def _causal_softmax(scores, tokens, scale, window):
    for i in prange(scores.shape[0]):
        t = scores.shape[1] - tokens + i % tokens
        first = max(0, t + 1 - window)
        w = _wide(scores[i, first : t + 1])
        largest = w[0]
        for j in range(len(w)):
            largest = w[j] if w[j] > largest else largest
        total, factor = np.float32(0), scale * LOG2E
        for j in range(len(w)):
            w[j] = exp2((w[j] - largest) * factor)
            total += w[j]
        for j in range(len(w)):
            w[j] /= total
        scores[i, :first] = 0
        narrow(w, scores[i, first : t + 1])
        scores[i, t + 1 :] = 0


@njit(parallel=True, cache=True, fastmath=SAFE)
def _causal_softmax_backward(weights, tokens, scale, window, d):
    for i in prange(d.shape[0]):
        t = d.shape[1] - tokens + i % tokens
        first = max(0, t + 1 - window)
        p, g = _wide(weights[i, first : t + 1]), _wide(d[i, first : t + 1])
        dot = np.float32(0)
        for j in range(len(p)):
            dot += p[j] * g[j]
        for j in range(len(p)):
            g[j] = p[j] * (g[j] - dot) * scale
        d[i, :first] = 0
        narrow(g, d[i, first : t + 1])
        d[i, t + 1 :] = 0


def causal_softmax_(scores: Tensor, tokens: int, scale: float, window: int) -> None:
    """Turn scores into attention weights in place: softmax(scale * score) of the last `window` tokens.

    Args:
        scores: [..., tokens, M], of the last `tokens` of M tokens.
    """
    assert scores.is_contiguous()
    on_torch_threads(_causal_softmax, _rows(scores), tokens, np.float32(scale), window)


def causal_softmax_backward_(weights: Tensor, tokens: int, scale: float, window: int, d: Tensor) -> None:
    """Turn the gradient of the attention weights [..., tokens, M] into that of the scores, in place in `d`."""
    assert d.is_contiguous()
    on_torch_threads(_causal_softmax_backward, _rows(weights), tokens, np.float32(scale), window, _rows(d))
