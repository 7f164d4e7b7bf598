"""What can be done with a run, as command lines that work as they stand."""

from __future__ import annotations

from lorafold.config import METHODS, AdapterSpec
from lorafold.models.classifier import is_quantized
from lorafold.models.load import resolve
from lorafold.models.mlx_folder import is_mlx
from lorafold.runs.folder import Run


def next_commands(run: Run) -> list[str]:
    """The usual one first: what is exact, or loses nothing, before what rounds."""
    task, spec, base = run.config.task, run.config.adapter, resolve(run.config.model)
    if not task.continues and is_quantized(base):
        return [f"lorafold eval {run.config.model} --adapter {run.path} --task {task.task} --data MORE_ROWS"]
    fold = f"lorafold fold {run.path} -o tuned" + ("" if base.is_dir() else ".gguf")
    if METHODS[spec.method].whole or spec.method == "qa-lora" or not task.continues:
        return [fold]
    first = f"lorafold export {run.path} --to peft -o adapter"
    if not base.is_dir():
        runtime = f"lorafold export {run.path} --to gguf-adapter -o adapter.gguf"
        return [first, runtime if _only_lora(spec) else f"{fold} --to f16"]
    if is_mlx(base):
        runtime = f"lorafold export {run.path} --to mlx-adapter -o mlx-adapter"
        return [first, runtime if _only_lora(spec) else f"{fold} --lossy"]
    return [first, fold]


def _only_lora(spec: AdapterSpec) -> bool:
    """Whether a runtime's adapter file can hold it: LoRA of linear layers within the blocks, and nothing else."""
    ends = any("embed" in name or "head" in name for name in spec.target_modules)
    return not (spec.use_dora or spec.bias != "none" or spec.modules_to_save or spec.target_parameters or ends)
