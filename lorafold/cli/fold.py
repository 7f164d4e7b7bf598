"""`lorafold fold`: merge into the file format of the base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def fold(
    run: Path,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    to: Literal["f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "nf4", "int8"] | None = None,
    lossy: bool = False,
    overwrite: bool = False,
) -> None:
    """Merge a run's adapter into the base's own file format.

    A qa-lora run folds exactly: same type, only the offsets of adapted blocks change. A lora run on quantized weights
    can be merged into wider types (--to f16), or quantized again with loss (--to q4_1 --lossy), and is told what is
    left of the gain. Norms, biases and matrices that were trained whole keep the types they have.

    Args:
        run: run folder that `lorafold train` wrote, or an adapter folder.
        output: file to write (a folder, when the base is a transformers folder).
        to: type of the adapted matrices, instead of the base's own; f32, f16 and bf16 also of those trained whole.
        lossy: write a result that loses part of the update, and measure how much of the gain is left.
        overwrite: replace an existing output.
    """
    from lorafold.files import check_output
    from lorafold.runs import display as shown
    from lorafold.runs.fold import fold_run
    from lorafold.runs.folder import read_trained
    from lorafold.runs.gain import measure_gain

    check_output(output, overwrite)
    trained = read_trained(run)
    report = fold_run(trained, output, to, lossy)
    shown.output(f"{output}: {report.describe()}")
    if lossy and report.kind != "exact" and not trained.bare and trained.config.task.continues:
        shown.output(measure_gain(trained, output, shown.Display()).describe())
    elif report.kind == "exact":
        shown.output(f"next: lorafold verify {output} --run {run}")
