"""MLX folders from training to the proof in mlx-lm, and adapters in MLX's layout, both ways."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.fold import merged_weight
from lorafold.adapters.inject import inject
from lorafold.config import AdapterSpec
from lorafold.evals.mlx_lm import MlxLm
from lorafold.models.adapter_files import load_adapter
from lorafold.models.adapter_updates import read_updates
from lorafold.models.exports import export_mlx_adapter
from lorafold.models.load import load
from lorafold.models.mlx_folder import MLXFolder
from lorafold.runs.fold import load_trained
from lorafold.runs.folder import read_run
from tests.cli.conftest import quick
from tests.practice import command, lora_like, random_adapter, same_logits
from tests.tiny import tiny_ids
from tests.tiny_mlx import tiny_mlx

pytest.importorskip("mlx_lm")
mx: Any = pytest.importorskip("mlx.core")

FILE = "model.safetensors"

Made = Callable[[str], tuple[Path, Path, Path]]
Output = pytest.CaptureFixture[str]


def three_for_down(path: str, _: Any, *__: Any) -> bool | dict[str, int]:
    """4 bits in groups of 32, but down_proj with 3 bits and v_proj not at all."""
    if "v_proj" in path:
        return False
    return {"bits": 3, "group_size": 32} if "down_proj" in path else {"bits": 4, "group_size": 32}


KINDS: dict[str, dict[str, Any]] = {
    "llama 4 bit bf16": {},
    "qwen2 3 bit fp16": {"architecture": "qwen2", "bits": 3, "dtype": "float16"},
    "qwen3 mixed": {"architecture": "qwen3", "dtype": "float16", "predicate": three_for_down},
    "gemma3 8 bit": {"architecture": "gemma3", "bits": 8, "dtype": "float32"},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Made:
    """`made("qwen3 mixed")`: (base folder, run, folded folder); do not write to them."""
    done: dict[str, tuple[Path, Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path, Path]:
        if kind not in done:
            folder = tmp_path_factory.mktemp("mlx")
            base, run, out = tiny_mlx(folder, **KINDS[kind]), folder / "run", folder / "tuned"
            options = quick("--learning-rate", 0.03, "--r", 4)
            assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
            assert command("fold", run, "-o", out) == 0
            done[kind] = base, run, out
        return done[kind]

    return make


@kinds
def test_logits_equal_mlx(made: Made, kind: str) -> None:
    """MLX computes in the type of its parameters: 24, 11 or 8 bits."""
    base, _, _ = made(kind)
    ids = tiny_ids(40)
    with torch.no_grad():
        ours = load(base).model(ids).logits[0].numpy()
    with MlxLm(base) as runtime:
        ((_, theirs),) = runtime.logits(ids[0].tolist())
    bound = {"float32": 1e-5, "float16": 0.02, "bfloat16": 0.15}[KINDS[kind].get("dtype", "bfloat16")]
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < bound


@kinds
def test_only_biases_of_adapted_layers_change(made: Made, kind: str) -> None:
    base, run, out = made(kind)
    before, after = MLXFolder(base), MLXFolder(out)
    adapted = {path for path, _ in adapted_layers(load_trained(read_run(run)).model)}
    changed = {name for name in before.tensors if not np.array_equal(before.raw(name), after.raw(name))}
    assert changed == {f"{path}.biases" for path in adapted}
    assert len(adapted) == (18 if kind == "qwen3 mixed" else 42 if "gemma3" in kind else 21)
    assert {p.name: p.stat().st_size for p in base.iterdir()} == {p.name: p.stat().st_size for p in out.iterdir()}


@kinds
def test_folded_folder_computes_what_was_trained(made: Made, kind: str) -> None:
    base, run, out = made(kind)
    trained = load_trained(read_run(run)).model
    same_logits(load(out).model, trained, 0.0)
    with pytest.raises(AssertionError):
        same_logits(load(base).model, trained, 0.1)
    summary = read_run(run).summary
    assert summary["eval_loss_after"] < summary["eval_loss_before"] - 0.1


@kinds
def test_verify_proves_it(made: Made, kind: str, capsys: Output) -> None:
    _, run, out = made(kind)
    capsys.readouterr()
    assert command("verify", out, "--run", run) == 0
    text = capsys.readouterr().out
    assert "largest difference 0 over" in text
    assert "ok      MLX, folded file" in text
    assert "ok      MLX, adapter at run time" in text
    assert "ok      config and tokenizer: same bytes" in text


def test_verify_sees_what_was_changed(made: Made, tmp_path: Path, capsys: Output) -> None:
    _, run, out = made("llama 4 bit bf16")
    for name, mark in (("model.norm.weight", "untouched"), ("model.layers.1.mlp.up_proj.biases", "decoded file")):
        other = tmp_path / name
        shutil.copytree(out, other)
        stored = MLXFolder(other).tensors[name]
        with stored.file.open("r+b") as file:
            file.seek(stored.start)
            file.write(b"\x11\x3f")
        assert command("verify", other, "--run", run, "--no-runtime") == 1
        assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED") and mark in line]
    other = tmp_path / "config"
    shutil.copytree(out, other)
    (other / "generation_config.json").write_text("{}")
    assert command("verify", other, "--run", run, "--no-runtime") == 1


def test_lora_goes_out_in_mlx_layout_and_comes_back(made: Made, tmp_path: Path) -> None:
    """Ranks and scaling as mlx-lm applies them; read again they give the same logits."""
    base = made("qwen3 mixed")[0]
    loaded = load(base)
    inject(loaded.model, AdapterSpec("lora", r=3, lora_alpha=5, target_modules=("q_proj", "down_proj")))
    lora_like(loaded.model)
    export_mlx_adapter(loaded, tmp_path / "adapter")
    ids = tiny_ids(30)
    with torch.no_grad():
        ours = loaded.model(ids).logits[0].numpy()
        plain = load(base).model(ids).logits[0].numpy()
    with MlxLm(base, tmp_path / "adapter") as runtime:
        ((_, theirs),) = runtime.logits(ids[0].tolist())
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.03 < 10 * 0.03 < np.sqrt(np.mean((ours - plain) ** 2))
    again = load(base)
    load_adapter(again, tmp_path / "adapter")
    same_logits(again.model, loaded.model, 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_tune_type": "dora"}, "'dora' is not supported yet"),
        ({"lora_parameters": {"rank": 3}}, "scale"),
        ({"lora_parameters": {"rank": 2.5, "scale": 1.0}}, "rank is 2.5"),
    ],
)
def test_mlx_adapter_that_makes_no_sense(
    made: Made, data: Path, tmp_path: Path, capsys: Output, change: dict[str, Any], message: str
) -> None:
    base, run, _ = made("llama 4 bit bf16")
    adapter = tmp_path / "adapter"
    assert command("export", run, "--to", "mlx-adapter", "-o", adapter) == 0
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    capsys.readouterr()
    assert command("eval", base, "--adapter", adapter, "--data", data) == 2
    assert message in capsys.readouterr().err


def test_folders_that_do_not_fit(made: Made, data: Path, tmp_path: Path, capsys: Output) -> None:
    base = made("llama 4 bit bf16")[0]

    def refused(change: Callable[[Path], object]) -> str:
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)
        change(folder)
        capsys.readouterr()
        assert command("train", folder, "--data", data, "--output-dir", tmp_path / "run", *quick()) == 2
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    def config(**values: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | values))

        return change

    def tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            state = load_file(folder / "model.safetensors")
            edit(state)
            save_file(state, folder / "model.safetensors", {"format": "mlx"})

        return change

    assert "5 bits, groups of 16" in refused(config(quantization={"bits": 5, "group_size": 16}))
    assert "mode 'mxfp4'" in refused(config(quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"}))
    assert "do not fit 8 bits" in refused(config(quantization={"bits": 8, "group_size": 32}))
    assert "'phi3' is not read from MLX yet" in refused(config(model_type="phi3"))
    assert "the tensor model.norm.weight is missing" in refused(tensors(lambda s: s.pop("model.norm.weight")))
    assert "no biases" in refused(tensors(lambda s: s.pop("model.layers.0.mlp.up_proj.biases")))
    assert "x.weight has no place" in refused(tensors(lambda s: s.update({"x.weight": torch.zeros(3)})))
    cut = refused(lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]))
    assert "model.safetensors is damaged" in cut


@pytest.mark.parametrize("kind", ["llama 4 bit bf16", "qwen3 mixed"])
def test_lora_on_mlx_is_folded_with_loss_as_mlx_does(made: Made, kind: str, data: Path, tmp_path: Path) -> None:
    """The control: every layer as mx.quantize makes it of the merged weight; layers that are not quantized merged."""
    base, run, out = made(kind)[0], tmp_path / "run", tmp_path / "out"
    options = quick("--method", "lora", "--learning-rate", 0.03)
    assert command("train", base, "--data", data, "--output-dir", run, *options) == 0
    assert command("fold", run, "-o", out, "--lossy") == 0
    before, after, folder = load_file(base / FILE), load_file(out / FILE), MLXFolder(out)
    adapted = dict(adapted_layers(load_trained(read_run(run)).model))
    for name, layer in adapted.items():
        wanted = merged_weight(layer)
        if f"{name}.scales" in after:
            codec = folder.packed(name).format
            kind_of = {torch.bfloat16: mx.bfloat16, torch.float16: mx.float16}[codec.stored]
            codes, scales, biases = mx.quantize(mx.array(wanted.numpy()), codec.group_size, codec.bits)
            assert np.array_equal(np.array(codes), after[f"{name}.weight"].numpy())
            for part, value in (("scales", scales), ("biases", biases)):
                theirs = np.array(value.astype(kind_of).astype(mx.float32))
                assert np.array_equal(theirs, after[f"{name}.{part}"].float().numpy())
        else:
            assert torch.equal(after[f"{name}.weight"], wanted.to(after[f"{name}.weight"].dtype))
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert {key.rpartition(".")[0] for key in changed} <= adapted.keys()


def test_lora_on_mlx_is_not_folded_unasked(made: Made, data: Path, tmp_path: Path, capsys: Output) -> None:
    base = made("llama 4 bit bf16")[0]
    options = quick("--method", "lora")
    assert command("train", base, "--data", data, "--output-dir", tmp_path / "run", *options) == 0
    capsys.readouterr()
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out") == 2
    assert "mlx-adapter" in capsys.readouterr().err
    assert command("fold", tmp_path / "run", "-o", tmp_path / "out", "--to", "q4_1", "--lossy") == 2
    assert "leave --to out" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_in_mlx_layout_are_combined_reduced_and_shown(made: Made, tmp_path: Path, capsys: Output) -> None:
    """Made by mlx-lm's own layers, beside one of PEFT's layout; the result goes back and mlx-lm computes with it."""
    base = made("llama 4 bit bf16")[0]
    one, two, both, back = (tmp_path / name for name in ("one", "two", "both", "back"))
    of_mlx_lm(base, one)
    random_adapter(two, base, 1, 0.1, method="lora", r=3, target_modules=("q_proj", "v_proj"))
    assert command("adapters", "combine", one, two, "--weights", 1, 0.5, "--union", "-o", both) == 0
    assert command("adapters", "reduce", both, "--r", 7, "-o", tmp_path / "reduced") == 0  # 4 + 3: nothing is lost
    assert command("adapters", "show", one) == 0
    assert "mean of q_proj" in capsys.readouterr().out.replace("\n", "")
    stored = {folder: read_updates(folder).updates for folder in (one, two, both, tmp_path / "reduced")}
    for place, update in stored[both].items():
        parts = [weight * stored[f][place].dense() for f, weight in ((one, 1.0), (two, 0.5)) if place in stored[f]]  # type: ignore[union-attr]
        for found in (update, stored[tmp_path / "reduced"][place]):
            torch.testing.assert_close(found.dense(), sum(parts), atol=1e-5, rtol=0)  # type: ignore[union-attr]
    assert command("export", both, "--to", "mlx-adapter", "-o", back) == 0
    assert command("adapters", "combine", back, "--weights", 1, "-o", tmp_path / "again") == 0
    for place, update in read_updates(tmp_path / "again").updates.items():
        torch.testing.assert_close(update.dense(), stored[both][place].dense(), atol=1e-6, rtol=0)  # type: ignore[union-attr]
    ids = tiny_ids(30)
    loaded = load(base)
    load_adapter(loaded, both)
    with torch.no_grad(), MlxLm(base, back) as runtime:
        ((_, theirs),) = runtime.logits(ids[0].tolist())
        assert np.sqrt(np.mean((loaded.model(ids).logits[0].numpy() - theirs) ** 2)) < 0.15  # as for the bare model


def of_mlx_lm(base: Path, folder: Path) -> None:
    """An adapter as mlx_lm.lora writes it, with random numbers."""
    from mlx.utils import tree_flatten
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load_model

    options = {"rank": 4, "scale": 2.5, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.down_proj"]}
    model = load_model(base)[0]
    model.freeze()
    linear_to_lora_layers(model, 2, options)
    trained = dict(tree_flatten(model.trainable_parameters()))
    folder.mkdir()
    mx.save_safetensors(
        str(folder / "adapters.safetensors"), {k: 0.1 * mx.random.normal(v.shape) for k, v in trained.items()}
    )
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": options, "model": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
