"""QA-LoRA (arXiv 2309.14717): learn the offsets of a group-quantized weight; on request its scales.

A group-quantized weight is  w[o, j] = scale[o, g] code[o, j] + offset[o, g]  with g = j // group.
The adapter moves the offset,

    offset' = round(offset + (s / p) B A),     A [r, G], B [O, r], s = alpha / r,

where round() is the rounding of the file format with the gradient passed straight through. So the model that is
trained is the model that the file will hold, and folding loses nothing.

Scales (`adapt`: scale or both) are learned in the same way, as  scale' = round(scale (1 + (s / p) B A)); PEQA
(arXiv 2305.14152) tunes scales alone.

p is the pooling divisor. Written on activations the update is (s / p) B A pool(x), pool being the sum over a
group. The paper takes the mean (p = group); PEFT's `use_qalora` multiplies that mean by G. Here
p = sqrt(group): the pooled input then has the variance of the input itself, a step of A or B moves the output as
far as in LoRA, and LoRA's learning rates carry over. p is stored with every adapter.
"""

# r rank, O output rows, G groups in a row, I = G * group input features

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorafold.config import FULL


class GroupAdapter(nn.Module):
    """Low-rank or full update of one layer's offsets, scales, or both.

    Args:
        groups, out_features: G and O of the layer.
        group_size: weights that share an offset.
        r: rank, or `"full"`: one free number per group and row, D [O, G], so offset' = round(offset + D).
        scaling: s; unused with `"full"`.
        adapt: `offset`, `scale` or `both`.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scale_A: nn.Parameter
    scale_B: nn.Parameter
    offset_delta: nn.Parameter
    scale_delta: nn.Parameter

    def __init__(
        self, groups: int, out_features: int, group_size: int, r: int | str, scaling: float, adapt: str = "offset"
    ):
        super().__init__()
        self.group_size = group_size
        self.groups = groups
        self.scaling = scaling
        self.full = r == FULL
        self.learns_offset, self.learns_scale = adapt != "scale", adapt != "offset"
        names = {"lora": self.learns_offset, "scale": self.learns_scale}
        for name in (name for name, learned in names.items() if learned):
            if self.full:
                delta = nn.Parameter(torch.zeros(out_features, groups))
                setattr(self, "offset_delta" if name == "lora" else "scale_delta", delta)
                continue
            a = nn.Parameter(torch.empty(int(r), groups))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            setattr(self, f"{name}_A", a)
            setattr(self, f"{name}_B", nn.Parameter(torch.zeros(out_features, int(r))))

    @property
    def pooling_divisor(self) -> float:
        """p."""
        return math.sqrt(self.group_size)

    def offset_update(self) -> Tensor | None:
        """What is added to the offsets, [O, G] float32; None where they are not learned."""
        if not self.learns_offset:
            return None
        return self.offset_delta if self.full else self._product(self.lora_A, self.lora_B)

    def scale_update(self) -> Tensor | None:
        """By what share the scales grow, [O, G] float32; None where they are not learned."""
        if not self.learns_scale:
            return None
        return self.scale_delta if self.full else self._product(self.scale_A, self.scale_B)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.scaling / self.pooling_divisor) * (b @ a)

    def expanded(self) -> tuple[Tensor, Tensor]:
        """The same update of the offsets as an ordinary LoRA pair: A [r, I] and B [O, r] with  delta = s B A.

        Each column of A is repeated over its group and divided by p. With `r = full` the rank becomes
        G: row g of A marks the inputs of group g, B is the update itself, and s is 1.
        """
        if self.full:
            return self.group_marks(), self.offset_delta.detach()
        a = self.lora_A.detach().repeat_interleave(self.group_size, dim=1) / self.pooling_divisor
        return a, self.lora_B.detach()

    def group_marks(self) -> Tensor:
        """[G, I]: row g is 1 on the inputs of group g, so offsets [O, G] times this is their update of the weights."""
        device = next(self.parameters()).device
        return torch.eye(self.groups, device=device).repeat_interleave(self.group_size, dim=1)
