"""`lorafold quantize` from a 16-bit model to a folded file, and again after an interruption."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM

from lorafold.adapters.targets import linear_layers
from lorafold.data.packs import pack
from lorafold.data.tokens import Tokens
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.evals.mlx_lm import MlxLm
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import load
from lorafold.quant.calibrate import quantize, recovery
from lorafold.runs import blocks as runs_blocks
from lorafold.runs import quantize as runs_quantize
from lorafold.runs.blocks import BlockWalk, find_blocks
from tests.cli.conftest import quick
from tests.practice import command, tiny_folder_of, token_rows
from tests.tiny import tiny_gguf, tiny_ids

Output = pytest.CaptureFixture[str]


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows walk through the blocks in float32, as on a machine that is not faster in bfloat16."""
    monkeypatch.setattr("lorafold.runs.blocks.compute_dtype", lambda: torch.float32)


def _logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = load(path).model(tiny_ids(40)).logits[0]
    return logits


@pytest.mark.parametrize("architecture", ["llama", "llama3", "qwen2", "qwen3", "gemma3"])
def test_mlx_folders_run_in_mlx(architecture: str, tmp_path: Path, data: Path) -> None:
    """Groups of 32 with 3 bits by GPTQ, an 8-bit embedding: read back here and by mlx-lm with the same logits."""
    pytest.importorskip("mlx_lm")
    source, out = tiny_folder_of(tmp_path / "source", architecture), tmp_path / "mlx3"
    assert command("quantize", source, "-o", out, "--bits", 3, "--data", data) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (3, 32)
    assert config["quantization"]["model.embed_tokens"]["bits"] == 8
    ours = _logits(out).numpy()
    with MlxLm(out) as runtime:
        ((_, theirs),) = runtime.logits(tiny_ids(40)[0].tolist())
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.02  # MLX computes in float16
    assert not (tmp_path / "mlx3.partial").exists()


@pytest.mark.parametrize("options", [("--bits", 4), ("--format", "int8")])
def test_how_a_model_is_sampled_from_is_kept(options: tuple[object, ...], tmp_path: Path) -> None:
    """generation_config.json may end a text at more tokens than config.json, and say a temperature."""
    source, middle, out = tiny_folder_of(tmp_path / "source", "llama"), tmp_path / "half", tmp_path / "quantized"
    settings = {"eos_token_id": [2, 7], "temperature": 0.6}  # do_sample is missing: transformers would not save this
    (source / "generation_config.json").write_text(json.dumps(settings))
    assert command("quantize", source, "-o", middle, *options) == 0
    assert command("quantize", middle, "-o", out, *options) == 0
    written = json.loads((out / "generation_config.json").read_text())
    assert {key: written[key] for key in settings} == settings


def test_train_fold_and_verify_what_was_quantized(tmp_path: Path, data: Path) -> None:
    pytest.importorskip("mlx_lm")
    source, base = tiny_folder_of(tmp_path / "source", "llama"), tmp_path / "mlx2"
    assert command("quantize", source, "-o", base, "--bits", 2, "--embedding-bits", 16) == 0
    run, tuned = tmp_path / "run", tmp_path / "tuned"
    assert command("train", base, "--data", data, "-o", run, *quick("--learning-rate", 0.03)) == 0
    assert command("fold", run, "-o", tuned) == 0
    assert command("verify", tuned, "--run", run) == 0


@pytest.mark.parametrize("bits", [4, 5])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_gguf_files_run_in_llama_cpp(architecture: str, bits: int, tmp_path: Path, data: Path) -> None:
    source, out = tiny_gguf(tmp_path, architecture, "F16"), tmp_path / "out.gguf"
    assert command("quantize", source, "-o", out, "--bits", bits, "--data", data) == 0
    types = {name: info.type for name, info in GGUFFile(out).tensors.items() if len(info.shape) == 2}
    assert types.pop("token_embd.weight") == "Q8_0"
    assert set(types.values()) == {f"Q{bits}_1"}
    ids = tiny_ids(40)[0].tolist()
    with LlamaCpp(out, n_ctx=64) as engine:
        rows = [logits for _, logits in engine.logits(ids)]
    assert np.sqrt(np.mean((np.concatenate(rows) - _logits(out).numpy()) ** 2)) < 0.05  # 8-bit activations there


def _inputs_of(model: torch.nn.Module, name: str, rows: list[Tokens]) -> torch.Tensor:
    """What a layer is given in the whole model, row by row."""
    inputs: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor(row.ids)[None])
    hook.remove()
    return torch.cat(inputs)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.usefixtures("exact_products")
