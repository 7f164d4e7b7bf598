"""Checkpoints: what a run needs to go on as if it had never stopped.

adapter_config.json, adapter_model.safetensors   the adapter after step N, as in any adapter folder
training.safetensors                             each trained parameter by its name, and what the optimizer keeps for it
ranks.safetensors                                with target_r: what is known of the importance of ranks
state.json                                       the step, and what the run must find again

No random state is among it: the order of rows follows from the seed and the step, and each step seeds its dropout.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorafold.adapters.ranks import MovingRanks
from lorafold.config import AdapterSpec
from lorafold.errors import ConfigError, bullet_list
from lorafold.files import replacing_folder
from lorafold.models.adapter_files import save_adapter
from lorafold.models.load import LoadedModel
from lorafold.models.tensors import save_tensors
from lorafold.train.budget import Plan

TRAINING, RANKS, STATE, VALUE = "training.safetensors", "ranks.safetensors", "state.json", "value"


@dataclass(frozen=True)
class State:
    """Where a run stands, and what it must find again to go on.

    Attributes:
        step: optimizer steps that are done.
        metrics: lines of `metrics.jsonl` until then.
        rows_per_step: rows of a step, over all workers.
        train_rows: rows that are learned from.
        data_sha256: of the training file(s).
        dtype: of activations.
        plan: how steps were computed.
    """

    step: int
    metrics: int
    rows_per_step: int
    train_rows: int
    data_sha256: str
    dtype: str
    plan: Plan


def save_checkpoint(
    folder: Path,
    loaded: LoadedModel,
    spec: AdapterSpec,
    optimizer: torch.optim.Optimizer,
    state: State,
    ranks: MovingRanks | None = None,
) -> None:
    """Write a checkpoint; the folder appears whole or not at all, also if the machine stops.

    Raises:
        OutputError: it cannot be written.
    """
    with replacing_folder(folder) as temporary:
        save_adapter(temporary, loaded, spec)
        tensors = {
            f"{name}.{key}": value.detach().cpu().contiguous()
            for name, parameter in _trained(loaded).items()
            for key, value in {VALUE: parameter, **optimizer.state[parameter]}.items()
        }
        save_tensors(temporary / TRAINING, tensors, None)
        if ranks is not None:
            save_tensors(temporary / RANKS, {name: value.cpu() for name, value in ranks.state().items()}, None)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=2) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())


def read_state(folder: Path) -> State:
    """The state of a checkpoint.

    Raises:
        ConfigError: it is damaged.
    """
    try:
        values: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return State(**{**values, "plan": Plan(**values["plan"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(folder, repr(error)) from None


@torch.no_grad()
def restore_training(
    folder: Path, loaded: LoadedModel, optimizer: torch.optim.Optimizer, ranks: MovingRanks | None = None
) -> None:
    """Give the trained parameters, the optimizer and ranks that move what a checkpoint holds.

    The adapter has begun as it did then, so that what it subtracts from the base (PiSSA, OLoRA) is there already.

    Raises:
        ConfigError: it is damaged, or of other parameters.
    """
    try:
        tensors = load_file(folder / TRAINING)
        if ranks is not None:
            ranks.restore(load_file(folder / RANKS))
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(folder, str(error)) from None
    trained = _trained(loaded)
    stored: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        parameter, _, key = name.rpartition(".")
        stored.setdefault(parameter, {})[key] = value
    faults = [f"state of {name}, which is not trained" for name in stored if name not in trained]
    faults += [f"no value of {name}" for name in trained if VALUE not in stored.get(name, {})]
    for name, values in stored.items():
        if name in trained and any(v.dim() and v.shape != trained[name].shape for v in values.values()):
            faults.append(f"state of {name} in another shape")
    if faults:
        raise _damaged(folder, "it holds\n" + bullet_list(faults[:12]))
    for name, parameter in trained.items():
        parameter.copy_(stored[name].pop(VALUE))
    whole = optimizer.state_dict()
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    whole["state"] = {order[id(trained[name])]: values for name, values in stored.items()}
    optimizer.load_state_dict(whole)


def _trained(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in loaded.model.named_parameters() if p.requires_grad}


def _damaged(folder: Path, why: str) -> ConfigError:
    return ConfigError(f"the checkpoint {folder} is damaged: {why}; delete it to go on from the one before")
