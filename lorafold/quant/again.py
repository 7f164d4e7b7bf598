"""Inputs of layers that are cheaper to compute again than to keep: what a norm or a gated activation returns.

A layer that needs its input for the backward pass keeps what that was made of, which the norm or the activation keeps
anyway, and makes it again there, the same numbers in one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_made: Any = WeakTensorKeyDictionary()  # tensor -> how, of what, and its version at that time


def remember(made: Tensor, how: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """Note that how(*of) is `made`, while that exists; `of` are tensors that are kept for the backward pass anyway."""
    if made.requires_grad:
        _made[made] = how, of, made._version
    return made


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function, and the tensors to keep of which it makes x."""
    if x.requires_grad and (known := _made.get(x)) is not None and known[2] == x._version:
        return known[:2]
    return _as_it_is, (x,)


def _as_it_is(x: Tensor) -> Tensor:
    return x
