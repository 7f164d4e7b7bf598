"""Train a small language model of another architecture, for measurements that need more than one.

    python benchmarks/small_model.py --text dolly/dolly_3k.jsonl.gz imdb/train.jsonl.gz ... -o FOLDER

A byte-level BPE of 8,192 tokens and a Qwen3 model of 256 x 8 layers (9 million parameters; rows of 256 and 1,024, so
that every K-quant fits) are trained on the strings of JSON lines, one epoch or `--minutes`, whichever ends first. The
folder is a transformers folder in float16. It is no good model: it is one whose weights were trained.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

VOCABULARY, LENGTH, BATCH, RATE = 8192, 256, 16, 2e-3
END = "<|endoftext|>"


def texts(files: list[Path]) -> list[str]:
    """All strings of all rows, a row joined by lines, in random order."""
    rows = []
    for file in files:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows += ["\n".join(v for v in json.loads(line).values() if isinstance(v, str)) for line in lines]
    random.Random(0).shuffle(rows)
    return rows


def train_tokenizer(rows: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's way of cutting text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(rows[:20_000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def batches(rows: list[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Ids [BATCH, LENGTH] of the texts one after the other."""
    left: list[int] = []
    (end,) = tokenizer.backend_tokenizer.encode(END).ids
    for start in itertools.count(0, 512):
        part = rows[start : start + 512]
        if not part:
            return
        left += [i for text in tokenizer.backend_tokenizer.encode_batch(part) for i in (*text.ids, end)]
        while len(left) >= BATCH * LENGTH:
            yield torch.tensor(left[: BATCH * LENGTH]).view(BATCH, LENGTH)
            left = left[BATCH * LENGTH :]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = texts(args.text)
    tokenizer = train_tokenizer(rows)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    began, losses = time.monotonic(), []
    for step, ids in enumerate(batches(rows, tokenizer)):
        share = (time.monotonic() - began) / 60 / args.minutes
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 100) * max(0.05, 1 - share)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            recent = losses[-50:]
            print(f"{step * BATCH * LENGTH:,} tokens, {share:.0%}: loss {sum(recent) / len(recent):.3f}", flush=True)
    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
