"""Methods times modules: outputs, gradients, merged weights and files are PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.pytorch_utils import Conv1D

from lorafold.adapters.adapt import adapt, merged, unload, unmerged
from lorafold.adapters.adapted import adapter_names, carriers
from lorafold.adapters.inject import adapter_state
from lorafold.config import AdapterSpec
from lorafold.models.adapter_files import attach_tensors, write_adapter_folder
from lorafold.models.peft_config import spec_of
from lorafold.models.peft_format import PREFIX, stored_config, stored_names, stored_tensors

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::peft.utils.warning.PeftWarning")

EXACT = 1e-5  # both compute in float32, with sums in other orders, of numbers of size one


class One(nn.Module):
    """One layer under a name, with an activation after it."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer
        self.attends = isinstance(layer, nn.MultiheadAttention)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output through tanh."""
        y = self.layer(x, x, x)[0] if self.attends else self.layer(x)
        return torch.tanh(y)


MODULES: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 10), (3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 10, bias=False), (2, 3, 12)),
    "Conv1D": (lambda: Conv1D(10, 12), (2, 3, 12)),
    "embedding": (lambda: nn.Embedding(12, 10, padding_idx=0), None),
    "conv1d": (lambda: nn.Conv1d(3, 10, 3, stride=2, padding=1), (2, 3, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 10, (3, 2), padding=(1, 0)), (2, 3, 6, 5)),
    "conv2d of one point": (lambda: nn.Conv2d(3, 10, 1, bias=False), (2, 3, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 10, 2), (2, 2, 4, 3, 3)),
    "attention": (lambda: nn.MultiheadAttention(12, 3, batch_first=True), (2, 5, 12)),
}
LINEAR = ("linear", "linear without bias", "Conv1D")
CONVOLUTIONS = ("conv1d", "conv2d", "conv2d of one point", "conv3d")
METHODS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "lora": ({}, tuple(MODULES)),
    "rslora": ({"use_rslora": True}, tuple(MODULES)),
    "dora": ({"use_dora": True}, (*LINEAR, "embedding", *CONVOLUTIONS)),
    "gaussian": ({"init_lora_weights": "gaussian"}, (*LINEAR, "embedding", *CONVOLUTIONS)),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, LINEAR),
    "pissa": ({"init_lora_weights": "pissa"}, ("linear", "linear without bias")),
    "pissa_niter_8": ({"init_lora_weights": "pissa_niter_8"}, ("linear", "linear without bias")),
    "olora": ({"init_lora_weights": "olora"}, ("linear", "linear without bias")),
    "pissa dora": ({"init_lora_weights": "pissa", "use_dora": True}, ("linear",)),
    "bias": ({"bias": "lora_only"}, ("linear", "Conv1D", "conv1d", "conv2d", "conv3d")),
    "vera": ({}, ("linear", "linear without bias")),
}
CASES = [pytest.param(m, k, id=f"{m}-{k}") for m, (_, kinds) in METHODS.items() for k in kinds]


def models(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two equal modules and an input."""
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    x = torch.randint(0, 12, (2, 5)) if shape is None else torch.randn(shape)
    ours = One(make())
    return ours, copy.deepcopy(ours), x


def config_of(method: str, options: dict[str, Any]) -> Any:
    if method == "vera":
        return peft.VeraConfig(r=4, target_modules=["layer"], d_initial=0.3)
    return peft.LoraConfig(r=4, lora_alpha=6, target_modules=["layer"], **options)


