"""How well classifiers do on the same rows: folders as they are, and a base with what runs have learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorafold.config import RowsConfig, TaskConfig
from lorafold.errors import AdapterError
from lorafold.evals.classes import Scores
from lorafold.models.adapter_files import load_adapter
from lorafold.models.classifier import adapter_labels, known_labels, load_classifier
from lorafold.models.load import compute_dtype
from lorafold.runs.folder import CONFIG, read_run
from lorafold.runs.labelled import Texts, all_texts, held_out_texts, tokenize_texts
from lorafold.train.classify import evaluate_classes


def texts_of(data: RowsConfig, task: TaskConfig) -> Texts:
    """All rows of the data (up to `limit`); of a run folder its held-out rows."""
    return held_out_texts(read_run(data.data)) if (data.data / CONFIG).is_file() else all_texts(data, task)


def score(
    model: str,
    adapter: Path | None,
    rows: Texts,
    max_length: int,
    dtype: str,
    progress: Callable[..., Any] | None = None,
) -> Scores:
    """Figures of a classifier, alone or with an adapter.

    Raises:
        AdapterError: neither the folder nor the adapter has a trained head.
        DataError: rows have labels that the model does not.
    """
    labels = adapter_labels(adapter) if adapter else known_labels(model)
    if labels is None:
        raise AdapterError(f"{adapter or model} has no trained head for classification; train one first")
    loaded = load_classifier(model, labels, compute_dtype(dtype))
    if adapter:
        load_adapter(loaded, adapter)
    return evaluate_classes(loaded, tokenize_texts(rows, labels, loaded.tokenizer, max_length), progress=progress)
