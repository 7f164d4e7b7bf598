"""Do the losses of training agree with those of a plain loop over transformers and PEFT?

    python -m benchmarks.loss_agreement --data gsm8k/train.jsonl.gz [--steps 50] [--rows-per-step 8] [--max-length 192]

LoRA (r = 8, all linear layers) on the embedded model, its weights decoded for PEFT, the same A and B at the start, the
same rows in the same order, AdamW at a constant rate. In float32 the two loops should agree but for rounding. In
bfloat16 each way of computing rounds differently, so PEFT runs twice: row by row, and with the rows of a step in one
padded batch; LoraFold should be no farther from either than these are from each other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.train_speed import read_rows
from lorafold.adapters.inject import adapter_state, inject
from lorafold.config import AdapterSpec, TrainingConfig
from lorafold.data.rows import Example
from lorafold.data.tokens import Tokens, tokenize
from lorafold.models.load import load, load_tokenizer_only, resolve
from lorafold.train.loop import epoch_batches, train_steps

RATE = 1e-3


def token_rows(data: Path, count: int, max_length: int) -> list[Tokens]:
    """GSM8K rows in Alpaca text."""
    rows = read_rows(data, count)
    examples = [Example(i, "prompt", prompt=r["prompt"], completion=r["completion"]) for i, r in enumerate(rows)]
    return tokenize(examples, load_tokenizer_only(resolve("smollm2")), template="raw", max_length=max_length).rows


def ours(rows: list[Tokens], config: TrainingConfig, dtype: torch.dtype) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of LoraFold, and A and B as they began."""
    loaded = load("smollm2", dtype)
    torch.manual_seed(0)
    inject(loaded.model, AdapterSpec("lora", r=8))
    start = {key: value.detach().clone() for key, value in adapter_state(loaded.model).items()}
    return [step.loss for step in train_steps(loaded, rows, config)], start


def theirs(
    rows: list[Tokens], config: TrainingConfig, dtype: torch.dtype, start: dict[str, torch.Tensor], padded: bool
) -> list[float]:
    """Losses of a plain loop over transformers and PEFT."""
    path = resolve("smollm2")
    base = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for key, value in start.items():
            parameters[f"base_model.model.{key}.default.weight"].copy_(value)
    optimizer = torch.optim.AdamW(parameters.values(), lr=RATE, weight_decay=0.0)
    losses, batches = [], epoch_batches(len(rows), config)
    for _ in range(config.max_steps or 0):
        batch = [rows[i] for i in next(batches)]
        supervised, total = sum(sum(row.supervised) for row in batch), 0.0
        for group in [batch] if padded else [[row] for row in batch]:
            loss = sum(batch_losses(model, group)) / supervised
            loss.backward()  # type: ignore[union-attr]
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def batch_losses(model: Any, rows: Sequence[Tokens]) -> Iterator[torch.Tensor]:
    """Sum of each row's cross-entropies, the rows padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row.ids + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, own in zip(rows, logits, strict=True):
        keep = torch.tensor(row.supervised)[1:]
        wanted = torch.tensor(row.ids)[1:][keep]
        yield F.cross_entropy(own[: len(row) - 1][keep].float(), wanted, reduction="sum")


def main() -> None:
    """Print the largest and mean differences."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = token_rows(args.data, args.steps * args.rows_per_step, args.max_length)
    config = TrainingConfig(
        args.rows_per_step, learning_rate=RATE, max_steps=args.steps, warmup_ratio=0.0, lr_scheduler_type="constant"
    )
    losses: dict[str, list[float]] = {}
    losses["lorafold float32"], start = ours(rows, config, torch.float32)
    losses["peft float32"] = theirs(rows, config, torch.float32, start, padded=False)
    losses["lorafold bfloat16"], _ = ours(rows, config, torch.bfloat16)
    losses["peft bfloat16, row by row"] = theirs(rows, config, torch.bfloat16, start, padded=False)
    losses["peft bfloat16, padded"] = theirs(rows, config, torch.bfloat16, start, padded=True)
    print(f"{args.steps} steps of {args.rows_per_step} rows, loss {losses['peft float32'][0]:.4f} at first and "
          f"{losses['peft float32'][-1]:.4f} at last\n")  # fmt: skip
    print("| between | and | largest difference of a step's loss | mean |\n|---|---|---:|---:|")
    for a, b in (
        ("lorafold float32", "peft float32"),
        ("lorafold bfloat16", "peft bfloat16, row by row"),
        ("lorafold bfloat16", "peft bfloat16, padded"),
        ("peft bfloat16, row by row", "peft bfloat16, padded"),
        ("lorafold bfloat16", "lorafold float32"),
        ("peft bfloat16, row by row", "peft float32"),
    ):
        apart = [abs(x - y) for x, y in zip(losses[a], losses[b], strict=True)]
        print(f"| {a} | {b} | {max(apart):.2e} | {sum(apart) / len(apart):.2e} |")
    if args.json:
        args.json.write_text(json.dumps(losses, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