def spec_for(method: str, options: dict[str, Any]) -> AdapterSpec:
    if method == "vera":
        return AdapterSpec("vera", r=4, target_modules=("layer",), d_initial=0.3)
    return AdapterSpec("lora", r=4, lora_alpha=6, target_modules=("layer",), **options)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def spread(theirs: nn.Module, seed: int = 1) -> None:
    """Move whatever PEFT trains by random numbers (B begins as zero, which would hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in trained(theirs).items():
            if "out_proj.lora_B" not in name:  # PEFT 0.21 adds the update of an attention's out_proj twice
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def file_key(name: str) -> str:
    """PEFT's key in a file of one of its parameters."""
    return name.replace(".default", "").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def copied(theirs: nn.Module, ours: nn.Module) -> dict[str, str]:
    """Give our adapter the parameters of PEFT's; our name -> PEFT's for each."""
    names = {file_key(name): name for name in trained(theirs)}
    pairs = {}
    with torch.no_grad():
        values = dict(theirs.named_parameters())
        for key, stored in stored_names(ours, "default").items():
            parameter, value = adapter_state(ours)[key], values[names[stored]]
            if key.endswith(".change"):
                value = value - dict(ours.named_parameters())[_original(ours, key)]
            parameter.copy_(value.view(parameter.shape))
            pairs[key] = names[stored]
    assert set(pairs.values()) == set(names.values())
    return pairs


def _original(ours: nn.Module, key: str) -> str:
    owner, _, parameter = key.removesuffix(".change").rpartition(".")
    return next(n for n in dict(ours.named_parameters()) if n.startswith(owner) and n.endswith(f"{parameter}.original"))


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_computes_what_peft_computes(method: str, kind: str) -> None:
    """Outputs and gradients of everything that is trained, at the start and after a change of all of it."""
    options, _ = METHODS[method]
    ours, base, x = models(kind)
    plain = base(x)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base, config_of(method, options))
    adapt(ours, spec_for(method, options))
    torch.testing.assert_close(ours(x), plain, atol=EXACT, rtol=0)
    torch.testing.assert_close(theirs(x), plain, atol=EXACT, rtol=0)
    random = method == "pissa_niter_8"  # the test matrix is drawn
    if method in ("pissa", "olora", "pissa dora", "vera"):  # the start is no random number
        ours_now = {file_key(k): v for k, v in stored_state(ours).items()}
        for name, value in trained(theirs).items():
            torch.testing.assert_close(ours_now[file_key(name)], value, atol=EXACT, rtol=0)
    if random:
        return
    spread(theirs)
    pairs = copied(theirs, ours)
    torch.testing.assert_close(ours(x), theirs(x), atol=EXACT, rtol=0)
    assert (theirs(x) - plain).abs().max() > 0.02
    direction = torch.randn(plain.shape)
    state, parameters = adapter_state(ours), dict(theirs.named_parameters())
    ours_grads = torch.autograd.grad((ours(x) * direction).sum(), list(state.values()))
    wanted = torch.autograd.grad((theirs(x) * direction).sum(), [parameters[pairs[key]] for key in state])
    for key, grad, want in zip(state, ours_grads, wanted, strict=True):
        torch.testing.assert_close(
            grad, want.view(grad.shape), atol=EXACT, rtol=EXACT, msg=lambda m, key=key: f"{key}: {m}"
        )


def stored_state(ours: nn.Module) -> dict[str, Tensor]:
    """What is trained, by PEFT's keys (of a start that is no zero without the start)."""
    state = adapter_state(ours)
    return {stored: state[key] for key, stored in stored_names(ours, "default").items()}


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_merges_as_peft_merges(method: str, kind: str) -> None:
    """Merged for a while, for good, and not at all."""
    options, _ = METHODS[method]
    ours, base, x = models(kind)
    plain, before = base(x), {k: v.clone() for k, v in ours.state_dict().items()}
    theirs = peft.get_peft_model(base, config_of(method, options))
    adapt(ours, spec_for(method, options))
    if method == "pissa_niter_8":
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapter_state(ours).values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    else:
        spread(theirs)
        copied(theirs, ours)
    wanted = ours(x).detach()
    with unmerged(ours):  # attention of torch takes another path with parameters that are computed
        torch.testing.assert_close(ours(x), plain, atol=EXACT if kind == "attention" else 0, rtol=0)
    with merged(ours):
        torch.testing.assert_close(ours(x), wanted, atol=EXACT, rtol=0)
    torch.testing.assert_close(ours(x), wanted, atol=0, rtol=0)
    twin = models(kind)[0]
    adapt(twin, spec_for(method, options))
    unload(twin)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(v, before[k]) for k, v in twin.state_dict().items())
    unload(ours, merge=True)
    assert not list(carriers(ours))
    torch.testing.assert_close(ours(x), wanted, atol=EXACT, rtol=0)
    if method != "pissa_niter_8" and kind != "attention":  # PEFT leaves its layer around the attention
        whole = dict(theirs.merge_and_unload().named_parameters())
        for key, value in ours.named_parameters():
            torch.testing.assert_close(value, whole[key], atol=EXACT, rtol=0)


