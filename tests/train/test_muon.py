"""Muon beside torch's, beside singular values in float64, and beside AdamW where it is not meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import XLNetConfig, XLNetForSequenceClassification

from lorafold.adapters.adapt import adapt
from lorafold.adapters.whole import trained_matrices
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.errors import ConfigError
from lorafold.models.load import load
from lorafold.train.loop import make_optimizer
from lorafold.train.muon import Muon, orthogonalized
from tests.adapters.test_methods import mixtral


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
    for size in (1e-4, 1.0, 1e12):
        turned = u.T @ orthogonalized((matrix * size).float()).double() @ v.T
        values = turned.diagonal()
        assert values.min() > 0.6
        assert values.max() < 1.3
        assert (turned - values.diag()).abs().max() < 1e-4  # rounding of float32 over five iterations
    for size in (1e-12, 1e-24, 1e-38):
        assert orthogonalized((matrix * size).float()).abs().max() < 0.01
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


def test_what_has_no_gradient_stays() -> None:
    """Whether it has none at all or only zeros, as a layer whose ranks are all gone, and however long."""
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.randn(4, 5))
    muon = Muon([{"params": [matrix], "matrices": True}], 0.01, 0.0)
    matrix.grad = torch.randn(4, 5)
    muon.step()
    stays = matrix.detach().clone()
    matrix.grad = None
    muon.step()
    assert torch.equal(matrix, stays)
    for _ in range(1200):  # the mean of the gradients underflows
        matrix.grad = torch.zeros(4, 5)
        muon.step()
    assert torch.equal(matrix, stays)


def test_embeddings_heads_and_vectors_are_not_moved_so(tiny_file: Callable[..., Path]) -> None:
    """Rows of tables stand for tokens, of which a step sees few."""
    loaded = load(tiny_file("llama", "Q4_1"))
    adapt(loaded.model, AdapterSpec("lora", 4, target_modules=("q_proj", "embed_tokens", "lm_head")))
    trained = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    moved = trained_matrices(loaded.model)
    assert {name for name in trained if "q_proj" in name} == moved
    assert len(moved) == 2 * loaded.model.config.num_hidden_layers
    assert all(any(part in name for name in trained) for part in ("embed_tokens", "lm_head"))
    plain = load(tiny_file("llama", "Q4_1"))
    adapt(plain.model, AdapterSpec("lora", 4, target_modules=("q_proj",), use_dora=True))
    trained = {name for name, p in plain.model.named_parameters() if p.requires_grad}
    vectors = {name for name in trained if name.endswith("magnitude_vector")}
    assert trained - vectors == trained_matrices(plain.model)
    assert vectors


def test_heads_by_other_names_and_experts() -> None:
    """XLNet's head is called logits_proj, and what comes before it is new as well; experts stand in one parameter."""
    options = {"vocab_size": 40, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32}
    xlnet = XLNetForSequenceClassification(XLNetConfig(**options))
    moved = trained_matrices(xlnet)
    assert moved
    assert all(name.startswith("transformer.layer.") for name in moved)
    experts = mixtral()
    adapt(experts, AdapterSpec("lora", 2, target_modules=("q_proj",), target_parameters=("gate_up_proj",)))
    moved = trained_matrices(experts)
    assert any("experts" in name for name, p in experts.named_parameters() if p.requires_grad)
    assert moved
    assert all("q_proj" in name for name in moved)


def test_nothing_to_be_moved_so_is_refused(tiny_file: Callable[..., Path]) -> None:
    loaded = load(tiny_file("llama", "Q4_1"))
    adapt(loaded.model, AdapterSpec("vera", 4))
    with pytest.raises(ConfigError, match="none is trained here"):
        make_optimizer(loaded, TrainingConfig(learning_rate=1e-3, optim="muon"))


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
