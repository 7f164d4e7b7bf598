"""LoRA (arXiv 2106.09685):  y = W0 x + s B A x,  with W0 frozen, A [r, in], B [out, r], s = alpha / r."""

# r rank, I input features, O output features

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LoRA(nn.Module):
    """The low-rank branch of one linear layer; it works on activations and never asks what the base is.

    A starts as PEFT's (Kaiming uniform with a = sqrt 5), B as zero, so the first output is the base's.

    Args:
        in_features, out_features: I and O of the layer.
        r: rank.
        scaling: s.
        dropout: probability of zeroing an input feature while training.
    """

    def __init__(self, in_features: int, out_features: int, r: int, scaling: float, dropout: float = 0.0):
        super().__init__()
        self.scaling = scaling
        self.dropout = dropout
        self.lora_A = nn.Parameter(torch.empty(r, in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + s B A x for x [..., I] and y [..., O], computed in the type of x; one pass over y."""
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.linear(x, self.lora_A.to(x.dtype)).flatten(0, -2)
        out = torch.addmm(y.flatten(0, -2), hidden, self.lora_B.to(x.dtype).t(), alpha=self.scaling)
        return out.view_as(y)

    def delta(self) -> Tensor:
        """The update of the weight, s B A [O, I]."""
        return self.scaling * (self.lora_B @ self.lora_A)
