"""`lorafold quantize`: a model in 2 to 8 bits, ready for QA-LoRA."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from lorafold.config import QuantizeConfig, RowsConfig

CALIBRATION_ROWS = 128  # of --data, where --limit says nothing


def quantize(
    model: str,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    options: Annotated[QuantizeConfig | None, Parameter(name="*")] = None,
    rows: Annotated[RowsConfig | None, Parameter(name="*")] = None,
    overwrite: bool = False,
) -> None:
    """Quantize a model so that it can be trained with QA-LoRA and folded.

    A GGUF model becomes a GGUF file (Q4_1, Q5_1) when the output ends in .gguf; any model becomes an MLX folder (2 to 8
    bits) otherwise. Calibrated on the first 128 rows of --data, or on --limit of them; of a run, or of a folder with
    splits, on rows that are trained on. After an interruption the same command goes on where it stopped. With --loftq-r
    a LoRA is written beside the output that gives back a part of what was lost, for train --from-adapter.

    Args:
        model: 16-bit model: transformers folder, GGUF file, hub id; a quantized one is decoded first.
        output: .gguf file or MLX folder to write.
        overwrite: replace an existing output.
    """
    from lorafold.errors import ConfigError
    from lorafold.files import check_output
    from lorafold.models.load import load
    from lorafold.runs import display as shown
    from lorafold.runs.blocks import few_tokens, find_blocks
    from lorafold.runs.loftq import start_folder
    from lorafold.runs.prepare import training_rows
    from lorafold.runs.quantize import quantize_model

    config = options or QuantizeConfig()
    if rows is not None and (config.format != "affine" or config.method == "rtn" or config.loftq_r):
        unneeded = "loftq_r" if config.loftq_r else config.method or config.format
        raise ConfigError(f"data is for calibration, which {unneeded} does not need; leave it out")
    check_output(output, overwrite)
    if config.loftq_r:
        check_output(start_folder(output), overwrite)
    display = shown.Display()
    loaded = load(model)
    tokens = None
    if rows is not None:
        tokenized = training_rows(replace(rows, limit=rows.limit or CALIBRATION_ROWS), loaded.tokenizer, display)
        tokens = list(tokenized.rows)
        display.say(f"calibration: {tokenized.describe()}")
        if warning := few_tokens(loaded.model, tokens, config):
            display.say(warning)
    with display.bar("blocks", len(find_blocks(loaded.model))) as done:
        report = quantize_model(loaded, tokens, config, output, done)
    shown.output(f"{output}: {report.describe()}")
    method = "" if config.format == "affine" else " --method lora"
    method = method if report.start is None else f" --from-adapter {report.start}"
    shown.output(f"next: lorafold train {output}{method} --data ...")
