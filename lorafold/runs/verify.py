"""Prove that a file is what was trained: every check recomputes from base, adapter and file alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafold.adapters.adapted import AdaptedLayer, adapted_layers, set_active
from lorafold.adapters.fold import LEAST_KEPT, fold
from lorafold.adapters.tied import taken_apart, updated_layers
from lorafold.data.tokens import Tokens
from lorafold.errors import AdapterError, ConfigError, FormatError
from lorafold.evals import llama_cpp, mlx_lm
from lorafold.evals.compare import ENOUGH_TOKENS, Agreement, agreement
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.evals.mlx_lm import MlxLm
from lorafold.models.exports import export_gguf_adapter, export_mlx_adapter
from lorafold.models.gguf_file import GGUFFile
from lorafold.models.gguf_write import file_order
from lorafold.models.load import HEAD_TENSOR, LoadedModel, binding_of, load, resolve
from lorafold.models.mlx_folder import HEAD_FILE, MLXFolder, config_apart, is_mlx
from lorafold.models.tensors import UNTIED
from lorafold.quant.linear import QuantEmbedding, QuantLinear
from lorafold.quant.weight import steps_apart
from lorafold.runs.display import Display
from lorafold.runs.fold import load_trained
from lorafold.runs.fold_plain import Numbers, gguf_numbers, mlx_numbers, whole_updates
from lorafold.runs.folder import Run

RUNTIME_TOKENS = 2000  # predictions compared in llama.cpp
PROMOTION_STEPS = 0.025  # of a step: in float16 a K-quant's scale errs by 2^-11 of 15.5 steps, its offset of 31
TABLE = "token_embd.weight"  # llama.cpp's name of the embedding; of the head where that has no tensor of its own
_FILE_TYPE = "general.file_type"


@dataclass(frozen=True)
class Check:
    """One line of a proof.

    Attributes:
        name: what was compared.
        passed: the outcome; None where the check does not apply.
        detail: the figures.
    """

    name: str
    passed: bool | None
    detail: str


def verify_file(path: Path, run: Run) -> list[Check]:
    """Checks that need no runtime, on a folded GGUF file.

    Raises:
        ConfigError: the run was not trained with QA-LoRA on a GGUF file, so there is no exact file to compare with.
        FormatError, AdapterError: the file, the base or the adapter cannot be read.
    """
    trained = load_trained(run)
    if (trained.gguf is None and trained.mlx is None) or run.config.adapter.method != "qa-lora":
        raise ConfigError("verify proves exact folds, which a qa-lora run on a GGUF or MLX base has; this run has none")
    if trained.gguf is None:
        return _verify_mlx(path, trained, run.config.adapter.adapt)
    base, file = trained.gguf, GGUFFile(path)
    folded = {binding_of(trained, f.name).tensor: f.weight.codec for f in fold(trained.model, least_kept=None)}
    whole = gguf_numbers(trained, whole_updates(trained), None)
    folded |= {tensor: kind for tensor, (kind, _) in whole.tensors.items()}
    head = [] if taken_apart(trained.model) is None else [_own_head(base, file, HEAD_TENSOR in folded)]
    return [
        *head,
        _same_layout(base, file, folded, bool(head)),
        _trained_weights(trained, path),
        *_whole(whole, {tensor: data for tensor, (_, data) in whole.tensors.items()}, file),
        _zero_adapter(trained),
        _untouched(base, file, set(folded)),
        _metadata(base, file),
    ]


def _verify_mlx(path: Path, trained: LoadedModel, adapt: str) -> list[Check]:
    base = trained.mlx
    assert base is not None
    if not is_mlx(path):
        raise FormatError(f"{path} is no MLX folder, as the base of this run is")
    file = MLXFolder(path)
    ours, theirs = (
        {name: (t.file.name, t.kind, t.shape) for name, t in folder.tensors.items()} for folder in (base, file)
    )
    own_head = {}
    if (apart := taken_apart(trained.model)) is not None:
        table = {name: own for name, own in ours.items() if name.rpartition(".")[0] == apart[0]}
        own_head = {name.replace(*apart, 1): (HEAD_FILE, *own[1:]) for name, own in table.items()}
    quantized = base.quantized | ({apart[1]: base.quantized[apart[0]]} if apart and apart[0] in base.quantized else {})
    layout = ours | own_head == theirs and quantized == file.quantized
    checks = [Check("same tensors, types and shapes", layout, f"{len(ours)} tensors, {len(base.quantized)} quantized")]
    if not layout:
        return checks
    moved = {"offset": ("biases",), "scale": ("scales",), "both": ("biases", "scales")}[adapt]
    folded = {f"{path}.{part}" for path, _ in updated_layers(trained.model) for part in moved} & ours.keys()
    whole = mlx_numbers(trained, whole_updates(trained))
    folded |= whole.tensors.keys() & ours.keys()
    same = [name for name in ours if name not in folded and _sha(base.raw(name)) == _sha(file.raw(name))]
    changed = len(ours) - len(folded) - len(same)
    others = {p.name for p in base.path.iterdir() if p.is_file() and p.suffix != ".safetensors"}
    differing = [name for name in sorted(others) if not _same_bytes(base.path / name, path / name)]
    if apart is not None:
        differing = [name for name in differing if name not in UNTIED]
        checks.append(_own_mlx_head(base, file, own_head, apart, whole.tensors))
    return [
        *checks,
        _trained_weights(trained, path),
        *_whole(whole, {name: value.view(torch.uint8).numpy() for name, value in whole.tensors.items()}, file),
        _zero_adapter(trained),
        Check("untouched tensors: same sha256", not changed, f"{len(same)} tensors, {changed} changed"),
        Check("config and tokenizer: same bytes", not differing, ", ".join(differing) or f"{len(others)} files"),
    ]


def _own_mlx_head(
    base: MLXFolder, file: MLXFolder, added: Collection[str], apart: tuple[str, str], whole: Collection[str]
) -> Check:
    """The head's tensors are those of the base's embedding but for what was trained, and config.json says so."""
    changed = [name for name in added if _sha(file.raw(name)) != _sha(base.raw(name.replace(apart[1], apart[0], 1)))]
    config = json.loads((file.path / "config.json").read_text(encoding="utf-8"))
    codes = [name for name in changed if name.endswith(".weight") and name not in whole]
    detail = ", ".join(changed) or f"the bytes of {apart[0]}"
    return Check("head with tensors of its own", config == config_apart(base.path, *apart) and not codes, detail)


def _same_bytes(a: Path, b: Path) -> bool:
    return b.is_file() and a.read_bytes() == b.read_bytes()


def _own_head(base: GGUFFile, file: GGUFFile, folded: bool) -> Check:
    """The head got a tensor of its own: the trained one, or, if the embedding alone was trained, the base's bytes."""
    there = HEAD_TENSOR in file.tensors and file.tensors[HEAD_TENSOR].shape == base.tensors[TABLE].shape
    same = there and (folded or _sha(file.raw(HEAD_TENSOR)) == _sha(base.raw(TABLE)))
    return Check("head with a tensor of its own", same, "trained" if folded else f"bytes of the base's {TABLE}")


