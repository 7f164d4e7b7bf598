"""A model run block by block: the inputs of its linear layers are seen, and a block may change before the next runs.

Source of the idea: GPTQ's reference code, which catches the inputs of the first block and walks on from there.
"""

# X [T, I] are the inputs of a linear layer over all rows; Y [T, I] those that it would have, had nothing changed

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorafold.adapters.targets import input_width, linear_layers, matrix_layers
from lorafold.config import QuantizeConfig
from lorafold.data.packs import Pack
from lorafold.data.tokens import Tokens
from lorafold.errors import FormatError
from lorafold.models.load import LoadedModel, compute_dtype

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # of a block, but for the rows that go through it
_TOKENS_PER_INPUT = 2  # below, codes were seen to fit the rows and not the layer, see docs/log.md
_REMEMBERED_BYTES = 1 << 29  # of outputs of a block's layers, beside which the rows themselves are kept


class _Reached(Exception):
    """What was to be seen has been reached; nothing after it is needed."""


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


@dataclass(frozen=True)
class Inputs:
    """What is known of the inputs of layers that share them.

    Attributes:
        hessian: X^T X [I, I] float32.
        lost: (Y - X)^T X [I, I] float32; None where Y is not known, or is of other tokens than X, as experts see them.
    """

    hessian: Tensor
    lost: Tensor | None


