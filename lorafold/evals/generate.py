"""Greedy continuation of a prompt, in torch."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from lorafold.errors import DataError
from lorafold.models.load import LoadedModel
from lorafold.models.positions import table_of_positions
from lorafold.quant.linear import decoded_once

# what llama.cpp takes for the end of a turn by its text (llama-vocab.cpp, special_eog_ids)
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
)


def end_tokens(loaded: LoadedModel) -> set[int]:
    """Token ids after which a model has finished: those of the tokenizer, the generation config and the GGUF file."""
    ids = {loaded.tokenizer.eos_token_id}
    for config in (loaded.model.config, loaded.model.generation_config):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos) if isinstance(eos, list) else {eos}
    if loaded.gguf is not None:
        ids |= {loaded.gguf.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eot", "eom")}
        special = loaded.tokenizer.get_added_vocab()
        ids |= {special.get(text) for text in _END_OF_TURN}
    return {i for i in ids if i is not None}


@torch.no_grad()
def generate(loaded: LoadedModel, ids: Sequence[int], max_new_tokens: int = 128, keep: bool = True) -> list[int]:
    """Token ids that follow `ids`, the likeliest each time, without the end token; fewer where positions end.

    Args:
        keep: keep decoded weights meanwhile, up to 1 GiB; without, each token decodes all of them.

    Raises:
        DataError: `ids` alone are more than the model's table of positions holds.
    """
    most = table_of_positions(loaded)
    if most is not None:
        if len(ids) > most:
            raise DataError(f"the prompt has {len(ids):,} tokens, and the model {most:,} positions; shorten it")
        max_new_tokens = min(max_new_tokens, most - len(ids) + 1)
    with decoded_once(loaded.model) if keep else contextlib.nullcontext():
        return _greedy(loaded, ids, max_new_tokens)


def _greedy(loaded: LoadedModel, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    model, ends = loaded.model, end_tokens(loaded)
    cache = DynamicCache(config=model.config)
    feed = torch.tensor([list(ids)], device=loaded.device)
    out: list[int] = []
    while len(out) < max_new_tokens:
        seen = len(ids) + len(out)
        positions = torch.arange(seen - feed.shape[1], seen, device=loaded.device)[None]
        logits = model(
            input_ids=feed, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        out.append(token)
        feed = torch.tensor([[token]], device=loaded.device)
    return out