def test_calibrated_by_the_inputs_that_the_layers_see(
    share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inputs are those that come out of the quantized layers before, in the same block too, over several packs; what
    they lost is made up for in that share."""
    monkeypatch.setattr(runs_quantize, "_PACK_TOKENS", 40)
    folder = tiny_folder_of(tmp_path / "source", "llama")
    rows = token_rows(6)
    config = runs_quantize.QuantizeConfig(bits=2, embedding_bits=16, propagate=share)
    source, original = load(folder), load(folder).model
    with torch.no_grad():
        for parameter in (*source.model.parameters(), *original.parameters()):
            parameter.copy_(parameter.half())  # as embedding and norms are stored
    done = runs_quantize.quantize_model(source, rows, config, tmp_path / "out", lambda _: None)
    assert done.method == "gptq"
    result = load(tmp_path / "out").model
    for index, part in ((0, "self_attn.q_proj"), (0, "mlp.down_proj"), (1, "self_attn.o_proj"), (1, "mlp.up_proj")):
        name = f"model.layers.{index}.{part}"
        given, wanted = (_inputs_of(model, name, rows) for model in (result, original))
        weight = original.get_submodule(name).weight.detach()  # type: ignore[union-attr]
        hessian = given.T @ given
        if share:
            weight = weight + share * (weight @ recovery(hessian, (wanted - given).T @ given))  # type: ignore[operator]
        packed = result.get_submodule(name).packed  # type: ignore[union-attr]
        again = quantize(weight, packed.codec, "gptq", hessian)  # type: ignore[arg-type, union-attr]
        same = packed.format.codes(again.blocks) == packed.format.codes(packed.blocks)
        # sums in another order: a code may be the next one, and then others of its row; other inputs: 0.64 to 0.75
        assert same.float().mean() > 0.99


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
def test_layers_of_one_input_go_together(architecture: str, tmp_path: Path) -> None:
    walk = BlockWalk(load(tiny_folder_of(tmp_path / "m", architecture)), [pack([row]) for row in token_rows(2)])
    names = [{name.rpartition(".")[2] for name in group} for group in walk.groups(1)]
    assert names == [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}]


class _Routed(torch.nn.Module):
    """A gated block beside a layer that sees some tokens only, and another that runs twice."""

    def __init__(self, inner: torch.nn.Module, width: int):
        super().__init__()
        self.inner = inner
        self.some, self.twice = (torch.nn.Linear(width, width).requires_grad_(False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.twice(self.twice(x))
        chosen = x[0, :, 0] > 0
        return self.inner(x) + y + torch.zeros_like(x).index_put((torch.tensor([0]), chosen), self.some(x[0, chosen]))


def test_layers_of_some_tokens_and_layers_that_run_twice(tmp_path: Path) -> None:
    """What a layer of some tokens has lost is not known, as others may be chosen; each layer has one place."""
    loaded = load(tiny_folder_of(tmp_path / "m", "llama"))
    block = loaded.model.model.layers[0]  # type: ignore[union-attr, index]
    block.mlp = _Routed(block.mlp, loaded.model.config.hidden_size)
    walk = BlockWalk(loaded, [pack([row]) for row in token_rows(3)], twice=True)
    names = [name for group in walk.groups(0) for name in group]
    assert len(names) == len(set(names)) == 9
    some, whole = walk.inputs(0, "mlp.some"), walk.inputs(0, "mlp.twice")
    assert some is not None
    assert some.lost is None
    assert whole is not None
    assert whole.lost is not None
    assert 0 < some.hessian.trace() < whole.hessian.trace()


def test_layers_that_were_replaced_are_not_kept(tmp_path: Path) -> None:
    """Nor rows: of the dense layers none is left when the blocks are done."""
    loaded = load(tiny_folder_of(tmp_path / "m", "llama"))
    dense = [weakref.ref(layer) for _, block in find_blocks(loaded.model) for layer in linear_layers(block).values()]
    left: list[int] = []
    config = runs_quantize.QuantizeConfig(bits=2)
    per_block = len(dense) // len(find_blocks(loaded.model))

    def count(_: int) -> None:
        gc.collect()
        left.append(sum(ref() is not None for ref in dense))

    runs_quantize.quantize_model(loaded, token_rows(2), config, tmp_path / "out", count)
    assert left == [len(dense) - per_block * i for i in range(len(left))]  # the block that was left last is still held
    count(0)
    assert left[-1] == 0


def test_inputs_that_are_not_finite_are_refused_by_name(tmp_path: Path, data: Path, capsys: Output) -> None:
    source = tiny_folder_of(tmp_path / "m", "llama")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][0] = float("inf")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert command("quantize", source, "--data", data, "-o", tmp_path / "out") == 2
    message = capsys.readouterr().err
    assert "model.layers.1.self_attn.q_proj cannot be quantized: the inputs of a layer are not finite" in message


def test_a_layer_that_no_row_reaches(tmp_path: Path) -> None:
    """Stands in a group of its own and has no inputs to be known; it is quantized as without rows."""
    source = tiny_folder_of(tmp_path / "m", "llama")
    loaded = load(source)
    idle = torch.nn.Linear(32, 32).requires_grad_(False)
    loaded.model.model.layers[1].mlp.idle = idle  # type: ignore[union-attr, index]
    walk = BlockWalk(loaded, [pack([row]) for row in token_rows(2)], twice=True)
    assert walk.groups(1)[-1] == ["mlp.idle"]
    assert walk.inputs(1, "mlp.idle") is None
    config = runs_quantize.QuantizeConfig(bits=2)
    runs_quantize.quantize_model(loaded, token_rows(2), config, tmp_path / "out", lambda _: None)
    packed = loaded.model.model.layers[1].mlp.idle.packed  # type: ignore[union-attr, index]
    assert torch.equal(packed.decode(), quantize(idle.weight.detach(), packed.codec, "search").decode())


def test_few_tokens_to_calibrate_on_are_said(tmp_path: Path, data: Path, capsys: Output) -> None:
    """From two tokens for each input of the widest layer on nothing is; nor of what does not look at inputs so."""
    source = tiny_folder_of(tmp_path / "m", "llama")
    assert command("quantize", source, "-o", tmp_path / "out", "--bits", 2, "--data", data, "--limit", 1) == 0
    assert "tokens are few for layers with up to 96 inputs" in capsys.readouterr().err
    model, config = load(source).model, runs_quantize.QuantizeConfig()
    enough = [Tokens([1] * 192, [False] * 192, 0)]
    assert runs_blocks.few_tokens(model, enough, config) == ""
    one_less = [Tokens([1] * 100, [False] * 100, 0), Tokens([1] * 91, [False] * 91, 1)]
    assert runs_blocks.few_tokens(model, one_less, config).startswith("warning: 191 tokens")
    assert runs_blocks.few_tokens(model, one_less, runs_quantize.QuantizeConfig(method="search")) == ""
    assert runs_blocks.few_tokens(model, None, config) == ""


def test_it_goes_on_where_it_stopped(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    source = tiny_folder_of(tmp_path / "source", "llama")
    arguments = ("quantize", source, "--bits", 3, "--data", data)
    monkeypatch.setattr(runs_quantize, "_PACK_TOKENS", 40)
    assert command(*arguments, "-o", tmp_path / "whole") == 0
    real, calls = quantize, []

    def stop_in_the_second_block(*args: object) -> object:
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(runs_quantize, "quantize", stop_in_the_second_block)
    assert command(*arguments, "-o", tmp_path / "out") == 130
    assert not (tmp_path / "out").exists()
    assert command("quantize", source, "--bits", 4, "--data", data, "-o", tmp_path / "out") == 2
    assert "blocks of another quantization" in capsys.readouterr().err
    calls.clear()
    calls += [()] * 10
    assert command(*arguments, "-o", tmp_path / "out") == 0
    assert len(calls) == 10 + 7 + 7 + 1  # two of three blocks and the embedding
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_a_damaged_block_is_made_again(tmp_path: Path) -> None:
    work = runs_quantize.Partial(tmp_path / "out", load(tiny_folder_of(tmp_path / "m", "llama")), None, {})
    (tmp_path / "out.partial" / "block-0000.safetensors").write_bytes(b"no")
    assert work.read(0, {}, "Q4_1", False) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--group-size", 128), "groups of 32 fit"),
        (("--method", "gptq"), "--data"),
        (("--bits", 7), "7"),
        (("--propagate", 1.5), "propagate is 1.5"),
        (("--format", "nf4", "--propagate", 0.2), "propagate means nothing to nf4"),
        (("--method", "search", "--propagate", 0.2), "propagate is for gptq"),
        (("--propagate", 0.2), "give rows with --data"),
        (("--data", "rows.jsonl", "--limit", 0), "limit is 0"),
    ],
)
def test_refusals(options: tuple[object, ...], message: str, tmp_path: Path, capsys: Output) -> None:
    source = tiny_folder_of(tmp_path / "source", "llama")
    assert command("quantize", source, "-o", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_what_the_new_folder_would_not_hold_is_refused(tmp_path: Path, capsys: Output) -> None:
    """Rope factors of a GGUF file; a model over itself; weights that are no numbers, by their layer's name."""
    factors = tiny_gguf(tmp_path, "llama3", "F16")
    assert command("quantize", factors, "-o", tmp_path / "out") == 2
    assert "rope factors" in capsys.readouterr().err
    source = tiny_folder_of(tmp_path / "source", "llama")
    before = (source / "model.safetensors").read_bytes()
    assert command("quantize", source, "-o", source, "--overwrite") == 2
    assert "the model itself" in capsys.readouterr().err
    assert (source / "model.safetensors").read_bytes() == before
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    assert command("quantize", source, "-o", tmp_path / "out") == 2
    assert "model.layers.1.mlp.up_proj cannot be quantized: a weight is not finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_architectures_that_mlx_folders_are_not_read_of(tmp_path: Path, capsys: Output) -> None:
    folder = tiny_folder_of(tmp_path / "source", "llama")
    config = MistralConfig(**LlamaConfig.from_pretrained(folder).to_dict() | {"model_type": "mistral"})
    MistralForCausalLM(config).save_pretrained(folder)
    assert command("quantize", folder, "-o", tmp_path / "out") == 2
    assert "mistral is not read from MLX folders yet" in capsys.readouterr().err


def test_an_empty_work_folder_is_no_obstacle(tmp_path: Path) -> None:
    """As an interruption at the very beginning leaves it."""
    (tmp_path / "out.partial").mkdir()
    assert command("quantize", tiny_folder_of(tmp_path / "source", "llama"), "-o", tmp_path / "out") == 0


def test_gguf_refusals(tmp_path: Path, capsys: Output) -> None:
    """All that a GGUF file cannot hold is named at once; its metadata must come from a GGUF file."""
    source = tiny_gguf(tmp_path, "llama", "F16")
    options = ("--bits", 3, "--group-size", 64, "--embedding-bits", 2, "--stored", "bfloat16")
    assert command("quantize", source, "-o", tmp_path / "out.gguf", *options) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in ("bits is 3", "group_size is 64", "embedding_bits is 2", "stored is"))
    folder = tiny_folder_of(tmp_path / "source", "llama")
    assert command("quantize", folder, "-o", tmp_path / "out.gguf") == 2
    assert "16-bit GGUF" in capsys.readouterr().err


