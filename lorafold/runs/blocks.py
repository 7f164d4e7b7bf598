"""A model run block by block: the inputs of its linear layers are seen, and a block may change before the next runs.

Source of the idea: GPTQ's reference code, which catches the inputs of the first block and walks on from there.
"""

# X [T, I] are the inputs of a linear layer over all rows

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.targets import linear_layers
from lorafold.data.packs import Pack
from lorafold.errors import FormatError
from lorafold.models.load import LoadedModel, compute_dtype

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, but for the rows that go through it


class _Reached(Exception):
    """The last block has been reached; nothing after it is needed."""


@contextlib.contextmanager
def _fast_products() -> Iterator[None]:
    """Let products of float32 matrices round what they multiply to bfloat16, where the machine does that fast.

    Sums stay float32, so that X^T X keeps its small eigenvalues; weights that are quantized are never rounded.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if compute_dtype() == torch.bfloat16 else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class BlockWalk:
    """Rows on their way through a model.

    Attributes:
        blocks: (name, module) of the model's blocks, in order.

    Raises:
        FormatError: the model has no list of blocks.
    """

    def __init__(self, loaded: LoadedModel, packs: Sequence[Pack]):
        self.loaded = loaded
        self.blocks = find_blocks(loaded.model)
        self._hidden, self._others = self._first_inputs(packs)

    @torch.no_grad()
    @_fast_products()
    def hessians(self, index: int) -> dict[str, Tensor]:
        """X^T X [I, I] float32 of every linear layer of a block, by the layer's whole name."""
        prefix, block = self.blocks[index]
        sums: dict[str, Tensor] = {}
        handles = []
        latest: list[tuple[Tensor, str]] = []  # the input seen last, and the layer that saw it first

        def watch(name: str, width: int) -> Any:
            def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if latest and latest[0][0] is args[0]:  # query, key and value have one input, gate and up another
                    sums[name] = sums[latest[0][1]]
                    return
                latest[:] = [(args[0], name)]
                x = args[0].flatten(0, -2).float()
                sums.setdefault(name, torch.zeros(width, width)).addmm_(x.T, x)

            return add

        for name, layer in linear_layers(block).items():
            handles.append(layer.register_forward_pre_hook(watch(f"{prefix}.{name}", layer.in_features)))
        try:
            self._run(index)
        finally:
            for handle in handles:
                handle.remove()
        return sums

    @torch.no_grad()
    @_fast_products()
    def advance(self, index: int) -> None:
        """Take the rows through a block as it is now."""
        self._hidden = self._run(index)

    def _run(self, index: int) -> list[Tensor]:
        block = self.blocks[index][1]
        given = zip(self._hidden, self._others[index], strict=True)
        outputs = (block(x, *args, **kwargs) for x, (args, kwargs) in given)
        return [out[0] if isinstance(out, tuple) else out for out in outputs]

    @torch.no_grad()
    def _first_inputs(self, packs: Sequence[Pack]) -> tuple[list[Tensor], list[list[_Arguments]]]:
        """Inputs of the first block, and of every block the other arguments, for each pack.

        These do not depend on what the blocks before compute, so only the first block does, which shows how blocks
        return what they compute; all others return the same.
        """
        hidden: list[Tensor] = []
        others: list[list[_Arguments]] = [[] for _ in self.blocks]
        before = [vars(block).get("forward") for _, block in self.blocks]
        first = self.blocks[0][1].forward
        computed: list[Any] = []

        def stand_in(index: int) -> Any:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
                others[index].append((args, kwargs))
                if index == 0:
                    hidden.append(x)
                    computed[:] = [first(x, *args, **kwargs)]
                if index == len(self.blocks) - 1:
                    raise _Reached
                return computed[0]

            return forward

        for index, (_, block) in enumerate(self.blocks):
            block.forward = stand_in(index)
        try:
            for batch in packs:
                with contextlib.suppress(_Reached):
                    self.loaded.model.base_model(
                        input_ids=batch.ids[None],
                        position_ids=batch.positions[None],
                        segments=batch.segments,
                        parents=batch.parents,
                        use_cache=False,
                    )
        finally:
            for (_, block), own in zip(self.blocks, before, strict=True):
                vars(block).pop("forward", None)
                if own is not None:
                    block.forward = own
        return hidden, others


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of a language model's blocks: the one list of modules as long as the config says.

    Raises:
        FormatError: there is no such list.
    """
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [(f"{name}.{i}", block) for i, block in enumerate(module)]
    raise FormatError("this model has no list of blocks to be quantized one after the other")
