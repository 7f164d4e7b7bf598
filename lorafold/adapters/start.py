"""How A and B begin.

`kaiming`, `gaussian` and `orthogonal` are random. `pissa` and `olora` begin with a part B0 A0 of the weight itself,
which PEFT subtracts from the base. Here the base stays as it is, which a packed one must, and s B0 A0 is subtracted on
the way: the same sums, on any base. Such an adapter is a LoRA of rank 2 r on the weights that were there before.
"""

# r rank, I input features, O output features

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lorafold.adapters.lora import LoRA
from lorafold.adapters.sites import ConvSite
from lorafold.errors import AdapterError


@torch.no_grad()
def begin(adapter: LoRA, how: str) -> None:
    """Fill A and B of a fresh adapter.

    Args:
        how: a value of `init_lora_weights`; `eva` begins as `kaiming`, until `begin_from_inputs`.

    Raises:
        ValueError: that way is not known for this kind of layer.
        AdapterError: the rank is larger than the weight has directions.
    """
    a, b = adapter.learned()
    if not adapter.site.linear and how in ("kaiming", "eva", "gaussian"):
        nn.init.zeros_(a)  # as PEFT: ids are no numbers that A could scale, so B is the random one
        nn.init.normal_(b)
    elif how in ("kaiming", "eva"):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)
    elif how == "gaussian":
        nn.init.normal_(a, std=1 / a.shape[0])
        nn.init.zeros_(b)
    elif not adapter.site.linear or isinstance(adapter.site, ConvSite):
        raise ValueError(f"init_lora_weights {how} is for linear layers")
    elif how == "orthogonal":
        _orthogonal(a, b)
    else:
        weight = adapter.site.matrix()
        if a.shape[0] > min(weight.shape):
            raise AdapterError(
                f"init_lora_weights {how} takes r = {a.shape[0]} directions of a {list(weight.shape)} weight"
            )
        start_a, start_b = _olora(weight, a.shape[0]) if how == "olora" else _pissa(weight, a.shape[0], how)
        if how != "olora":
            start_a, start_b = start_a / math.sqrt(adapter.scaling), start_b / math.sqrt(adapter.scaling)
        adapter.start_A, adapter.start_B = start_a.clone(), start_b.clone()
        a.copy_(start_a)
        b.copy_(start_b)
    if adapter.dora:
        adapter.lora_magnitude_vector.copy_(adapter.norm())


def _orthogonal(a: Tensor, b: Tensor) -> None:
    """Rows of a random rotation, shared out between A and B, so that B A is zero and neither of them is."""
    r = a.shape[0]
    rotation = torch.linalg.qr(torch.randn(r, r))[0]
    a.copy_((torch.randn(a.shape[1], r // 2) @ rotation[0::2]).T / 10)
    b.copy_(torch.randn(r // 2, b.shape[0]).T @ rotation[1::2] / 10)


def _olora(weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q and rows of R in W = Q R."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def _pissa(weight: Tensor, r: int, how: str) -> tuple[Tensor, Tensor]:
    """The r largest singular vectors, each factor with the root of the singular values."""
    if how == "pissa":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    else:
        u, s, v = torch.svd_lowrank(weight, r, niter=int(how.rpartition("_")[2]))
        vt = v.T
    root = s[:r].sqrt()
    return root[:, None] * vt[:r], u[:, :r] * root


def directions(hessian: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What a layer's inputs mostly are.

    Args:
        hessian: X^T X [I, I].
        most: how many directions are wanted.

    Returns:
        The largest right singular vectors of X [most, I], and the share of the sum of squares in each [most].
    """
    values, vectors = torch.linalg.eigh(hessian.double())
    values, vectors = values.flip(0)[:most].clamp_min(0), vectors.flip(1)[:, :most]
    return vectors.T.float(), (values / hessian.double().trace().clamp_min(1e-300)).float()


def shared_out(shares: dict[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks by EVA's rule: of all directions of all layers those that explain most, `budget` of them together."""
    listed = sorted(
        ((float(share), path) for path, of_layer in shares.items() for share in of_layer), key=lambda x: -x[0]
    )
    ranks = dict.fromkeys(shares, 0)
    for _, path in listed[:budget]:
        ranks[path] += 1
    return ranks