@pytest.mark.usefixtures("exact_products")
def test_blocks_are_walked_as_the_model_runs(tmp_path: Path) -> None:
    """The rows that leave the last block are the hidden states of the whole model before its last norm."""
    loaded = load(tiny_folder_of(tmp_path / "m", "gemma3"))
    rows = token_rows(3)
    blocks = [block for _, block in find_blocks(loaded.model)]
    blocks[0].forward = own = blocks[0].forward
    walk = BlockWalk(loaded, [pack([row]) for row in rows])
    assert [vars(block).get("forward") for block in blocks] == [own, *[None] * (len(blocks) - 1)]
    for index in range(len(find_blocks(loaded.model))):
        walk.advance(index)
    with torch.no_grad():
        for row, hidden in zip(rows, walk._hidden, strict=True):
            whole = loaded.model(torch.tensor(row.ids)[None], output_hidden_states=True)
            normed = loaded.model.base_model.norm(hidden)  # type: ignore[operator]
            torch.testing.assert_close(normed, whole.hidden_states[-1])


def test_fast_products_are_near_and_end_with_the_walk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with bfloat16 products: X^T X within what 8 bits lose, and afterwards as exact as before."""
    loaded, packs = load(tiny_folder_of(tmp_path / "m", "llama")), [pack([row]) for row in token_rows(3)]
    found = []
    for kind in (torch.float32, torch.bfloat16):
        monkeypatch.setattr("lorafold.runs.blocks.compute_dtype", lambda kind=kind: kind)
        walk = BlockWalk(loaded, packs)
        used: list[str] = []
        walk.blocks[0][1].register_forward_pre_hook(
            lambda *_, used=used: used.append(torch.get_float32_matmul_precision())
        )
        walk.advance(0)
        assert set(used) == {"highest" if kind == torch.float32 else "medium"}
        found.append(walk.hessians(1))
        assert torch.get_float32_matmul_precision() == "highest"
    for name, exact in found[0].items():
        assert (found[1][name] - exact).norm() < 0.03 * exact.norm()
        assert torch.linalg.eigvalsh(found[1][name]).min() > -1e-5 * exact.diagonal().sum()
