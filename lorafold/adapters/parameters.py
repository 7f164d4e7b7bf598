"""LoRA on parameters that belong to no layer of their own: experts' weights, and those of nn.MultiheadAttention.

They are read by code that never calls a layer, so the update is added to the parameter itself, by a parametrization.
"""

# r rank, I input features, O output features, E experts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.holder import Holder


class AdaptedParameter(Holder):
    """Named adapters of a parameter that belongs to no layer of its own: a parametrization of it.

    Attributes:
        device: of the parameter.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.handles: list[Any] = []  # of the hooks below
        self._holding = False
        self._held: list[Tensor] = []

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter with the updates of the active adapters."""
        if self._held:
            return self._held[0]
        for name in self.active:
            weight = self.adapters[name].onto(weight)  # type: ignore[operator]
        self._held = [weight] if self._holding else []
        return weight

    def begin(self, *_: Any) -> None:
        """Before the parameter's module computes, which may ask for it once for each expert: it is made once."""
        self._holding, self._held = True, []

    def end(self, *_: Any) -> None:
        """After the module has computed."""
        self._holding, self._held = False, []


class ParameterLoRA(nn.Module):
    """s B A for a parameter; of E experts, A [E r, I] holds one after the other, B [O, r E] by rank, as PEFT stores it.

    Args:
        shape: of the parameter: [O, I], or of experts [E, O, I].
        transposed: experts are stored [E, I, O].
        r, scaling: rank and s.
    """

    def __init__(self, shape: torch.Size, transposed: bool, r: int, scaling: float):
        super().__init__()
        self.experts = shape[0] if len(shape) == 3 else 1
        self.scaling = scaling
        self.transposed = transposed and len(shape) == 3
        out, width = (shape[-1], shape[-2]) if self.transposed else (shape[-2], shape[-1])
        self.lora_A = nn.Parameter(torch.empty(r * self.experts, width))
        self.lora_B = nn.Parameter(torch.zeros(out, r * self.experts))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def onto(self, weight: Tensor) -> Tensor:
        """The parameter with this update."""
        return weight + self.delta().to(weight.dtype)

    def delta(self) -> Tensor:
        """The update, in the parameter's shape."""
        if self.experts == 1:
            return self.scaling * (self.lora_B @ self.lora_A)
        a = self.lora_A.unflatten(0, (self.experts, -1))
        b = self.lora_B.unflatten(1, (-1, self.experts)).permute(2, 0, 1)
        update = self.scaling * (b @ a)
        return update.mT if self.transposed else update


class ParameterDelta(nn.Module):
    """An update as large as the parameter itself: a trained bias, or a part of a module that is trained whole."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.change = nn.Parameter(torch.zeros(shape))

    def onto(self, weight: Tensor) -> Tensor:
        """The parameter with this update."""
        return weight + self.change.to(weight.dtype)


class ParameterValue(nn.Module):
    """A new value of a parameter in float32, for models that are trained themselves: one copy less than an update.

    The optimizer moves the float32 value, and the model computes with it in its own type.
    """

    def __init__(self, parameter: Tensor):
        super().__init__()
        self.value = nn.Parameter(parameter.detach().to(torch.float32, copy=True))

    def onto(self, weight: Tensor) -> Tensor:
        """The new value in the parameter's type."""
        return self.value.to(weight.dtype)
