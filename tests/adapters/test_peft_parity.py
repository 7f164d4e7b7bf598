"""LoRA here is PEFT's LoRA: same forward pass, gradients and training, and each loads the other's folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.packs import pack
from lorafold.errors import AdapterError
from lorafold.evals.loss import pack_loss
from lorafold.models.adapter_files import load_adapter, save_adapter
from lorafold.models.exports import export_peft
from lorafold.models.load import LoadedModel, load
from lorafold.quant.ggml import Codec
from lorafold.train.loop import epoch_batches, train_steps
from tests.practice import lora_like, row_losses, same_logits, tiny_folder, token_rows
from tests.tiny import tiny_model

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXACT = 1e-5  # both compute in float32; logits reach about 6 and their sums are taken in other orders
RANDOM = 0.1  # standard deviation of A and B where an adapter is not trained


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("folder"))


@pytest.fixture
def base() -> PreTrainedModel:
    """transformers' model with the weights of `folder`, for PEFT."""
    return tiny_model("llama", "F32")


def wrapped(base: PreTrainedModel, **options: Any) -> Any:
    """A PEFT model with random A and B."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * RANDOM)
    return model.eval()


def peft_name(key: str) -> str:
    return f"base_model.model.{key}.default.weight"


def copied(theirs: Any, loaded: LoadedModel) -> None:
    """Give our adapter PEFT's A and B."""
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for key, parameter in adapter_state(loaded.model).items():
            parameter.copy_(parameters[peft_name(key)])


def pair(folder: Path, base: PreTrainedModel, **options: Any) -> tuple[LoadedModel, Any]:
    """Our model and PEFT's with the same adapter."""
    theirs, loaded = wrapped(base, **options), load(folder)
    inject(loaded.model, AdapterSpec("lora", r=4, lora_alpha=8, use_rslora=options.get("use_rslora", False)))
    copied(theirs, loaded)
    return loaded, theirs


@pytest.mark.parametrize("use_rslora", [False, True])
def test_forward_equals_peft(folder: Path, base: PreTrainedModel, use_rslora: bool) -> None:
    loaded, theirs = pair(folder, base, use_rslora=use_rslora)
    same_logits(loaded.model, theirs, EXACT)
    with theirs.disable_adapter(), pytest.raises(AssertionError):  # the adapter is no trifle
        same_logits(loaded.model, theirs, 0.1)


def test_initial_adapter_is_distributed_as_pefts(folder: Path, base: PreTrainedModel) -> None:
    """B zero; A uniform on (-1/sqrt(in), 1/sqrt(in)), of which the largest of 4 x 64 entries comes close to the end."""
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=TARGETS))
    loaded = load(folder)
    inject(loaded.model, AdapterSpec("lora", r=4))
    parameters = dict(theirs.named_parameters())
    state = adapter_state(loaded.model)
    assert {peft_name(key) for key in state} == {name for name in parameters if "lora_" in name}
    for key, ours in state.items():
        other = parameters[peft_name(key)]
        assert ours.shape == other.shape
        if key.endswith("lora_B"):
            assert not ours.any()
            assert not other.any()
        else:
            bound = ours.shape[1] ** -0.5
            for a in (ours, other):
                assert 0.95 * bound < a.abs().max() <= bound
                assert a.detach().std().item() == pytest.approx(bound / 3**0.5, rel=0.15)  # 256 samples: a few per cent


def test_loss_and_gradients_equal_pefts(folder: Path, base: PreTrainedModel) -> None:
    loaded, theirs = pair(folder, base)
    rows = token_rows(6)
    ours = pack_loss(loaded, pack(rows, 16))
    other = row_losses(theirs, rows)
    torch.testing.assert_close(ours, other, rtol=1e-6, atol=0)
    count = sum(sum(row.supervised) for row in rows)
    (ours / count).backward()
    (other / count).backward()
    parameters = dict(theirs.named_parameters())
    for key, parameter in adapter_state(loaded.model).items():
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4  # so that the tolerance below says something
        torch.testing.assert_close(parameter.grad, parameters[peft_name(key)].grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_fifty_steps_equal_pefts(folder: Path, base: PreTrainedModel, accumulation: int) -> None:
    """The loop against one written from the text books: padded nothing, plain AdamW, mean over supervised tokens."""
    loaded, theirs = pair(folder, base)
    rows = token_rows(18)
    config = TrainingConfig(
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=2e-3,
        max_steps=50,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        max_grad_norm=1.0,
        micro_batch_tokens=40,
        dtype="float32",
    )
    steps = list(train_steps(loaded, rows, config))
    expected = list(peft_training(theirs, rows, config))
    assert [step.step for step in steps] == list(range(1, 51))
    assert steps[-1].loss < steps[0].loss - 0.5
    assert any(norm > 1 for _, norm in expected)  # clipping takes part
    # rounding (1e-7) grows a little with every step, since AdamW divides by the size of the gradient
    for step, (loss, norm) in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-5)
        assert step.grad_norm == pytest.approx(norm, rel=1e-3)
    parameters = dict(theirs.named_parameters())
    for key, parameter in adapter_state(loaded.model).items():
        torch.testing.assert_close(parameter, parameters[peft_name(key)], atol=EXACT, rtol=0)  # they moved by 1e-2
    same_logits(loaded.model, theirs.eval(), 1e-4)  # of logits that moved by several units


