"""What the tests of adapters, training, runs and commands share: rows to learn, a transformers folder, one command."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorafold.adapters.adapted import adapted_layers
from lorafold.adapters.inject import inject
from lorafold.cli.main import run
from lorafold.config import AdapterSpec
from lorafold.data.tokens import Tokens
from lorafold.models.adapter_files import save_adapter
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.load import LoadedModel, load
from lorafold.models.tokenizer import load_tokenizer
from tests.tiny import tiny_gguf, tiny_ids, tiny_model

WORDS = ("the cat", "hello world", "a mat", "quest 123", "you and the world", "testing")


def token_rows(count: int, shortest: int = 5, longest: int = 24, seed: int = 0) -> list[Tokens]:
    """Rows of random tokens and lengths, of which a random part from the third on is supervised."""
    generator = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        length = int(generator.integers(shortest, longest + 1))
        supervised = (generator.random(length) < 0.6) & (np.arange(length) >= 2)
        supervised[-1] = True
        rows.append(Tokens(tiny_ids(length, seed=1000 * seed + i)[0].tolist(), supervised.tolist(), i))
    return rows


def related_rows(count: int, seed: int = 0, longest: int = 30) -> list[Tokens]:
    """Rows that begin with parts of each other, some of them equal, in random order; any token may be supervised."""
    generator = np.random.default_rng(seed)
    rows: list[list[int]] = []
    for i in range(count):
        start: list[int] = []
        if rows and generator.random() < 0.8:
            start = rows[int(generator.integers(len(rows)))]
            start = start[: int(generator.integers(1, len(start) + 1))]
        own = tiny_ids(int(generator.integers(1, 12)), seed=1000 * seed + i)[0].tolist()
        rows.append((start + own if generator.random() < 0.9 or not start else list(start))[:longest])
    order = generator.permutation(count)
    supervised = [[False, *(generator.random(len(rows[i]) - 1) < 0.6).tolist()] for i in order]
    return [Tokens(rows[i], flags, n) for n, (i, flags) in enumerate(zip(order, supervised, strict=True))]


def random_adapter(path: Path, base: Path, seed: int, scale: float = 0.3, **options: Any) -> Path:
    """A folder of an adapter of random numbers, for a base and the options of its AdapterSpec."""
    loaded, spec = load(base), AdapterSpec(**options)
    inject(loaded.model, spec)
    lora_like(loaded.model, seed, scale)
    save_adapter(path, loaded, spec)
    return path


def edited_adapter(
    adapter: Path, to: Path, config: dict[str, Any] | None = None, drop: str = "", **tensors: Tensor
) -> Path:
    """A copy of an adapter folder with other options, and without or with other tensors."""
    weights = "adapter_model.safetensors"
    stored = {k: v for k, v in load_file(adapter / weights).items() if not drop or drop not in k}
    options = json.loads((adapter / "adapter_config.json").read_text())
    to.mkdir()
    save_file(
        stored | tensors, to / "adapter_model.safetensors", {"format": "pt", "pooling_divisor": "sqrt(group_size)"}
    )
    (to / "adapter_config.json").write_text(json.dumps(options | (config or {})))
    return to


def write_data(path: Path, count: int = 20) -> Path:
    """A JSONL file of prompts with completions that follow from them."""
    rows = [{"prompt": f"{WORDS[i % 6]} {i % 4}", "completion": f"is {WORDS[(i + 1) % 6]}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tiny_folder(folder: Path, types: str = "F32", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A tiny Llama as a transformers folder, with its tokenizer; `types` as for `tiny_gguf`."""
    tiny_model("llama", types, **options).to(dtype).save_pretrained(folder)
    load_tokenizer(GGUFFile(tiny_gguf(folder / "gguf", "llama", types))).save_pretrained(folder)
    return folder


def tiny_folder_of(folder: Path, architecture: str) -> Path:
    """A tiny model of any architecture as a transformers folder in float32."""
    tiny_model(architecture, "F32").save_pretrained(folder)
    with tempfile.TemporaryDirectory() as temporary:
        load_tokenizer(GGUFFile(tiny_gguf(Path(temporary), architecture, "F32"))).save_pretrained(folder)
    return folder


def lora_like(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Fill every adapter parameter with random numbers (B begins as zero, which would hide mistakes)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            for parameter in layer.adapters.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)


def row_losses(model: PreTrainedModel, rows: Sequence[Tokens]) -> torch.Tensor:
    """Sum of the cross-entropies of the supervised tokens as transformers computes it, one row after the other."""
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor(row.ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        keep = torch.tensor(row.supervised)[1:]
        total = total + nn.functional.cross_entropy(logits[keep], ids[1:][keep], reduction="sum")
    return total


def same_logits(ours: nn.Module, theirs: nn.Module, atol: float, tokens: int = 40) -> None:
    """Both models give the same logits on the same random tokens."""
    ids = tiny_ids(tokens)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=atol, rtol=0)


def layer_count(loaded: LoadedModel) -> int:
    """Number of layers that carry adapters."""
    return len(list(adapted_layers(loaded.model)))


def command(*arguments: object) -> int:
    """One command in this process; its exit code."""
    return run([str(argument) for argument in arguments])


def tensors_of(path: Path) -> dict[str, gguf.ReaderTensor]:
    """Name -> tensor, as gguf-py reads the file."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