class BlockWalk:
    """Rows on their way through a model.

    Attributes:
        blocks: (name, module) of the model's blocks, in order.

    Args:
        twice: take the rows through the blocks as they were as well, beside those that have changed.

    Raises:
        FormatError: the model has no list of blocks.
    """

    def __init__(self, loaded: LoadedModel, packs: Sequence[Pack], twice: bool = False):
        self.loaded = loaded
        self.blocks = find_blocks(loaded.model)
        self._hidden, self._others = self._first_inputs(packs)
        self._unchanged = list(self._hidden) if twice else None
        self._start(0)

    def _start(self, index: int) -> None:
        """Note the linear layers of the block that comes next, and forget what those before it have computed."""
        self._originals = linear_layers(self.blocks[index][1]) if index < len(self.blocks) else {}
        self._outputs: dict[tuple[int, bool], list[Tensor]] = {}  # of a pack, as it was or as it is, in order
        self._room = _REMEMBERED_BYTES

    @torch.no_grad()
    def groups(self, index: int) -> list[list[str]]:
        """Names in the block of its linear layers in the order in which they run, those of one input together.

        What the first pack does not reach stands alone, at the end; what runs again stands where it ran first.
        """
        layers = linear_layers(self.blocks[index][1])
        seen: list[tuple[Tensor, list[str]]] = []

        def watch(name: str) -> Any:
            def look(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                if any(name in names for _, names in seen):
                    return
                group = next((names for x, names in seen if x is args[0]), None)
                if group is None:
                    seen.append((args[0], [name]))
                else:
                    group.append(name)

            return look

        with _hooked({layer: watch(name) for name, layer in layers.items()}):
            self._through(index, self._hidden[0], 0)
        reached = [names for _, names in seen]
        return reached + [[name] for name in layers if not any(name in names for names in reached)]

    @torch.no_grad()
    @_fast_products()
    def inputs(self, index: int, name: str) -> Inputs | None:
        """What a layer of the block that has come next is given, as far as that has changed; None if it never runs.

        Of a layer that runs more than once the first time counts.
        """
        hessian = lost = None
        known = self._unchanged is not None
        for at, x in enumerate(self._hidden):
            given = self._given(index, name, x, at)
            if given is None:
                continue
            if hessian is None:
                hessian = torch.zeros(given.shape[1], given.shape[1])
                lost = torch.zeros_like(hessian) if known else None
            hessian.addmm_(given.T, given)
            if known and lost is not None and self._unchanged is not None:
                with self._as_it_was(index):
                    wanted = self._given(index, name, self._unchanged[at], at, as_it_was=True)
                known = wanted is not None and len(wanted) == len(given) == x.shape[:-1].numel()
                if wanted is not None and known:
                    lost.addmm_((wanted - given).T, given)
        return None if hessian is None else Inputs(hessian, lost if known else None)

    @torch.no_grad()
    @_fast_products()
    def hessians(self, index: int) -> dict[str, Tensor]:
        """X^T X [I, I] float32 of every linear layer of a block, by the layer's whole name."""
        prefix, block = self.blocks[index]
        sums: dict[str, Tensor] = {}
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

        layers = matrix_layers(block).items()
        with _hooked({layer: watch(f"{prefix}.{name}", input_width(layer)) for name, layer in layers}):
            self._run(index)
        return sums

    @torch.no_grad()
    @_fast_products()
    def advance(self, index: int) -> None:
        """Take the rows through a block as it is now, and where both are wanted through the block as it was."""
        self._room = 0  # nothing is computed again
        self._hidden = self._run(index)
        if self._unchanged is not None:
            with self._as_it_was(index):
                self._unchanged = [self._through(index, x, at, True) for at, x in enumerate(self._unchanged)]
        self._start(index + 1)

    def _run(self, index: int) -> list[Tensor]:
        return [self._through(index, x, at) for at, x in enumerate(self._hidden)]

    def _through(self, index: int, x: Tensor, at: int, as_it_was: bool = False) -> Tensor:
        """A pack taken through a block."""
        args, kwargs = self._others[index][at]
        with self._remembering(self.blocks[index][1], self._outputs.setdefault((at, as_it_was), []), as_it_was):
            out = self.blocks[index][1](x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    @contextlib.contextmanager
    def _remembering(self, block: nn.Module, outputs: list[Tensor], as_it_was: bool) -> Iterator[None]:
        """Inside, linear layers do not compute again what they have computed for the same pack.

        What a block has changed is not changed again, so as long as all layers that have run are such, or all are as
        they were, the next one computes what it did the last time, whatever the block does between them.

        Args:
            outputs: of the layers that run, in their order; those that are new are added while there is room.
        """
        layers = {layer: name for name, layer in linear_layers(block).items()}
        changed = any(layer is not self._originals.get(name) for layer, name in layers.items())
        others = any("forward" in vars(layer) for layer in layers)  # somebody else's, who may change it
        if others or not (outputs or as_it_was or changed):
            yield
            return
        count, same = 0, True

        def remembered(name: str, layer: nn.Module) -> Any:
            compute, settled = layer.forward, as_it_was or layer is not self._originals.get(name)

            def forward(*args: Any, **kwargs: Any) -> Tensor:
                nonlocal count, same
                count += 1
                if count <= len(outputs):
                    return outputs[count - 1].clone()  # a block may write into what its layers return
                out: Tensor = compute(*args, **kwargs)
                same = same and settled and self._room >= out.nbytes and len(outputs) == count - 1
                if same:
                    outputs.append(out.clone())
                    self._room -= out.nbytes
                return out

            return forward

        for layer, name in layers.items():
            layer.forward = remembered(name, layer)
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _given(self, index: int, name: str, x: Tensor, at: int, as_it_was: bool = False) -> Tensor | None:
        """Inputs [T, I] float32 of a layer; what follows it in the block is not computed."""
        caught: list[Tensor] = []

        def catch(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught.append(args[0].flatten(0, -2).float())
            raise _Reached

        with _hooked({self.blocks[index][1].get_submodule(name): catch}), contextlib.suppress(_Reached):
            self._through(index, x, at, as_it_was)
        return caught[0] if caught else None

    @contextlib.contextmanager
    def _as_it_was(self, index: int) -> Iterator[None]:
        """Inside, the linear layers of the block that has come next are those from before the walk."""
        block = self.blocks[index][1]
        now = {name: block.get_submodule(name) for name in self._originals}
        _put(block, self._originals)
        try:
            yield
        finally:
            _put(block, now)

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


def _put(block: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        block.set_submodule(name, layer)


@contextlib.contextmanager
def _hooked(watching: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Inside, each of the modules calls what watches it before it runs."""
    handles = [module.register_forward_pre_hook(watch) for module, watch in watching.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def few_tokens(model: nn.Module, rows: Sequence[Tokens] | None, config: QuantizeConfig) -> str:
    """A warning where GPTQ would see few tokens for inputs so wide; otherwise empty."""
    if not rows or config.format != "affine" or config.method not in (None, "gptq"):
        return ""
    tokens = sum(len(row.ids) for row in rows)
    layers = [layer for _, block in find_blocks(model) for layer in linear_layers(block).values()]
    widest = max((layer.in_features for layer in layers), default=0)
    if tokens >= _TOKENS_PER_INPUT * widest:
        return ""
    return (
        f"warning: {tokens:,} tokens are few for layers with up to {widest:,} inputs, and gptq fits codes to what is "
        f"chance in them; give rows of {_TOKENS_PER_INPUT * widest:,} tokens or more (--data, --limit)"
    )
