"""Tiny encoders as transformers folders, and rows whose label follows from a word."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizer

WORDS = ("good", "fine", "bad", "poor", "the", "film", "is", "a", "plot", "and", "so", "very", "odd", "plain")


def tiny_bert(folder: Path, pooler: bool = True) -> Path:
    """A BERT of two layers with a vocabulary of `WORDS`, without a head."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        hidden_dropout_prob=0.0,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=pooler).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["embeddings.position_ids"] = torch.arange(40)[None]  # as older folders have it
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def labelled_rows(
    count: int, labels: tuple[object, ...] = ("positive", "negative"), seed: int = 0
) -> list[dict[str, object]]:
    """Rows of random words around one that decides the label: good, fine or bad, poor."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(2, 12, (), generator=generator))
        words = [WORDS[4 + int(torch.randint(10, (), generator=generator))] for _ in range(length)]
        words.insert(length // 2, WORDS[2 * (i % 2) + int(torch.randint(2, (), generator=generator))])
        rows.append({"title": f"{i}", "text": " ".join(words), "label": labels[i % 2]})
    return rows


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """The rows as JSONL or CSV, by the suffix."""
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
