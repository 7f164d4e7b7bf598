"""Where LoRA can sit: one class per kind of layer.

Every kind has a weight that can be seen as a matrix W [O, I], and LoRA adds s B A to it, with A [r, I], B [O, r]:

    kind        W                              A, B as stored (PEFT's shapes)
    linear      weight                         [r, I], [O, r]
    Conv1D      weight^T (GPT-2)               [r, I], [O, r]
    embedding   weight^T, I the vocabulary     [r, I], [O, r], named lora_embedding_A and _B
    conv        weight, I = channels x kernel  [r, channels, kernel...], [O, r, 1...]

With groups of channels W has one block for each group, and so has B A: A [r, channels / groups, kernel...], r divided
among the groups. (PEFT lets A see all channels there, which cannot be merged.)
"""

# r rank, I input features, O output features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lorafold.quant.linear import QuantEmbedding, QuantLinear

Shapes = tuple[tuple[int, ...], tuple[int, ...]]
_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


class LinearSite:
    """LoRA on a linear layer, dense or packed, and what the other kinds have in common.

    Attributes:
        base: the frozen layer.
        names: of A and B.
        channel: dimension of the output features in the layer's output.
        linear: whether the input are numbers that A multiplies.
    """

    names = ("lora_A", "lora_B")
    channel = -1
    linear = True

    def __init__(self, base: Any):
        self.base = base

    def shapes(self, r: int) -> Shapes:
        """Shapes of A and B."""
        return (r, self.base.in_features), (self.base.out_features, r)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x, in the shape of the layer's output."""
        return F.linear(F.linear(x, a), b)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A as a matrix [O, I] (with groups [O, I / groups])."""
        return b @ a

    def matrix(self) -> Tensor:
        """The weight as such a matrix, float32."""
        return self.stored(self.weight())

    def stored(self, matrix: Tensor) -> Tensor:
        """Such a matrix in the shape of the weight."""
        return matrix

    def weight(self) -> Tensor:
        """The weight in its own shape, float32."""
        if isinstance(self.base, QuantLinear | QuantEmbedding):
            return self.base.packed.decode(torch.float32)
        return self.base.weight.detach().float()


class Conv1DSite(LinearSite):
    """The linear layer of GPT-2, whose weight is stored [I, O]."""

    def shapes(self, r: int) -> Shapes:
        """Shapes of A and B."""
        width, out = self.base.weight.shape
        return (r, width), (out, r)

    def stored(self, matrix: Tensor) -> Tensor:
        """Such a matrix in the shape of the weight."""
        return matrix.T


class EmbeddingSite(Conv1DSite):
    """A lookup table [vocabulary, O]: A^T is looked up where a one-hot vector would be multiplied."""

    names = ("lora_embedding_A", "lora_embedding_B")
    linear = False

    def shapes(self, r: int) -> Shapes:
        """Shapes of A and B."""
        base = self.base
        rows, width = base.shape if isinstance(base, QuantEmbedding) else base.weight.shape
        return (r, rows), (width, r)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x, scaled as the base scales its own vectors."""
        y = F.linear(F.embedding(x, a.T, padding_idx=getattr(self.base, "padding_idx", None)), b)
        scale = getattr(self.base, "scale" if isinstance(self.base, QuantEmbedding) else "embed_scale", 1.0)
        return y * scale if isinstance(scale, Tensor) or scale != 1.0 else y


class ConvSite(LinearSite):
    """A convolution: A has its kernel, stride, padding and dilation, B is a convolution of one point."""

    channel = 1

    def shapes(self, r: int) -> Shapes:
        """Shapes of A and B."""
        ones = (1,) * len(self.base.kernel_size)
        return (r, *self.base.weight.shape[1:]), (self.base.out_channels, r // self.base.groups, *ones)

    def branch(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """B A x, in the shape of the layer's output."""
        pointwise = next(function for kind, function in _CONVOLUTIONS.items() if isinstance(self.base, kind))
        return pointwise(self.base._conv_forward(x, a, None), b, groups=self.base.groups)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """B A as a matrix [O, I / groups]."""
        groups = self.base.groups
        a, b = a.flatten(1).unflatten(0, (groups, -1)), b.flatten(1).unflatten(0, (groups, -1))
        return (b @ a).flatten(0, 1)

    def matrix(self) -> Tensor:
        """The weight as such a matrix, float32."""
        return self.weight().flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        """Such a matrix in the shape of the weight."""
        return matrix.view(self.base.weight.shape)


SITES: dict[type[nn.Module], type[LinearSite]] = {
    nn.Linear: LinearSite,
    QuantLinear: LinearSite,
    Conv1D: Conv1DSite,
    nn.Embedding: EmbeddingSite,
    QuantEmbedding: EmbeddingSite,
    **dict.fromkeys(_CONVOLUTIONS, ConvSite),
}


def site_of(module: nn.Module) -> LinearSite:
    """How LoRA sits on a layer of one of the kinds in `SITES`."""
    return next(site for kind, site in SITES.items() if isinstance(module, kind))(module)
