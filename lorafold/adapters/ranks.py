"""Ranks that move while training, after AdaLoRA (arXiv 2303.10512): the budget goes to where it pays.

A rank is one row of A with its column of B. Of every weight w with gradient g two averages over the steps are kept:

    sensitivity  I <- beta1 I + (1 - beta1) |w g|,    uncertainty  U <- beta2 U + (1 - beta2) | |w g| - I |

A rank's importance is I U of its singular value plus the means of I U over its row of A and its column of B. The paper
trains P diag(E) Q; here are A and B alone, so that the result is a plain LoRA, and for w g of a singular value e stands
what it is in any such split: e dL/de = <a, dL/da> = <b, dL/db>. Of the ranks of all layers the most important keep
their column of B, and those of the others become zero, from where they may grow again until the last decision. Names
and schedule are those of PEFT's AdaLoRA; its orthogonal regularization is left out: no vectors here are singular.
"""

# r rank, I input features, O output features

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lorafold.adapters.adapted import adapted_layers, carriers
from lorafold.adapters.lora import LoRA
from lorafold.adapters.parameters import ParameterLoRA
from lorafold.adapters.sites import ConvSite
from lorafold.adapters.tied import source_of, updated_layers
from lorafold.config import AdapterSpec
from lorafold.errors import AdapterError, ConfigError

BEFORE, AFTER, BETWEEN = 0.15, 0.35, 0.01  # shares of a run: tinit, tfinal, delta_t


@dataclass(frozen=True)
class Schedule:
    """When ranks fall, and to how many.

    Attributes:
        steps: optimizer steps of the run.
        first, last: ranks of all layers together at its beginning and at its end.
        tinit, tfinal, delta_t: as in `AdapterSpec`.
    """

    steps: int
    first: int
    last: int
    tinit: int
    tfinal: int
    delta_t: int

    def budget(self, step: int) -> int:
        """Ranks of all layers after a step (from 1): they fall with the cube of what is left of the way."""
        if step <= self.tinit:
            return self.first
        if step > self.steps - self.tfinal:
            return self.last
        left = 1 - (step - self.tinit) / (self.steps - self.tfinal - self.tinit)
        return int((self.first - self.last) * left**3 + self.last)

    def decides(self, step: int) -> bool:
        """Whether ranks are taken away after a step; at the end after each, since the optimizer would move them."""
        if step > self.steps - self.tfinal or step == self.steps:
            return True
        return step > self.tinit and step % self.delta_t == 0

    def observes(self, step: int) -> bool:
        """Whether a step changes what is known of importance."""
        return step < self.steps - self.tfinal


