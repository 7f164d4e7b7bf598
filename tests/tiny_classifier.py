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


NAMES = {"PER": ("good", "fine"), "LOC": ("bad", "poor")}


def tagged_rows(count: int, seed: int = 0, numbers: bool = False) -> list[dict[str, object]]:
    """Rows of words of which some are names: a type follows from the word, B- or I- from the word before."""
    generator = torch.Generator().manual_seed(seed)
    names = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    types = {word: kind for kind, words in NAMES.items() for word in words}
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 10, (), generator=generator))
        words = [WORDS[int(torch.randint(len(WORDS), (), generator=generator))] for _ in range(length)]
        tags: list[str] = []
        for i, word in enumerate(words):
            kind = types.get(word)
            inside = i > 0 and types.get(words[i - 1]) == kind
            tags.append("O" if kind is None else f"{'I' if inside else 'B'}-{kind}")
        rows.append({"tokens": words, "ner_tags": [names.index(tag) for tag in tags] if numbers else tags})
    return rows


def pair_rows(count: int, seed: int = 0) -> list[dict[str, object]]:
    """Rows of two texts of random words that begin with the same two."""
    generator = torch.Generator().manual_seed(seed)

    def words(number: int) -> list[str]:
        return [WORDS[int(torch.randint(len(WORDS), (), generator=generator))] for _ in range(number)]

    rows = []
    for _ in range(count):
        common, *others = words(2), words(3), words(4), words(4)
        rows.append(
            {
                "anchor": " ".join(common + others[0]),
                "positive": " ".join(common + others[1]),
                "negative": " ".join(others[2]),
            }
        )
    return rows
