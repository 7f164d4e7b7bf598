"""Methods without adapters: the trajectory of plain torch, tied weights, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lorafold.adapters.adapt import adapt, unload, unmerged
from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import inject
from lorafold.adapters.whole import blocks, head
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.errors import AdapterError
from lorafold.models.adapter_files import load_adapter, save_adapter
from lorafold.models.load import load
from lorafold.train.loop import epoch_batches, train_steps
from tests.practice import row_losses, tiny_folder, token_rows
from tests.tiny import tiny_ids

SPECS = [AdapterSpec("full"), AdapterSpec("last-layers", layers=2), AdapterSpec("head")]
CONFIG = TrainingConfig(
    per_device_train_batch_size=4, learning_rate=3e-3, max_steps=5, warmup_ratio=0.0, lr_scheduler_type="constant"
)


def meant(model: nn.Module, spec: AdapterSpec, tied: bool) -> list[str]:
    """Names of the trained parameters, said by hand."""
    wanted = {
        "full": ("",),
        "last-layers": ("model.layers.1.", "model.layers.2.", "model.norm.", *(() if tied else ("lm_head.",))),
        "head": ("lm_head.",),
    }[spec.method]
    return [name for name, _ in model.named_parameters() if name.startswith(wanted)]


CASES = [(spec, tied) for spec in SPECS for tied in (True, False) if not (tied and spec.method == "head")]


@pytest.mark.parametrize(("spec", "tied"), CASES, ids=lambda x: getattr(x, "method", f"tied {x}"))
def test_training_is_that_of_plain_torch(spec: AdapterSpec, tied: bool, tmp_path: Path) -> None:
    """AdamW on transformers' own model, row by row, gives the same weights; then they are stored and loaded."""
    folder = tiny_folder(tmp_path / "model", tied=tied)
    loaded, rows = load(folder), token_rows(10)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    names = meant(theirs, spec, tied)
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in names)
    trained = [p for p in theirs.parameters() if p.requires_grad]
    injection = inject(loaded.model, spec)
    assert injection.modules == names
    assert injection.trainable == sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=3e-3, weight_decay=0.0)
    order = epoch_batches(len(rows), CONFIG)
    for step in train_steps(loaded, rows, CONFIG):
        batch = [rows[i] for i in next(order)]
        loss = row_losses(theirs, batch) / sum(sum(row.supervised[1:]) for row in batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert step.loss == pytest.approx(float(loss.detach()), abs=2e-5)
    ids = tiny_ids(30)
    with torch.no_grad():
        logits = loaded.model.eval()(ids).logits
        torch.testing.assert_close(logits, theirs(ids).logits, atol=2e-3, rtol=0)
    save_adapter(tmp_path / "adapter", loaded, spec)
    again = load(folder)
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(again.model(ids).logits, logits)


def test_the_base_is_still_there(tmp_path: Path) -> None:
    loaded, ids = load(tiny_folder(tmp_path)), tiny_ids(12)
    with torch.no_grad():
        plain = loaded.model(ids).logits
        adapt(loaded.model, AdapterSpec("full"))
        for parameter in loaded.model.parameters():
            if parameter.requires_grad:
                parameter += 0.01
        moved = loaded.model(ids).logits
        assert not torch.allclose(moved, plain)
        with unmerged(loaded.model):
            assert torch.equal(loaded.model(ids).logits, plain)
        unload(loaded.model, merge=True)
        assert torch.equal(loaded.model(ids).logits, moved)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_in_bfloat16_small_steps_are_not_lost(tmp_path: Path) -> None:
    """Values are float32: steps far below bfloat16's precision add up."""
    loaded = load(tiny_folder(tmp_path), torch.bfloat16)
    inject(loaded.model, AdapterSpec("full"))
    before = loaded.model.model.norm.weight.detach().clone()  # type: ignore[union-attr]
    value = next(p for n, p in loaded.model.named_parameters() if p.requires_grad and "model.norm" in n)
    for _ in range(200):
        value.data += before.float().abs() * 1e-4
    after = loaded.model.model.norm.weight.detach()  # type: ignore[union-attr]
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float().abs(), before.float().abs() * 1.02, rtol=1e-2, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.method)
def test_packed_weights_are_refused(spec: AdapterSpec, tiny_file: Callable[..., Path]) -> None:
    model = load(tiny_file("llama", "Q4_1", tied=False)).model
    with pytest.raises(AdapterError, match=rf"packed.*--method {spec.method} needs weights that are not quantized"):
        inject(model, spec)
    assert not any(p.requires_grad for p in model.parameters())


def test_a_tied_head_and_too_many_blocks_are_refused(tmp_path: Path) -> None:
    model = load(tiny_folder(tmp_path)).model
    with pytest.raises(AdapterError, match="embedding's weights"):
        inject(model, AdapterSpec("head"))
    with pytest.raises(AdapterError, match="layers is 4, and the model has 3 blocks"):
        inject(model, AdapterSpec("last-layers", layers=4))
    with pytest.raises(AdapterError, match="no head"):
        inject(nn.Sequential(nn.Linear(2, 2)), AdapterSpec("head"))
    with pytest.raises(AdapterError, match="no list of blocks"):
        inject(nn.Sequential(nn.Linear(2, 2)), AdapterSpec("last-layers"))


@pytest.mark.parametrize("kind", ["distilbert", "roberta"])
def test_a_head_of_several_layers_is_trained_whole_and_not_adapted_as_well(kind: str) -> None:
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24} if kind == "distilbert" else {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24
    }  # fmt: skip
    config = AutoConfig.for_model(kind, vocab_size=30, num_labels=3, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    names = tuple(head(model))
    adapt(model, AdapterSpec("lora", r=2, modules_to_save=names))
    assert not [path for path, _ in adapted_layers(model) if path.startswith(names)]
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
        logits = model(ids).logits
        unload(model, merge=True)
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=0)
    with pytest.raises(AdapterError, match="trained whole as well"):
        inject(model, AdapterSpec("lora", target_modules=(r".*classifier.*",), modules_to_save=names))


def test_experts_are_no_blocks() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    model = nn.Module()
    model.layers = nn.ModuleList(Block() for _ in range(3))
    assert blocks(model) == ["layers.0", "layers.1", "layers.2"]
