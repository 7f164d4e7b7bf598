"""One vector of a text: the mean of its tokens' last hidden states, brought to length 1.

As sentence-transformers computes it for its folders with mean pooling and normalization, such as all-MiniLM-L6-v2.
"""

# N texts, B texts of a batch, T tokens of the longest, H hidden width

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, islice

import torch
from torch import Tensor
from torch.nn import functional as F

from lorafold.data.batches import by_length, fill_up
from lorafold.models.load import LoadedModel
from lorafold.models.positions import positions


def embed(
    loaded: LoadedModel,
    texts: Sequence[Sequence[int]],
    max_tokens: int,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Vectors float32 [N, H] of length 1, differentiable; cosines are their products.

    Args:
        texts: token ids, special tokens included.
        max_tokens: most tokens at once, with padding; a longer text stands alone.
        progress: called with the number of texts done after each pass.
    """
    batches, parts = in_batches(texts, max_tokens), []
    for numbers in batches:
        parts.append(embed_at_once(loaded, [texts[i] for i in numbers]))
        if progress:
            progress(len(numbers))
    place = torch.tensor([*chain(*batches)]).argsort().to(loaded.device)
    return torch.cat(parts).index_select(0, place)


def in_batches(texts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Numbers of the texts of each batch, the longest first, of at most so many tokens with padding (or one text)."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    left = iter(order)
    return [[*islice(left, len(batch))] for batch in by_length([texts[i] for i in order], max_tokens)]


def embed_at_once(loaded: LoadedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Vectors float32 [B, H] of length 1, differentiable, in one pass."""
    ids, mask = fill_up(texts, loaded.tokenizer.pad_token_id, positions(loaded))
    ids, mask = ids.to(loaded.device), mask.to(loaded.device)
    hidden = loaded.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()  # [B, T, H]
    weight = mask[..., None].float()
    return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)
