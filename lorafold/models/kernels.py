"""The elementwise work of a transformer block on a CPU: one pass over bfloat16 numbers instead of a torch operation per
sign, with float32 in between.

Each function has torch operations as its oracle, in `norms.py`, `gated.py` and in transformers' attention; these are
used for other types and devices.
"""

# bfloat16 numbers are uint16 here, the upper half of a float32; T tokens, N features of a token, H heads, D head width

from __future__ import annotations

import numpy as np
import torch
from numba import njit, prange
from torch import Tensor

from lorafold.quant.compiled import on_torch_threads, round_bfloat16

_SAFE = {"reassoc", "contract"}  # sums in any order; infinities and NaN stay what they are
_LOG2E = np.float32(1.4426950408889634)


def usable(x: Tensor) -> bool:
    """Whether the kernels cover this tensor."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16


def _raw(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.uint16).numpy()


def _rows(x: Tensor) -> np.ndarray:
    return _raw(x).reshape(-1, x.shape[-1])


@njit(inline="always")
def _widen(source, w):
    bits = w.view(np.uint32)
    for j in range(len(source)):
        bits[j] = np.uint32(source[j]) << np.uint32(16)


@njit(inline="always")
def _wide(source):
    w = np.empty(len(source), np.float32)
    _widen(source, w)
    return w


@njit(inline="always")
def _narrow(w, out):
    round_bfloat16(w.view(np.uint32), out)


@njit(inline="always")
def _exp2(w):
    """w = 2^w in place for w in [-126, 127]; relative error below 3e-7."""
    power = np.empty(len(w), np.int32)
    factor = power.view(np.float32)
    for j in range(len(w)):
        whole = np.floor(w[j] + np.float32(0.5))
        f = w[j] - whole  # in [-1/2, 1/2): the Taylor series of exp(f ln 2)
        p = np.float32(1.5403530e-4)
        p = p * f + np.float32(1.3333558e-3)
        p = p * f + np.float32(9.6181291e-3)
        p = p * f + np.float32(5.5504109e-2)
        p = p * f + np.float32(2.4022651e-1)
        p = p * f + np.float32(6.9314718e-1)
        w[j] = p * f + np.float32(1)
        power[j] = (np.int32(whole) + np.int32(127)) << np.int32(23)
    for j in range(len(w)):
        w[j] *= factor[j]


@njit(parallel=True, cache=True, fastmath=_SAFE)
def _rms_norm(x, weight, eps, out, rstd):
    for t in prange(x.shape[0]):
        w = _wide(x[t])
        squares = np.float32(0)
        for j in range(len(w)):
            squares += w[j] * w[j]
        r = np.float32(1) / np.sqrt(squares / np.float32(len(w)) + eps)
        rstd[t] = r
        for j in range(len(w)):
            w[j] *= r
        _narrow(w, out[t])  # transformers rounds before it multiplies with the weight
        scaled = _wide(out[t])
        for j in range(len(w)):
            scaled[j] *= weight[j]
        _narrow(scaled, out[t])


@njit(parallel=True, cache=True, fastmath=_SAFE)
def _rms_norm_backward(x, weight, rstd, dy, dx):
    for t in prange(x.shape[0]):
        w, g = _wide(x[t]), _wide(dy[t])
        r, dot = rstd[t], np.float32(0)
        for j in range(len(w)):
            g[j] *= weight[j]
            w[j] *= r
            dot += g[j] * w[j]
        dot /= np.float32(len(w))
        for j in range(len(w)):
            g[j] = r * (g[j] - w[j] * dot)
        _narrow(g, dx[t])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weight * x / rms(x) and 1 / rms(x) [...] float32, over the last dimension of x [..., N]."""
    out, rstd = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[:-1])
    factors = weight.detach().float().numpy()
    on_torch_threads(_rms_norm, _rows(x), factors, np.float32(eps), _rows(out), rstd.view(-1).numpy())
    return out, rstd


def rms_norm_backward(x: Tensor, weight: Tensor, rstd: Tensor, dy: Tensor) -> Tensor:
    """The gradient of `rms_norm` with respect to x."""
    dx = torch.empty(x.shape, dtype=x.dtype)
    factors = weight.detach().float().numpy()
    on_torch_threads(_rms_norm_backward, _rows(x), factors, rstd.view(-1).numpy(), _rows(dy), _rows(dx))
    return dx


