"""What backward passes share: inputs that are cheaper to compute again than to keep, and no second derivatives.

These inputs are what a norm or a gated activation returns. A layer that needs its input for the backward pass keeps
what that was made of, which the norm or the activation keeps anyway, and makes it again there, the same numbers in one
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.autograd import function
from torch.utils.weak import WeakTensorKeyDictionary

Backward = TypeVar("Backward", bound=Callable[..., Any])
_made: Any = WeakTensorKeyDictionary()  # tensor -> how, of what, and the versions of all of them at that time


def remember(made: Tensor, how: Callable[..., Tensor], *of: Tensor) -> Tensor:
    """Note that how(*of) is `made`, while that exists; `of` are tensors that are kept for the backward pass anyway.

    On a CPU only: a GPU has more memory than time for small kernels.
    """
    if made.requires_grad and made.device.type == "cpu":
        _made[made] = how, of, _versions(made, *of)
    return made


def to_keep(x: Tensor) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A function, and the tensors to keep of which it makes x."""
    if x.requires_grad and (known := _made.get(x)) is not None:
        how, of, versions = known
        if versions == _versions(x, *of):
            return how, of
    return _as_it_is, (x,)


def _versions(*tensors: Tensor) -> list[int]:
    """How often each has been changed in place; one of inference cannot be."""
    return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _as_it_is(x: Tensor) -> Tensor:
    return x


def once_differentiable(backward: Backward) -> Backward:
    """Refuse second derivatives, of which a backward pass that calls kernels knows nothing; torch's, with a type."""
    return function.once_differentiable(backward)  # type: ignore[no-any-return]