def _same_layout(base: GGUFFile, file: GGUFFile, codecs: dict[str, str], own_head: bool) -> Check:
    expected = {name: (codecs.get(name, info.type), info.shape) for name, info in base.tensors.items()}
    if own_head:
        table = base.tensors[TABLE]
        expected[HEAD_TENSOR] = (codecs.get(HEAD_TENSOR, table.type), table.shape)
    actual = {name: (info.type, info.shape) for name, info in file.tensors.items()}
    promoted = sum(codecs.get(name, info.type) != info.type for name, info in base.tensors.items())
    sizes = f"{base.path.stat().st_size:,} bytes before, {file.path.stat().st_size:,} after"
    return Check("same tensors, types and shapes", expected == actual, f"{promoted} promoted; {sizes}")


def _whole(numbers: Numbers, trained: Mapping[str, np.ndarray], file: GGUFFile | MLXFolder) -> list[Check]:
    """Tensors that were trained whole, where there are any; training saw nothing of how the file rounds them."""
    if not trained:
        return []
    there = [name for name in trained if name in file.tensors]
    wrong = len(trained) - sum(_sha(trained[name]) == _sha(file.raw(name)) for name in there)
    held = "as trained" if numbers.exact else f"rounded, {min(numbers.kept):.2%} of the worst one's update is left"
    passed = not wrong and (numbers.exact or min(numbers.kept) >= LEAST_KEPT)
    return [Check("tensors trained whole: same sha256", passed, f"{len(trained)} tensors, {wrong} differ; {held}")]