@njit(inline="always")
def _sigmoid(gate):
    """1 / (1 + exp(-gate)), where the exponential stays within the range of a float32."""
    w = np.empty(len(gate), np.float32)
    for j in range(len(w)):
        x = gate[j] * -_LOG2E
        x = x if x > np.float32(-126) else np.float32(-126)
        w[j] = x if x < np.float32(126) else np.float32(126)
    _exp2(w)
    for j in range(len(w)):
        w[j] = np.float32(1) / (np.float32(1) + w[j])
    return w


@njit(parallel=True, cache=True, fastmath=_SAFE)
def _swiglu(gate, up, out):
    n = gate.shape[1]
    for t in prange(gate.shape[0]):
        g, u = _wide(gate[t]), _wide(up[t])
        s = _sigmoid(g)
        for j in range(n):
            g[j] = g[j] * s[j] * u[j]
        _narrow(g, out[t])


@njit(parallel=True, cache=True, fastmath=_SAFE)
def _swiglu_backward(gate, up, dy, d_gate, d_up):
    n = gate.shape[1]
    for t in prange(gate.shape[0]):
        g, u, d = _wide(gate[t]), _wide(up[t]), _wide(dy[t])
        s = _sigmoid(g)
        for j in range(n):
            u[j] = d[j] * u[j] * s[j] * (np.float32(1) + g[j] * (np.float32(1) - s[j]))
            d[j] = d[j] * g[j] * s[j]
        _narrow(u, d_gate[t])
        _narrow(d, d_up[t])


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, all [..., N]."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    on_torch_threads(_swiglu, _rows(gate), _rows(up), _rows(out))
    return out


def swiglu_backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `swiglu` with respect to gate and up."""
    d_gate, d_up = (torch.empty(gate.shape, dtype=gate.dtype) for _ in range(2))
    on_torch_threads(_swiglu_backward, _rows(gate), _rows(up), _rows(dy), _rows(d_gate), _rows(d_up))
    return d_gate, d_up


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
            _widen(source[by_head if back else by_token], a)
            for j in range(half):
                b[j] = a[j] * c[j] - a[j + half] * s[j]
                b[j + half] = a[j + half] * c[j + half] + a[j] * s[j + half]
            _narrow(b, out[by_token if back else by_head])


def rotate(x: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x [T, H * D] with cos and sin [T, D].

    Returns:
        [T * H, D], ordered by row of the pack, then head, then token: what the matrix products of attention read.
    """
    out = torch.empty(x.numel() // cos.shape[-1], cos.shape[-1], dtype=x.dtype)
    source = _raw(x).reshape(out.shape)
    on_torch_threads(_rotate, source, _raw(cos), _raw(sin), *_bounds(segments), _raw(out), False)
    return out


def rotate_back(dy: Tensor, cos: Tensor, sin: Tensor, segments: list[int]) -> Tensor:
    """The gradient of `rotate` with respect to x, [T, H * D], for dy [T * H, D]: the rotation's transpose."""
    dx = torch.empty(dy.shape, dtype=dy.dtype)
    transposed = -sin.roll(sin.shape[-1] // 2, dims=-1)
    on_torch_threads(_rotate, _raw(dy), _raw(cos), _raw(transposed), *_bounds(segments), _raw(dx), True)
    return dx.view(len(cos), -1)


def _bounds(segments: list[int]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array(segments, np.int64)
    return np.cumsum(lengths) - lengths, lengths


@njit(parallel=True, cache=True, fastmath=_SAFE)
def _causal_softmax(scores, tokens, scale, window):
    for i in prange(scores.shape[0]):
        t = scores.shape[1] - tokens + i % tokens
        first = max(0, t + 1 - window)
        w = _wide(scores[i, first : t + 1])
        largest, undefined = w[0], np.float32(0)
        for j in range(len(w)):
            largest = w[j] if w[j] > largest else largest
            undefined += w[j] * np.float32(0)  # not a number if any score is none, or infinite
        for j in range(len(w)):
            x = (w[j] - largest) * (scale * _LOG2E)
            w[j] = x if x > np.float32(-126) else np.float32(-126)
        _exp2(w)
        total = np.float32(0)
        for j in range(len(w)):
            total += w[j]
        total = np.float32(1) / total + undefined
        for j in range(len(w)):
            w[j] *= total
        scores[i, :first] = 0
        _narrow(w, scores[i, first : t + 1])
        scores[i, t + 1 :] = 0


@njit(parallel=True, cache=True, fastmath=_SAFE)
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
        _narrow(g, d[i, first : t + 1])
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