@pytest.mark.parametrize(("method", "kind"), CASES)
def test_files_go_both_ways(method: str, kind: str, tmp_path: Path) -> None:
    """PEFT reads what we write, and we what it writes; where PEFT changed its base, we write for the one there was."""
    options, _ = METHODS[method]
    ours, base, x = models(kind)
    fresh, other = copy.deepcopy(base), copy.deepcopy(base)
    spec = spec_for(method, options)
    adapt(ours, spec)
    with torch.no_grad():
        for key, parameter in adapter_state(ours).items():
            parameter += 0.3 * torch.randn(parameter.shape) * ("out_proj" not in key)
    write_adapter_folder(
        tmp_path / "ours", stored_config(ours, spec, "default"), stored_tensors(ours, "default"), {"format": "pt"}
    )
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), ours(x), atol=EXACT, rtol=0)
    if "pissa" in method or method == "olora":
        return  # what PEFT writes is for the base that it has changed: refused, tests/adapters/test_peft_parity.py
    made = peft.get_peft_model(fresh, config_of(method, options))
    spread(made)
    made.save_pretrained(tmp_path / "theirs")
    config = made.peft_config["default"].to_dict() | {"peft_type": "VERA" if method == "vera" else "LORA"}
    tensors = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    injection = attach_tensors(other, spec_of(config), config, tensors)
    torch.testing.assert_close(other(x), made(x), atol=EXACT, rtol=0)
    assert not trained(other).keys() & {key for key, _ in other.named_parameters() if "adapters" in key}
    assert injection.modules
    assert adapter_names(other) == ["default"]
    assert set(stored_tensors(other, "default")) == set(tensors)


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=2,
    )
    return MixtralForCausalLM(config).eval()


