"""What `generate` and `eval` compare: files as they are, and the first of them with adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafold.errors import AdapterError, FormatError
from lorafold.evals.llama_cpp import LlamaCpp
from lorafold.models.adapter_files import load_adapter
from lorafold.models.exports import export_gguf_adapter
from lorafold.models.load import LoadedModel, compute_dtype, load, load_tokenizer_only, resolve
from lorafold.runs.folder import ADAPTER


@dataclass(frozen=True)
class Variant:
    """One column of a comparison.

    Attributes:
        label: what it is called in the output.
        model: path or name of the model.
        adapter: adapter folder, or None for the model alone.
    """

    label: str
    model: str
    adapter: Path | None = None


def variants(models: Sequence[str], adapters: Sequence[Path]) -> list[Variant]:
    """The models alone, then the first model with each adapter; a run folder stands for its adapter.

    Raises:
        AdapterError: an adapter path holds no adapter; all of them are named.
    """
    folders = [path if (path / "adapter_config.json").exists() else path / ADAPTER for path in adapters]
    missing = [str(path) for path, folder in zip(adapters, folders, strict=True) if not folder.is_dir()]
    if missing:
        raise AdapterError(f"neither an adapter folder nor a run folder: {', '.join(missing)}")
    plain = [Variant(Path(m).name, m) for m in models]
    return plain + [
        Variant(f"{Path(models[0]).name} + {path.name}", models[0], folder)
        for path, folder in zip(adapters, folders, strict=True)
    ]


def in_torch(variant: Variant, dtype: str = "auto") -> LoadedModel:
    """The variant, loaded in torch."""
    loaded = load(variant.model, compute_dtype(dtype))
    if variant.adapter is not None:
        load_adapter(loaded, variant.adapter)
    return loaded


def tokenizer_of(variant: Variant, runtime: str) -> Any:
    """The tokenizer of a variant.

    Raises:
        FormatError: llama.cpp is asked to run what is no GGUF file.
    """
    if runtime == "llama.cpp":
        _gguf_path(variant)
    return load_tokenizer_only(variant.model)


def _gguf_path(variant: Variant) -> Path:
    path = resolve(variant.model)
    if path.is_dir():
        raise FormatError(f"{path} is a transformers folder; llama.cpp runs GGUF files")
    return path


@contextmanager
def in_llama_cpp(variant: Variant, n_ctx: int) -> Iterator[LlamaCpp]:
    """The variant, loaded in llama.cpp; an adapter is exported to a temporary file and applied at run time.

    Raises:
        FormatError: the model is not a GGUF file.
    """
    path = _gguf_path(variant)
    with tempfile.TemporaryDirectory() as folder:
        exported = None
        if variant.adapter is not None:
            exported = Path(folder) / "adapter.gguf"
            export_gguf_adapter(in_torch(variant, "float32"), exported)
        with LlamaCpp(path, exported, n_ctx) as runtime:
            yield runtime