@torch.no_grad()
def _trained_weights(trained: LoadedModel, file: Path) -> Check:
    """Largest difference between the file's decoded weights and those of the training forward pass."""
    stored = load(file)
    worst, count = 0.0, 0
    for path, layer in adapted_layers(trained.model):
        other = stored.model.get_submodule(path)
        assert isinstance(layer.base, QuantLinear | QuantEmbedding)
        if not isinstance(other, type(layer.base)) or other.shape != layer.base.shape:
            return Check("decoded file = training weights", False, f"{path} has another format in the file")
        for dtype in (torch.float32, torch.bfloat16):
            ours = layer.base.packed.decode(dtype, layer.offset(), layer.scale())
            theirs = other.packed.decode(dtype)
            worst = max(worst, float((ours.float() - theirs.float()).abs().nan_to_num(nan=torch.inf).max()))
        count += ours.numel()
    return Check("decoded file = training weights", worst == 0, f"largest difference {worst:g} over {count:,} weights")


@torch.no_grad()
def _zero_adapter(trained: LoadedModel) -> Check:
    """Folding an adapter of zeros must give the base back: the same bytes, or after promotion the same weights."""
    apart = [_zero_fold_apart(trained, path, layer) for path, layer in updated_layers(trained.model)]
    different = sum(a is None for a in apart)
    promoted = [a for a in apart if a]
    detail = f"{different} layers differ" if different else "every adapted tensor is byte-identical to the base"
    if promoted and not different:
        detail = f"{len(promoted)} tensors promoted within {max(promoted):.4f} of a step, the others identical"
    return Check("zero adapter = base", not different and all(a <= PROMOTION_STEPS for a in promoted), detail)


def _place_of_weight(trained: LoadedModel, path: str) -> str:
    """The layer whose tensors in the base have a layer's weight: the embedding for a head without any of its own."""
    apart = taken_apart(trained.model)
    return apart[0] if apart is not None and path == apart[1] else path


def _zero_fold_apart(trained: LoadedModel, path: str, layer: AdaptedLayer) -> float | None:
    """0 where a fold of zeros gives the base back, None where it does not; for promoted K-quants the steps apart."""
    assert isinstance(layer.base, QuantLinear | QuantEmbedding)
    packed = layer.base.packed
    codec = packed.format
    source = _place_of_weight(trained, path)
    blocks, nothing = packed.blocks, torch.zeros_like(codec.scale(packed.blocks))
    if codec.affine:
        blocks = codec.with_offset(blocks, codec.move_offset(codec.offset(blocks), nothing))
    if codec.scalable:
        blocks = codec.with_scale(blocks, codec.move_scale(codec.scale(blocks), nothing))
    unchanged = type(packed)(packed.codec, packed.shape, blocks)
    if trained.mlx is not None:
        return 0.0 if torch.equal(unchanged.blocks, trained.mlx.packed(source).blocks) else None
    assert trained.gguf is not None
    binding = trained.bindings[source]
    info = trained.gguf.tensors[binding.tensor]
    if info.type == packed.codec:
        same = np.array_equal(file_order(unchanged, binding).reshape(-1), trained.gguf.raw(binding.tensor))
        return 0.0 if same else None
    original = type(packed)(info.type, packed.shape, torch.from_numpy(trained.gguf.blocks(binding.tensor)))
    if binding.row_order is not None:
        original = original.rows(binding.row_order)
    if original.format.affine:
        return steps_apart(original.decode(), unchanged)
    return 0.0 if torch.equal(original.decode(), unchanged.decode()) else None


def _untouched(base: GGUFFile, file: GGUFFile, adapted: set[str]) -> Check:
    names = [name for name in base.tensors if name not in adapted]
    changed = [n for n in names if n not in file.tensors or _sha(base.raw(n)) != _sha(file.raw(n))]
    detail = f"{len(names)} tensors, {len(changed)} changed" + (f": {', '.join(changed[:3])}" if changed else "")
    return Check("untouched tensors: same sha256", not changed, detail)


