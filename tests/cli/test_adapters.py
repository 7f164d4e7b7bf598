"""Adapters combined, reduced, extracted and shown: as PEFT does it, and as the folded file says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers.models.auto import AutoModelForCausalLM

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import base_weight, fold
from lorafold.adapters.lora import LoRA
from lorafold.adapters.targets import linear_layers
from lorafold.models.adapter_files import load_adapter
from lorafold.models.load import load
from lorafold.quant.ggml import Codec
from tests.practice import command, edited_adapter, random_adapter, same_logits, tiny_folder
from tests.tiny import tiny_model

peft = pytest.importorskip("peft")

EXACT = 1e-5  # float32
WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]
Tiny = Callable[..., Path]
Refused = Callable[..., str]


def wrapped(folder: Path, *options: dict[str, Any]) -> Any:
    """PEFT's model with random adapters `a0`, `a1`, ..., each saved in a folder of its name."""
    configs = [peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | o) for o in options]
    model = peft.get_peft_model(tiny_model("llama", "F32"), configs[0], "a0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(f"a{i}", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def deltas(folder: Path, base: Path) -> dict[str, Tensor]:
    """Layer -> what a LoRA folder adds to its weight."""
    loaded = load(base)
    load_adapter(loaded, folder)
    found = {path: layer.adapters["default"] for path, layer in adapted_layers(loaded.model)}
    return {path: a.delta().detach() for path, a in found.items() if isinstance(a, LoRA)}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense"))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # PEFT, of adapters that are there already
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", []),
        ("cat", []),
        ("svd", []),
        ("svd", ["--r", 3]),
        ("ties", ["--density", 0.4]),
        ("ties", ["--density", 0.4, "--majority-sign-method", "frequency"]),
        ("dare_linear", ["--density", 0.6, "--seed", 7]),
        ("dare_ties", ["--density", 0.6, "--seed", 7]),
        ("magnitude_prune", ["--density", 0.3]),
    ],
)
def test_folders_combine_as_in_peft(
    kind: str, options: list[Any], dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three adapters with different scalings, one of them subtracted; the same layers, factor for factor."""
    one = {"target_modules": ["q_proj"]}  # so that PEFT meets the layers in the order of their names
    theirs = wrapped(tmp_path, one, one | {"lora_alpha": 3}, one | {"lora_alpha": 6, "use_rslora": True})
    given = dict(zip(options[::2], options[1::2], strict=True))
    freeze = peft.tuners.lora.model._freeze_adapter

    def seeded(*arguments: Any) -> None:  # PEFT has drawn the new adapter's first values by then
        freeze(*arguments)
        torch.manual_seed(given.get("--seed", 42))

    monkeypatch.setattr(peft.tuners.lora.model, "_freeze_adapter", seeded)
    theirs.add_weighted_adapter(
        ["a0", "a1", "a2"],
        [0.7, 0.5, -0.4],
        "c",
        kind,
        svd_rank=given.get("--r"),
        density=given.get("--density"),
        majority_sign_method=given.get("--majority-sign-method", "total"),
    )
    out = tmp_path / "out"
    folders = [tmp_path / f"a{i}" for i in range(3)]
    weights = ["--weights", 0.7, 0.5, -0.4]
    assert command("adapters", "combine", *folders, "-o", out, *weights, "--combination", kind, *options) == 0
    parameters = dict(theirs.named_parameters())
    ours = load_file(out / WEIGHTS)
    assert len(ours) == 6
    for layer in range(3):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_"
        a, b = (ours[f"{name}{part}.weight"] for part in "AB")
        other_a, other_b = (parameters[f"{name}{part}.c.weight"] for part in "AB")
        assert a.shape == other_a.shape
        torch.testing.assert_close(b @ a, other_b @ other_a, atol=EXACT, rtol=0)
        if kind != "svd":  # whose factors may have other signs, and share the singular values
            torch.testing.assert_close(a, other_a, atol=EXACT, rtol=0)
            torch.testing.assert_close(b, other_b, atol=EXACT, rtol=0)
    loaded = load(dense)
    load_adapter(loaded, out)
    theirs.set_adapter("c")
    theirs.peft_config["c"].use_rslora = False
    same_logits(loaded.model, theirs, 1e-4)  # through three layers
    again = peft.PeftModel.from_pretrained(tiny_model("llama", "F32"), out)
    same_logits(again, loaded.model, EXACT)


def test_ranks_that_differ_stand_in_patterns(dense: Path, tmp_path: Path) -> None:
    """Adapters with patterns of their own, on different layers: the sum of the updates, in PEFT too."""
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}}
    wrapped(tmp_path, patterns, {"target_modules": ["q_proj", "up_proj"], "r": 3, "use_rslora": True})
    out = tmp_path / "out"
    command("adapters", "combine", tmp_path / "a0", tmp_path / "a1", "-o", out, "--weights", 2, -1, "--union")
    first, second = (deltas(tmp_path / f"a{i}", dense) for i in range(2))
    result = deltas(out, dense)
    assert result.keys() == first.keys() | second.keys()
    for path, delta in result.items():
        wanted = 2 * first.get(path, torch.zeros(1)) - second.get(path, torch.zeros(1))
        torch.testing.assert_close(delta, wanted, atol=EXACT, rtol=0)
    loaded = load(dense)
    load_adapter(loaded, out)
    same_logits(peft.PeftModel.from_pretrained(tiny_model("llama", "F32"), out), loaded.model, EXACT)
    assert json.loads((out / "adapter_config.json").read_text())["rank_pattern"]


def moved(base: Path, adapter: Path | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> what an adapter asks of offsets and scales; zeros where it does not learn them."""
    loaded = load(base)
    load_adapter(loaded, adapter) if adapter else None
    found = {}
    for path, layer in adapted_layers(loaded.model):
        group: Any = layer.adapters["default"]
        offset, scale = group.offset_update(), group.scale_update()
        zero = torch.zeros_like(offset if scale is None else scale)
        found[path] = tuple(zero if update is None else update.detach() for update in (offset, scale))
    return found


GROUPED = {
    "low rank": [{"r": 4}, {"r": 4, "lora_alpha": 3.0}],
    "other ranks and scalings": [{"r": 2, "use_rslora": True}, {"r": 5}],
    "all offsets": [{"r": "full"}, {"r": "full"}],
    "all offsets and a rank": [{"r": "full"}, {"r": 3}],
    "scales": [{"r": 4, "adapt": "scale"}, {"r": 2, "adapt": "scale"}],
    "both": [{"r": 4, "adapt": "both"}, {"r": 3, "adapt": "both"}],
    "all of both": [{"r": "full", "adapt": "both"}, {"r": 3, "adapt": "both"}],
}


@pytest.mark.parametrize("types", ["Q4_1", "Q5_0"])
@pytest.mark.parametrize("case", GROUPED)
def test_qa_lora_combines_and_folds_exactly(
    case: str, types: str, tiny_file: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fold decodes to base plus the weighted sum of updates: exactly when offsets need no rounding."""
    base = tiny_file("llama", types)
    adapters = [random_adapter(tmp_path / str(i), base, i, 0.05, **options) for i, options in enumerate(GROUPED[case])]
    out = tmp_path / "out"
    assert command("adapters", "combine", *adapters, "-o", out, "--weights", 0.75, -0.5) == 0
    updates = [moved(base, adapter) for adapter in adapters]
    result = moved(base, out)
    loaded = load(base)
    load_adapter(loaded, out)
    layers = dict(adapted_layers(loaded.model))
    for layer_fold in fold(loaded.model, least_kept=None):  # the trained weights themselves, as for any adapter
        layer = layers[layer_fold.name]
        assert torch.equal(layer_fold.weight.decode(), base_weight(layer.base, layer.offset(), layer.scale()))
    monkeypatch.setattr(Codec, "move_offset", lambda _, stored, update: stored + update)
    monkeypatch.setattr(Codec, "move_scale", lambda _, stored, update: stored * (1 + update))
    for path, layer in layers.items():
        offset, scale = (0.75 * a - 0.5 * b for a, b in zip(*(u[path] for u in updates), strict=True))
        torch.testing.assert_close(result[path][0], offset, atol=1e-6, rtol=0)
        torch.testing.assert_close(result[path][1], scale, atol=1e-6, rtol=0)
        packed = layer.base.packed
        codec, blocks = packed.format, packed.blocks
        wanted = packed.decode(torch.float32, codec.offset(blocks) + offset, codec.scale(blocks) * (1 + scale))
        torch.testing.assert_close(base_weight(layer.base, layer.offset(), layer.scale()), wanted, atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "ties", "dare_ties", "magnitude_prune"])
@pytest.mark.parametrize("r", [4, "full"])
def test_every_combination_of_qa_lora_folds(kind: str, r: Any, tiny_file: Tiny, tmp_path: Path) -> None:
    base = tiny_file("llama", "Q4_1")
    adapters = [random_adapter(tmp_path / str(i), base, i, 0.3, r=r) for i in range(2)]
    options = [] if kind == "linear" else ["--density", 0.5]
    out = tmp_path / "out"
    command("adapters", "combine", *adapters, "-o", out, "--weights", 1, 1, "--combination", kind, *options)
    loaded = load(base)
    load_adapter(loaded, out)
    assert len(fold(loaded.model)) == 21
    if r == "full" and kind == "linear":
        tensors = [load_file(folder / WEIGHTS) for folder in (*adapters, out)]
        assert all(torch.equal(tensors[0][key] + tensors[1][key], tensors[2][key]) for key in tensors[0])


@pytest.mark.parametrize("r", [4, "full"])
def test_lora_meets_qa_lora(r: Any, tiny_file: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Expanded, which is said: the sum of what each adds to the weights."""
    base = tiny_file("llama", "Q4_1")
    lora = random_adapter(tmp_path / "lora", base, 0, method="lora", r=3)
    grouped = random_adapter(tmp_path / "group", base, 1, 0.05, r=r)
    other = {"base_model_name_or_path": "meta/other"}  # the packed base counts
    lora = edited_adapter(lora, tmp_path / "elsewhere", other)
    out = tmp_path / "out"
    assert command("adapters", "combine", lora, grouped, "-o", out, "--weights", 2, 0.5) == 0
    assert "expanded" in " ".join(capsys.readouterr().err.split())
    first, offsets, result = deltas(lora, base), moved(base, grouped), deltas(out, base)
    for path, delta in result.items():
        update = offsets[path][0].repeat_interleave(32, dim=1)
        # all offsets count as the file rounds them, to 2^-11 of numbers below 2
        torch.testing.assert_close(delta, 2 * first[path] + 0.5 * update, atol=1e-3 if r == "full" else EXACT, rtol=0)


@pytest.mark.parametrize("spec", [{"method": "lora", "r": 6}, {"r": 6}, {"r": "full"}, {"r": 2, "adapt": "both"}])
def test_reduced_adapters(
    spec: dict[str, Any], tiny_file: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the rank asked for; the energy left is what the commands say, and the share asked for at least."""
    base = tiny_file("llama", "Q4_1")
    adapter = random_adapter(tmp_path / "adapter", base, 0, **spec)
    out, sparing = tmp_path / "out", tmp_path / "sparing"
    assert command("adapters", "reduce", adapter, "-o", out, "--r", 1) == 0
    said = float(re.search(r"rank 1; (\S+)% of the energy", capsys.readouterr().out).group(1))  # type: ignore[union-attr]
    assert command("adapters", "reduce", adapter, "-o", sparing, "--energy", 0.7) == 0
    if spec.get("method") == "lora":
        before, after, spared = ({p: (d,) for p, d in deltas(f, base).items()} for f in (adapter, out, sparing))
    else:
        before, after, spared = (moved(base, folder) for folder in (adapter, out, sparing))
    kept = total = 0.0
    for path, parts in before.items():
        for part, reduced, enough in zip(parts, after[path], spared[path], strict=True):
            values = torch.linalg.svdvals(part.double()).square()
            lost = float((part - reduced).double().square().sum())
            assert lost == pytest.approx(float(values[1:].sum()), rel=1e-4, abs=1e-9)
            weight = 32 if spec.get("method") != "lora" else 1
            kept, total = kept + weight * float(values[0]), total + weight * float(values.sum())
            assert float((part - enough).double().square().sum()) <= 0.3 * float(values.sum()) + 1e-9
    assert said == pytest.approx(100 * kept / total, abs=0.01)


def test_svd_of_all_offsets_becomes_a_rank(tiny_file: Tiny, tmp_path: Path) -> None:
    """With every rank it is the sum itself."""
    base = tiny_file("llama", "Q4_1")
    adapters = [random_adapter(tmp_path / str(i), base, i, 0.05, r="full") for i in range(2)]
    out = tmp_path / "out"
    command("adapters", "combine", *adapters, "-o", out, "--weights", 1, 2, "--combination", "svd")
    first, second, result = (moved(base, folder) for folder in (*adapters, out))
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 2
    for path, (offset, _) in result.items():
        torch.testing.assert_close(offset, first[path][0] + 2 * second[path][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [["--r", 3], ["--energy", 0.999999]])
def test_a_known_difference_is_extracted(
    size: list[Any], dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model tuned by a LoRA of rank 3 in two kinds of layers, and in a norm, which is said."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    wanted = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "down_proj")):
            b, a = torch.randn(module.out_features, 3), torch.randn(3, module.in_features)
            wanted[name] = 0.05 * b @ a
            module.weight.data += wanted[name]
    model.model.norm.weight.data += 0.5
    tuned = tmp_path / "tuned"
    shutil.copytree(dense, tuned, ignore=shutil.ignore_patterns("gguf"))
    model.save_pretrained(tuned)
    out = tmp_path / "out"
    assert command("adapters", "extract", "--base", dense, "--tuned", tuned, "-o", out, *size) == 0
    said = capsys.readouterr().out
    assert "rank 3; 100.00% of the energy" in said
    assert "1 other tensors differ" in said
    assert "model.norm.weight" in said
    found = deltas(out, dense)
    assert found.keys() == wanted.keys()
    for name, delta in found.items():
        torch.testing.assert_close(delta, wanted[name], atol=EXACT, rtol=0)
    loaded = load(dense)
    load_adapter(loaded, out)
    loaded.model.model.norm.weight.data += 0.5
    same_logits(loaded.model, model, 1e-4)


def test_what_is_left_of_a_difference_is_said(
    dense: Path, tiny_file: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between any formats: what quantization took away, as an adapter for the packed file."""
    packed, out = tiny_file("llama", "Q4_1"), tmp_path / "out"
    assert command("adapters", "extract", "--base", packed, "--tuned", dense, "-o", out, "--r", 4) == 0
    said = re.search(r"(\S+)% of the energy is left \((\S+)% in (\S+)\)", capsys.readouterr().out)
    ours, theirs, found = linear_layers(load(packed).model), linear_layers(load(dense).model), deltas(out, packed)
    shares, kept, total = {}, 0.0, 0.0
    for name, delta in found.items():
        difference = base_weight(theirs[name]) - base_weight(ours[name])
        energy = float(difference.double().square().sum())
        left = energy - float((difference - delta).double().square().sum())
        shares[name], kept, total = left / energy, kept + left, total + energy
    assert said is not None
    assert float(said[1]) == pytest.approx(100 * kept / total, abs=0.01)
    assert 5 < float(said[1]) < 60  # rounding errors have no low rank
    assert float(said[2]) == pytest.approx(100 * min(shares.values()), abs=0.01)
    assert shares[said[3]] == min(shares.values())


def test_show_lists_every_layer_and_draws(
    tiny_file: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    base = tiny_file("llama", "Q4_1")
    adapter = random_adapter(tmp_path / "adapter", base, 0, method="lora", r=5)
    assert command("adapters", "show", adapter, "-o", tmp_path / "plot.svg") == 0
    table = capsys.readouterr().out
    columns = r" +│ (\S+)" * 5
    rows = {r[0]: r[1:] for r in re.findall(rf"(model\S+){columns}", table)}
    means = dict.fromkeys(("q_proj", "down_proj"), 0.0)
    for path, delta in deltas(adapter, base).items():
        values = torch.linalg.svdvals(delta.double())
        p = values[:5] / values[:5].sum()
        wanted = [5, values[0], values.norm(), (-(p * p.log()).sum()).exp(), values.square().sum() / values[0] ** 2]
        assert [float(n) for n in rows.pop(path)] == pytest.approx([float(n) for n in wanted], rel=1e-3)
        means = {kind: mean + float(wanted[3]) / 3 * path.endswith(kind) for kind, mean in means.items()}
    assert not rows
    for kind, mean in means.items():
        row = re.search(rf"mean of {kind}{columns}", table)
        assert row is not None
        assert float(row[4]) == pytest.approx(mean, rel=1e-3)
    assert "effective rank" in (tmp_path / "plot.svg").read_text(encoding="utf-8")
    assert command("adapters", "show", random_adapter(tmp_path / "full", base, 0, r="full", adapt="both")) == 0
    assert "scales of model.layers.0" in capsys.readouterr().out


def test_a_combination_of_runs_is_folded_and_verified(
    trained: Callable[..., tuple[Path, Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run folders stand for their adapters, and an adapter folder is folded like a run."""
    base, first = trained("llama", "Q4_1")
    out, tuned = tmp_path / "both", tmp_path / "tuned.gguf"
    second = random_adapter(tmp_path / "second", base, 1, 0.1, r=2)
    assert command("adapters", "combine", first, second, "-o", out, "--weights", 0.5, 0.25) == 0
    assert "QA-LoRA, 21 layers, rank 10" in capsys.readouterr().out
    assert command("fold", out, "-o", tuned) == 0
    assert "exact fold of 21 layers" in capsys.readouterr().out
    assert tuned.stat().st_size == base.stat().st_size
    assert command("verify", tuned, "--run", out) == 0
    captured = capsys.readouterr()
    assert "decoded file = training weights" in captured.out
    assert "no held-out rows" in captured.err
    assert command("verify", base, "--run", out) == 1
    updates = [moved(base, folder) for folder in (first / "adapter", second)]
    ours, theirs = (linear_layers(load(path).model) for path in (tuned, base))
    for path, (offset, _) in updates[0].items():
        wanted = 0.5 * offset + 0.25 * updates[1][path][0]
        change = base_weight(ours[path]) - base_weight(theirs[path])
        steps = wanted.abs().max() * 2**-10 + 2**-10  # of float16 offsets below 2, rounded before and after
        assert (change - wanted.repeat_interleave(32, dim=1)).abs().max() <= steps


def test_adapter_folders_are_exported(tiny_file: Tiny, tmp_path: Path, refused: Refused) -> None:
    base = tiny_file("llama", "Q4_1")
    grouped, lora = (
        random_adapter(tmp_path / "group", base, 0),
        random_adapter(tmp_path / "lora", base, 0, method="lora"),
    )
    assert command("export", grouped, "--to", "peft", "-o", tmp_path / "peft") == 0
    assert command("adapters", "combine", tmp_path / "peft", lora, "-o", tmp_path / "sum", "--weights", 1, 1) == 0
    assert command("export", tmp_path / "sum", "--to", "gguf-adapter", "-o", tmp_path / "sum.gguf") == 0
    assert "PEFT's format already" in refused("export", tmp_path / "sum", "--to", "peft", "-o", tmp_path / "x")
