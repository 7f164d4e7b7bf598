"""Muon beside torch's, beside singular values in float64, and beside AdamW where it is not meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lorafold.adapters.adapt import adapt
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.errors import ConfigError
from lorafold.models.load import LoadedModel, load
from lorafold.train.loop import make_optimizer
from lorafold.train.muon import Muon, orthogonalized


def _matrix(shape: tuple[int, int], smallest: float) -> Tensor:
    """With singular values from 1 down to `smallest`."""
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    return u @ torch.diag(torch.logspace(0, torch.log10(torch.tensor(smallest)), min(shape)).double()) @ v


@pytest.mark.parametrize("shape", [(7, 40), (40, 7), (16, 16), (1, 9), (9, 1)])
def test_all_directions_become_nearly_equal(shape: tuple[int, int]) -> None:
    """The singular vectors stay, in order; values down to a hundredth of the largest come near 1, at any size."""
    torch.manual_seed(0)
    matrix = _matrix(shape, 0.01)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    for size in (1e-12, 1.0, 1e12):
        turned = u.T @ orthogonalized((matrix * size).float()).double() @ v.T
        values = turned.diagonal()
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (turned - values.diag()).abs().max() < 1e-4  # rounding of float32 over five iterations
    assert orthogonalized(torch.zeros(shape)).abs().max() == 0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_move_as_with_torchs_muon(weight_decay: float) -> None:
    """Which computes in bfloat16, and whose rate is five times the size of an element's step."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((12, 30), (64, 6))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    options = {"lr": 5 * 0.02, "weight_decay": weight_decay / 5, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    other = torch.optim.Muon(theirs, **options)  # type: ignore[arg-type]
    muon = Muon([{"params": ours, "matrices": True}], 0.02, weight_decay)
    before = [p.detach().clone() for p in ours]
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step()
        other.step()
    for a, b, old in zip(ours, theirs, before, strict=True):
        moved = (b - old).norm()
        assert (a - b).norm() < 0.02 * moved  # bfloat16 keeps 8 bits
        assert 0.02 < float((a.detach() - old).square().mean().sqrt()) < 4 * 0.03  # four steps of about 0.02


def test_all_else_moves_as_with_adamw() -> None:
    """Bit for bit, and gradients are there afterwards."""
    torch.manual_seed(0)
    vector, matrix = nn.Parameter(torch.randn(9)), nn.Parameter(torch.randn(4, 5))
    alone = nn.Parameter(vector.detach().clone())
    muon = Muon([{"params": [vector], "matrices": False}, {"params": [matrix], "matrices": True}], 0.01, 0.1)
    adamw = torch.optim.AdamW([alone], lr=0.01, weight_decay=0.1, fused=True)
    for _ in range(3):
        vector.grad, matrix.grad = torch.randn(9), torch.randn(4, 5)
        alone.grad = vector.grad.clone()
        muon.step()
        adamw.step()
        assert matrix.grad is not None
    assert torch.equal(vector, alone)
    matrix.grad = None
    stays = matrix.detach().clone()
    muon.step()
    assert torch.equal(matrix, stays)


def _moved_whole(loaded: LoadedModel, **options: object) -> set[str]:
    optimizer = make_optimizer(loaded, TrainingConfig(learning_rate=1e-3, optim="muon", **options))  # type: ignore[arg-type]
    ids = {id(p) for group in optimizer.param_groups if group["matrices"] for p in group["params"]}
    return {name for name, p in loaded.model.named_parameters() if id(p) in ids}


def test_embeddings_heads_and_vectors_are_not_moved_so(tiny_file: Callable[..., Path]) -> None:
    """Their rows stand for tokens, of which a step sees few."""
    loaded = load(tiny_file("llama", "Q4_1"))
    targets = ("q_proj", "embed_tokens", "lm_head")
    adapt(loaded.model, AdapterSpec("lora", 4, target_modules=targets, use_dora=False))
    names = _moved_whole(loaded)
    assert names
    assert all("q_proj" in name for name in names)
    assert any("embed_tokens" in name for name, p in loaded.model.named_parameters() if p.requires_grad)


def test_b_may_be_faster(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    adapt(loaded.model, AdapterSpec("lora", 4))
    config = TrainingConfig(learning_rate=1e-3, optim="muon", loraplus_lr_ratio=16)
    scales = {group["lr_scale"]: len(group["params"]) for group in make_optimizer(loaded, config).param_groups}
    assert set(scales) == {1.0, 16}
    assert scales[1.0] == scales[16]


def test_an_optimizer_that_is_not_known() -> None:
    with pytest.raises(ConfigError, match="adamw and muon"):
        TrainingConfig(optim="sgd")  # type: ignore[arg-type]