def _metadata(base: GGUFFile, file: GGUFFile) -> Check:
    ours, theirs = (_sha(f.section(f.kv_start, f.kv_end)) for f in (base, file))
    if ours == theirs:
        return Check("key-value section: same sha256", True, ours[:16])
    changed = [key for key in base.metadata if base.metadata[key] != file.metadata.get(key)]
    changed += [key for key in file.metadata if key not in base.metadata]
    promoted = any(base.tensors[n].type != info.type for n, info in file.tensors.items() if n in base.tensors)
    only_type = promoted and changed == [_FILE_TYPE]
    return Check("key-value section: same sha256", only_type, "changed: " + ", ".join(changed))


def _sha(data: np.ndarray) -> str:
    return hashlib.sha256(data.data).hexdigest()


@dataclass(frozen=True)
class RuntimeProof:
    """Agreement of torch and the runtime of the format, before and after.

    Attributes:
        runtime: its name.
        null: the base model against the untouched base file: how well the runtime can agree at all.
        folded: the trained model against the folded file.
        adapter: the trained model against the base file with the exported adapter applied at run time.
    """

    runtime: str
    null: Agreement
    folded: Agreement
    adapter: Agreement | None

    def checks(self) -> list[Check]:
        """The proof as lines."""
        few = self.null.tokens < ENOUGH_TOKENS
        note = [f"under {ENOUGH_TOKENS:,} tokens only the KL is judged"] if few else []
        lines = [Check(f"{self.runtime}, null run", None, "; ".join([_figures(self.null), *note]))]
        for name, found in (("folded file", self.folded), ("adapter at run time", self.adapter)):
            if found is not None:
                broken = found.as_close_as(self.null)
                lines.append(Check(f"{self.runtime}, {name}", not broken, "; ".join([_figures(found), *broken])))
        return lines


def _figures(a: Agreement) -> str:
    return (
        f"{a.tokens:,} tokens, KL {a.mean_kl:.2e}, top-1 {a.top1:.2%}, "
        f"loss {a.loss_torch:.4f} torch / {a.loss_runtime:.4f} runtime"
    )


def verify_runtime(
    path: Path,
    run: Run,
    rows: Iterable[Tokens],
    display: Display,
    tokens: int = RUNTIME_TOKENS,
) -> RuntimeProof:
    """Compare in llama.cpp or MLX: base with base file, trained model with folded file and with the exported adapter.

    Args:
        path: the folded file.
        rows: held-out rows, of which the first `tokens` predictions are used.

    Raises:
        MissingExtraError: the runtime is not installed.
    """
    trained = load_trained(run)
    name, engine, export = _runtime_of(trained, max(len(row.ids) for row in rows))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "adapter"
        jobs: list[tuple[str, Path, Path | None, str | None]] = [("null run", trained.path, None, None)]
        jobs.append(("folded file", path, None, "default"))
        with contextlib.suppress(AdapterError):  # an update of scales, or of an embedding: no such adapter holds it
            export(trained, exported)
            jobs.append(("adapter", trained.path, exported, "default"))
        found: dict[str, Agreement] = {}
        for label, model, lora, active in jobs:
            set_active(trained.model, active)
            with display.bar(f"{name}: {label}", tokens) as done, engine(model, lora) as runtime:
                found[label] = agreement(trained, runtime, rows, tokens, done)
    return RuntimeProof(name, found["null run"], found["folded file"], found.get("adapter"))


def _runtime_of(trained: LoadedModel, n_ctx: int) -> tuple[str, Callable[..., Any], Callable[..., None]]:
    """Name of the runtime that executes the base's format, how to open a model in it, how to export an adapter."""
    if trained.mlx is not None:
        return "MLX", MlxLm, export_mlx_adapter
    return "llama.cpp", lambda model, lora: LlamaCpp(model, lora, n_ctx), export_gguf_adapter


def missing_runtime(run: Run) -> str | None:
    """What to install so that `verify_runtime` can run; None if it can."""
    if is_mlx(resolve(run.config.model)):
        return None if mlx_lm.available() else "MLX was left out: pip install 'lorafold[mlx]' brings it"
    return None if llama_cpp.available() else "llama.cpp was left out: pip install 'lorafold[llama-cpp]' brings it"


def check_table(checks: Sequence[Check]) -> str:
    """The checks as aligned lines of text."""
    marks = {True: "ok", False: "FAILED", None: "--"}
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{marks[check.passed]:<7} {check.name:<{width}}  {check.detail}" for check in checks)