@pytest.mark.parametrize(
    "parameters", [("gate_up_proj",), ("mlp.experts.down_proj", "gate_up_proj")], ids=["one", "two"]
)
def test_experts_equal_pefts(parameters: tuple[str, ...], tmp_path: Path) -> None:
    """Stored [experts, out, in]; an A and a B for each expert, beside ordinary layers."""
    ours, base = mixtral(), mixtral()
    ids = torch.randint(0, 64, (2, 7))
    full = [f"mlp.experts.{name.rpartition('.')[2]}" for name in parameters]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], target_parameters=full)
    )
    spec = AdapterSpec("lora", r=2, lora_alpha=6, target_modules=("q_proj",), target_parameters=parameters)
    adaptation = adapt(ours, spec)
    spread(theirs)
    pairs = copied(theirs, ours)
    assert adaptation.trained == sum(p.numel() for p in trained(theirs).values())
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=EXACT, rtol=0)
    state, values = adapter_state(ours), dict(theirs.named_parameters())
    ours_grads = torch.autograd.grad(ours(ids).logits.square().sum(), list(state.values()))
    wanted = torch.autograd.grad(theirs(ids).logits.square().sum(), [values[pairs[key]] for key in state])
    for grad, want in zip(ours_grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, atol=1e-4, rtol=1e-4)  # sums over 14 tokens of logits
    write_adapter_folder(
        tmp_path / "ours", stored_config(ours, spec, "default"), stored_tensors(ours, "default"), {"format": "pt"}
    )
    again = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "ours")
    torch.testing.assert_close(again(ids).logits, ours(ids).logits, atol=EXACT, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    config = theirs.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    other = mixtral()
    attach_tensors(other, spec_of(config), config, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    torch.testing.assert_close(other(ids).logits, ours(ids).logits, atol=EXACT, rtol=0)
    logits = ours(ids).logits
    unload(ours, merge=True)
    torch.testing.assert_close(ours(ids).logits, logits, atol=EXACT, rtol=0)


@pytest.mark.parametrize("options", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}], ids=["modules", "bias"])
def test_what_is_trained_whole_equals_pefts(options: dict[str, Any], tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.norm, self.lm_head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.lm_head(self.norm(self.up(x)))

    torch.manual_seed(0)
    ours = Small()
    base, other, x = copy.deepcopy(ours), copy.deepcopy(ours), torch.randn(4, 6)
    plain = ours(x)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"], **options))
    spec = AdapterSpec(
        "lora", r=2, target_modules=("up",), **{k: v if k == "bias" else tuple(v) for k, v in options.items()}
    )
    assert adapt(ours, spec).trained == sum(p.numel() for p in trained(theirs).values())
    spread(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    config = theirs.peft_config["default"].to_dict() | {"peft_type": "LORA"}
    attach_tensors(other, spec_of(config), config, load_file(tmp_path / "theirs" / "adapter_model.safetensors"))
    torch.testing.assert_close(other(x), theirs(x), atol=EXACT, rtol=0)
    with unmerged(other):
        assert torch.equal(other(x), plain)
    write_adapter_folder(
        tmp_path / "ours", stored_config(other, spec, "default"), stored_tensors(other, "default"), {"format": "pt"}
    )
    read = peft.PeftModel.from_pretrained(copy.deepcopy(unload(copy.deepcopy(other))), tmp_path / "ours")
    torch.testing.assert_close(read(x), theirs(x), atol=EXACT, rtol=0)
    assert all(key.startswith(PREFIX) for key in stored_tensors(other, "default"))


def test_attention_is_its_formula() -> None:
    """Both projections, as if their weights were W + s B A; also where torch takes its fast path."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 3, 16, batch_first=True, dropout=0.0)
    plain, x = copy.deepcopy(model), torch.randn(2, 5, 12)
    adaptation = adapt(model, AdapterSpec("lora", r=2, lora_alpha=6))
    targets = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1", "linear2"}
    assert {row[0] for row in adaptation.rows} == targets
    state = adapter_state(model)
    with torch.no_grad():
        for key, parameter in state.items():
            parameter.copy_(torch.randn(parameter.shape))
            if key.endswith("lora_B"):
                path = key.removesuffix(".lora_B")
                weight = dict(plain.named_parameters())[path if path.endswith("weight") else f"{path}.weight"]
                weight += 3.0 * parameter @ state[f"{path}.lora_A"]
    torch.testing.assert_close(model(x), plain(x), atol=EXACT, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), plain.eval()(x), atol=EXACT, rtol=0)


def test_grouped_convolution_merges() -> None:
    """One block for each group of channels; PEFT's cannot be merged."""
    torch.manual_seed(0)
    model, x = (
        One(nn.Conv2d(6, 12, 3, padding=2, dilation=2, groups=3, padding_mode="circular")),
        torch.randn(2, 6, 7, 7),
    )
    adapt(model, AdapterSpec("lora", r=6, target_modules=("layer",), use_dora=True))
    with torch.no_grad():
        for parameter in adapter_state(model).values():
            parameter += 0.3 * torch.randn(parameter.shape)
    y = model(x)
    unload(model, merge=True)
    torch.testing.assert_close(model(x), y, atol=EXACT, rtol=0)
