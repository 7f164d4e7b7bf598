"""The elementwise work of a transformer block on a CPU: one pass over bfloat16 or float32 numbers instead of a torch
operation per sign, with float32 in between.

Each function has torch operations as its oracle, in `norms.py` and `gated.py`; these are used for other types and
devices.
"""

# bfloat16 numbers are uint16 here, the upper half of a float32; a `kind` is a zero of a row's type
# T tokens, N features of a token

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

_FEWEST_ROWS = 16  # of float32: for a token at a time torch is faster
_KINDS = {torch.bfloat16: np.uint16(0), torch.float32: np.float32(0)}


def computes(dtype: torch.dtype) -> bool:
    """Whether there is a compiler, and kernels for numbers of this type."""
    return dtype in _KINDS and not config.DISABLE_JIT  # type: ignore[attr-defined]


def usable(x: Tensor) -> bool:
    """Whether the kernels cover this tensor."""
    if x.device.type != "cpu" or not computes(x.dtype) or torch.compiler.is_compiling():
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


def widened(number: Any) -> Any:
    """One number in float32; for compiled code, as is the next."""


def narrow(w: np.ndarray, out: np.ndarray) -> None:
    """out = w, rounded to bfloat16 where it holds words."""


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