def peft_training(model: Any, rows: list, config: TrainingConfig) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = epoch_batches(len(rows), config)
    for _ in range(config.max_steps or 0):
        batch = [rows[i] for i in next(batches)]
        loss = row_losses(model, batch) / sum(sum(row.supervised) for row in batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        yield float(loss.detach()), float(norm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"target_modules": ["q_proj", "model.layers.1.mlp.down_proj"]},
        {"target_modules": r".*\.[12]\.self_attn\.(q|v)_proj"},
        {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
        {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"v_proj": 32, "down_proj": 1}},
        {"rank_pattern": {r"layers\.[01]\..*": 3}, "alpha_pattern": {r".*_proj": 5}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "names", "regex", "exclude", "layers", "patterns", "patterns with rslora"],
)
def test_loads_what_peft_saved(folder: Path, base: PreTrainedModel, tmp_path: Path, options: dict[str, Any]) -> None:
    theirs = wrapped(base, **options)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = load(folder)
    injection = load_adapter(loaded, tmp_path)
    assert injection.trainable == sum(p.numel() for n, p in theirs.named_parameters() if "lora_" in n)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    same_logits(loaded.model, theirs, EXACT)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT advises against some of these
@pytest.mark.parametrize(
    "options",
    [
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
    ],
    ids=["lora_bias", "pissa", "olora"],
)
def test_what_cannot_be_loaded_is_refused(
    folder: Path, base: PreTrainedModel, tmp_path: Path, options: dict[str, Any]
) -> None:
    """These change what the tensors mean (the last two: the base that they are added to)."""
    (key,) = options
    wrapped(base, **options).save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = load(folder)
    with pytest.raises(AdapterError, match=f"{key}|unexpected tensor .*lora_B.bias"):
        load_adapter(loaded, tmp_path)
    assert not list(adapted_layers(loaded.model))


def test_saved_lora_loads_in_peft(folder: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    loaded = load(folder)
    spec = AdapterSpec("lora", r=5, lora_alpha=7, target_modules=("q_proj", "model.layers.2.mlp.up_proj"))
    inject(loaded.model, spec)
    lora_like(loaded.model, scale=RANDOM)
    save_adapter(tmp_path / "adapter", loaded, spec)
    same_logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), loaded.model, EXACT)


@pytest.mark.parametrize("types", ["Q4_1", "Q5_0"])
@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec("lora", r=3, use_rslora=True),
        AdapterSpec("qa-lora", r=4),
        AdapterSpec("qa-lora", r=4, lora_alpha=3, use_rslora=True, target_modules=("q_proj", "down_proj")),
        AdapterSpec("qa-lora", r="full"),
    ],
    ids=["lora", "qa-lora", "qa-lora rslora", "qa-lora full"],
)
def test_exported_adapter_loads_in_peft(
    tiny_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: AdapterSpec, types: str
) -> None:
    """On the base's decoded weights. Full offsets are exported as the file rounds them, so they agree as they are; a
    low rank cannot repeat the rounding (2^-11 of each offset at most), so it is compared without it first."""
    loaded = load(tiny_file("llama", types))
    inject(loaded.model, spec)
    lora_like(loaded.model, scale=0.05 if spec.r == "full" else 0.5)
    export_peft(loaded, spec, tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(tiny_model("llama", types), tmp_path / "out")
    with theirs.disable_adapter(), pytest.raises(AssertionError):
        same_logits(theirs, loaded.model, 1.0)
    if spec.method == "qa-lora" and spec.r != "full":
        same_logits(theirs, loaded.model, 0.1)  # the rounding of all offsets together; measured 0.04
        monkeypatch.setattr(Codec, "move_offset", lambda _, stored, update: stored + update)
    same_logits(theirs, loaded.model, 30 * EXACT)  # both are up to 1e-4 from PEFT's logits in float64, on a CPU of AMD


def test_a_full_export_names_each_rank(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """The rank is the number of groups, which differs from layer to layer."""
    loaded = load(tiny_file("llama", "Q4_1"))
    spec = AdapterSpec("qa-lora", r="full")
    inject(loaded.model, spec)
    export_peft(loaded, spec, tmp_path / "out")
    config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert config.r == 2
    assert config.rank_pattern == {f"model.layers.{i}.mlp.down_proj": 3 for i in range(3)}


def test_pefts_adapter_needs_no_hash_and_ours_is_bound_to_its_base(
    folder: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    wrapped(base).save_pretrained(tmp_path / "peft", save_embedding_layers=False)
    tiny_folder(tmp_path / "other", seed=1)
    load_adapter(load(tmp_path / "other"), tmp_path / "peft")
    loaded = load(folder)
    load_adapter(loaded, tmp_path / "peft")
    save_adapter(tmp_path / "ours", loaded, AdapterSpec("lora", r=4, lora_alpha=8))
    with pytest.raises(AdapterError, match="trained on other base weights"):
        load_adapter(load(tmp_path / "other"), tmp_path / "ours")
