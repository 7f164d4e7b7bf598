"""`lorafold export`: adapters for PEFT and llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def export(
    run: Path,
    *,
    to: Literal["peft", "gguf-adapter", "mlx-adapter"],
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    overwrite: bool = False,
) -> None:
    """Write a run's adapter for other tools; a qa-lora adapter is expanded to an ordinary LoRA.

    Args:
        run: run folder that `lorafold train` wrote, or an adapter folder.
        to: peft (a folder that PEFT, vLLM and others load), gguf-adapter (a file for llama.cpp's --lora) or mlx-adapter
            (a folder for mlx-lm's --adapter-path).
        output: folder or file to write.
        overwrite: replace an existing output.
    """
    from lorafold.config import METHODS
    from lorafold.errors import ConfigError
    from lorafold.files import check_output
    from lorafold.models.exports import export_gguf_adapter, export_mlx_adapter, export_peft
    from lorafold.runs import display as shown
    from lorafold.runs.fold import load_trained
    from lorafold.runs.folder import read_trained

    check_output(output, overwrite)
    trained = read_trained(run)
    if to == "peft" and trained.bare and trained.config.adapter.method == "lora":
        raise ConfigError(f"{run} is in PEFT's format already: copy the folder")
    if METHODS[trained.config.adapter.method].whole:
        raise ConfigError(f"{run} trained the model's own weights, so there is no adapter to export: use lorafold fold")
    loaded = load_trained(trained)
    if to == "peft":
        export_peft(loaded, trained.config.adapter, output)
    elif to == "mlx-adapter":
        export_mlx_adapter(loaded, output)
    else:
        export_gguf_adapter(loaded, output)
    shown.output(f"{output}: the adapter of {run} for {to}")
