"""A base that is shared out: every worker keeps a part of each transformer block's frozen bytes.

A block is gathered before it is computed, in the forward and again in the backward pass, and is let go when the next
one comes, so one block is whole at a time. Bytes are cut as they lie, packed or not. FSDP2 would cut packed bytes too
(as parameters), but it frees them by resizing their storage, and torch allows that no more once a kernel has seen the
tensor as a numpy array.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.train.distributed import Workers

_ALIGN = 64  # bytes at whose multiples tensors begin


@dataclass(eq=False)
class _Block:
    """The frozen tensors of one block.

    Attributes:
        tensors: as the modules hold them; empty while the block is not whole.
        places: for each of them where its bytes begin, and its type and shape.
        own: this worker's part of the bytes of all.
    """

    tensors: list[Tensor]
    places: list[tuple[int, torch.dtype, torch.Size]]
    own: Tensor

    def fill(self, whole: Tensor) -> None:
        for tensor, (start, dtype, shape) in zip(self.tensors, self.places, strict=True):
            tensor.data = whole[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def empty(self) -> None:
        for tensor in self.tensors:
            tensor.data = tensor.new_empty(0)


class ShardedBase:
    """The transformer blocks of a model, shared out among workers, which from then on must all make the same passes.

    Args:
        blocks: the transformer blocks, with adapters on them; what is trained stays whole on every worker.
        workers: who shares.
        device: where they compute.

    Attributes:
        held: bytes that this worker keeps.
    """

    def __init__(self, blocks: Iterable[nn.Module], workers: Workers, device: str):
        self._workers = workers
        self._whole: _Block | None = None
        self.held = 0
        for module in blocks:
            block = _cut(module, workers, device)
            self.held += block.own.numel()
            self._watch(module, block)

    def _watch(self, module: nn.Module, block: _Block) -> None:
        def before(*_: Any) -> None:
            self._gather(block)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(before)  # before anything of the block is differentiated

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _gather(self, block: _Block) -> None:
        if self._whole is block:
            return
        if self._whole is not None:
            self._whole.empty()
        block.fill(self._workers.gather(block.own))
        self._whole = block


def _cut(module: nn.Module, workers: Workers, device: str) -> _Block:
    tensors = [*(p for p in module.parameters() if not p.requires_grad), *module.buffers()]
    places, size = [], 0
    for tensor in tensors:
        places.append((size, tensor.dtype, tensor.shape))
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    part = -(-size // (workers.count * _ALIGN)) * _ALIGN
    whole = torch.zeros(part * workers.count, dtype=torch.uint8)
    for tensor, (start, *_) in zip(tensors, places, strict=True):
        whole[start : start + tensor.nbytes] = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    block = _Block(tensors, places, whole[part * workers.rank :][:part].clone().to(device))
    for tensor in tensors:
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
    return block