class MovingRanks:
    """The ranks of a model's LoRA layers, and what is known of their importance.

    Args:
        model: with LoRA of the spec, before its first step.
        spec: with `target_r`.
        steps: optimizer steps of the run.

    Attributes:
        schedule: when ranks fall.

    Raises:
        AdapterError: an adapted layer or parameter is of a kind whose ranks cannot be taken away one by one.
        ConfigError: no ranks are to be taken away, or there are no steps for it.
    """

    def __init__(self, model: nn.Module, spec: AdapterSpec, steps: int):
        assert spec.target_r is not None
        self._model, self._beta1, self._beta2 = model, spec.beta1, spec.beta2
        self._layers = {p: a for p, layer in updated_layers(model) if isinstance(a := layer.adapter, LoRA)}
        odd = [path for path, adapter in self._layers.items() if isinstance(adapter.site, ConvSite)]
        odd += [p for p, c in carriers(model) if any(isinstance(a, ParameterLoRA) for a in c.adapters.values())]
        if odd:
            raise AdapterError(f"target_r is for linear layers and embeddings, and {odd[0]} is neither")
        first, last = sum(_rank(adapter) for adapter in self._layers.values()), spec.target_r * len(self._layers)
        self.schedule = Schedule(
            steps,
            first,
            last,
            int(BEFORE * steps) if spec.tinit is None else spec.tinit,
            int(AFTER * steps) if spec.tfinal is None else spec.tfinal,
            max(1, int(BETWEEN * steps)) if spec.delta_t is None else spec.delta_t,
        )
        if last >= first:
            raise ConfigError(
                f"target_r is {spec.target_r}, for {last} ranks in all, and the layers begin with {first}"
            )
        if self.schedule.tinit + self.schedule.tfinal >= steps:
            raise ConfigError(
                f"tinit ({self.schedule.tinit}) and tfinal ({self.schedule.tfinal}) leave none of the run's {steps} "
                "steps for ranks to fall; make them smaller"
            )
        self._sensitivity = {n: torch.zeros_like(v) for n, v in self._products().items()}
        self._uncertainty = {n: torch.zeros_like(v) for n, v in self._sensitivity.items()}

    @torch.no_grad()
    def _products(self) -> dict[str, Tensor]:
        """|w g| of A [r, I], B [O, r] and the singular values E [r] of each layer; 0 where there is no gradient."""
        found = {}
        for path, adapter in self._layers.items():
            a, b = (w * (torch.zeros_like(w) if w.grad is None else w.grad) for w in adapter.learned())
            found |= {f"{path}.A": a.abs(), f"{path}.B": b.abs(), f"{path}.E": a.sum(1).abs()}
        return found

    def observe(self, step: int) -> None:
        """Learn from the gradients of a step (from 1), before the optimizer moves the weights."""
        if not self.schedule.observes(step):
            return
        for name, product in self._products().items():
            mean, spread = self._sensitivity[name], self._uncertainty[name]
            mean.mul_(self._beta1).add_(product, alpha=1 - self._beta1)
            spread.mul_(self._beta2).add_((product - mean).abs(), alpha=1 - self._beta2)

    def importance(self) -> dict[str, Tensor]:
        """Of each layer's ranks [r]."""
        parts = {name: mean * self._uncertainty[name] for name, mean in self._sensitivity.items()}
        return {p: parts[f"{p}.E"] + parts[f"{p}.A"].mean(1) + parts[f"{p}.B"].mean(0) for p in self._layers}

    def kept(self, budget: int) -> dict[str, Tensor]:
        """Which ranks of each layer [r] are among the most important; equal ones are shared out among the layers."""
        importance = self.importance()
        table = pad_sequence(list(importance.values()), padding_value=-1.0)  # [largest r, layers]
        best = table.flatten().argsort(descending=True, stable=True)[:budget]
        mask = torch.zeros(table.numel(), dtype=torch.bool, device=table.device).index_fill_(0, best, True)
        columns = mask.view_as(table).T
        return {p: columns[i, : len(values)] for i, (p, values) in enumerate(importance.items())}

    @torch.no_grad()
    def prune(self, step: int) -> None:
        """Take away what a step (from 1) leaves no budget for, after the optimizer has moved the weights."""
        if self.schedule.decides(step):
            for path, keep in self.kept(self.schedule.budget(step)).items():
                self._layers[path].learned()[1][:, ~keep] = 0

    @torch.no_grad()
    def cut(self) -> dict[str, int]:
        """Make what is left of each adapter its whole, after the last step, and take those without ranks off.

        Returns:
            Rank of each layer.
        """
        ranks = {}
        for path, keep in self.kept(self.schedule.last).items():
            adapter, ranks[path] = self._layers[path], int(keep.sum())
            a, b = adapter.learned()
            for name, value in zip(adapter.site.names, (a[keep], b[:, keep]), strict=True):
                setattr(adapter, name, nn.Parameter(value.clone()))
        gone = [self._layers[path] for path, rank in ranks.items() if not rank]
        for path, layer in list(adapted_layers(self._model)):  # a head that has the embedding's update goes with it
            if any(source_of(adapter) in gone for adapter in layer.active_adapters()):
                self._model.set_submodule(path, layer.base)
        return ranks

    def state(self) -> dict[str, Tensor]:
        """What is known of importance, by name, for a checkpoint."""
        kinds = {"sensitivity": self._sensitivity, "uncertainty": self._uncertainty}
        return {f"{name}.{kind}": value for kind, values in kinds.items() for name, value in values.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`.

        Raises:
            ValueError: it is that of other layers or ranks.
        """
        own = self.state()
        if {n: v.shape for n, v in own.items()} != {n: v.shape for n, v in state.items()}:
            raise ValueError("importance of other layers or ranks")
        for name, value in own.items():
            value.copy_(state[name])


def _rank(adapter: LoRA) -> int:
    return adapter.learned()[0].shape[0]
