"""What can be done with a run, as command lines."""

from __future__ import annotations

from safetensors import safe_open

from lorafold.config import METHODS
from lorafold.models.adapter_files import WEIGHTS
from lorafold.models.classifier import is_quantized
from lorafold.models.load import resolve
from lorafold.models.mlx_folder import is_mlx
from lorafold.runs.folder import Run


def next_commands(run: Run) -> list[str]:
    """The usual one first. A fold may still say that a type is too coarse for a small update, and what to do then."""
    task, spec, base = run.config.task, run.config.adapter, resolve(run.config.model)
    if not task.continues and is_quantized(base):
        return [f"lorafold eval {run.config.model} --adapter {run.path} --task {task.task} --data MORE_ROWS"]
    fold = f"lorafold fold {run.path} -o tuned" + ("" if base.is_dir() else ".gguf")
    if METHODS[spec.method].whole or spec.method == "qa-lora" or not task.continues:
        return [fold]
    first = f"lorafold export {run.path} --to peft -o adapter"
    if not base.is_dir():
        runtime = f"lorafold export {run.path} --to gguf-adapter -o adapter.gguf"
        return [first, runtime if _only_lora(run) else f"{fold} --to f16"]
    if is_mlx(base):
        runtime = f"lorafold export {run.path} --to mlx-adapter -o mlx-adapter"
        return [first, runtime if _only_lora(run) else f"{fold} --lossy"]
    return [first, fold]


def _only_lora(run: Run) -> bool:
    """Whether a runtime's adapter file can hold it: LoRA of linear layers within the blocks, and nothing else."""
    spec = run.config.adapter
    with safe_open(run.adapter / WEIGHTS, "pt") as file:
        ends = any("embed" in key or "lm_head" in key for key in file.keys())  # noqa: SIM118
    return not (spec.use_dora or spec.bias != "none" or spec.modules_to_save or spec.target_parameters or ends)
