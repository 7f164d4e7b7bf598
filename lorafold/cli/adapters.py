"""`lorafold adapters`: combine, reduce, extract and look at adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lorafold.config import CombineConfig, RankConfig

app = App(name="adapters", help="Combine, reduce, extract and look at adapters.")
_FLAT = Parameter(name="*")
_OUTPUT = Parameter(name=["--output", "-o"])


@app.command
def combine(
    adapters: tuple[Path, ...],
    /,
    *,
    output: Annotated[Path, _OUTPUT],
    options: Annotated[CombineConfig, _FLAT],
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Add, subtract and scale adapters: one adapter that is their weighted combination.

    QA-LoRA adapters give a QA-LoRA adapter, which folds exactly; with a LoRA among them they are expanded first.

    Args:
        adapters: adapter or run folders, on one base.
        output: adapter folder to write.
        base: the base model, where LoRA meets QA-LoRA, or r = full a rank. Default: the one that the adapters name.
        overwrite: replace an existing output.
    """
    from lorafold.files import check_output
    from lorafold.runs import display as shown
    from lorafold.runs.arithmetic import combine_adapters

    check_output(output, overwrite)
    outcome = combine_adapters(adapters, options, base, shown.Display().say)
    outcome.write(output)
    shown.output(f"{output}: {outcome.describe()}")


@app.command
def reduce(
    adapter: Path,
    *,
    output: Annotated[Path, _OUTPUT],
    size: Annotated[RankConfig | None, _FLAT] = None,
    base: str | None = None,
    overwrite: bool = False,
) -> None:
    """Bring an adapter to a lower rank, or to as few ranks as keep a share of its energy, layer by layer.

    Args:
        adapter: adapter or run folder.
        output: adapter folder to write.
        base: the base model, for r = full. Default: the one that the adapter names.
        overwrite: replace an existing output.
    """
    from lorafold.files import check_output
    from lorafold.runs import display as shown
    from lorafold.runs.arithmetic import reduce_adapter

    check_output(output, overwrite)
    outcome = reduce_adapter(adapter, size or RankConfig(), base)
    outcome.write(output)
    shown.output(f"{output}: {outcome.describe()}")


@app.command
def extract(
    *,
    base: str,
    tuned: str,
    output: Annotated[Path, _OUTPUT],
    size: Annotated[RankConfig | None, _FLAT] = None,
    overwrite: bool = False,
) -> None:
    """Make a LoRA out of two models: the difference of each linear layer, to a rank or a share of its energy.

    Args:
        base: model that the adapter is to be put on.
        tuned: the same model, tuned; both in any format that can be trained here.
        output: adapter folder to write.
        overwrite: replace an existing output.
    """
    from lorafold.files import check_output
    from lorafold.models.load import load
    from lorafold.runs import display as shown
    from lorafold.runs.extract import extract_adapter, target_count

    size = size or RankConfig()
    check_output(output, overwrite)
    before, after = load(base), load(tuned)
    with shown.Display().bar("layers", target_count(before)) as done:
        extraction = extract_adapter(before, after, size, done)
    extraction.outcome.write(output)
    shown.output(f"{output}: {extraction.describe()}")


@app.command
def show(adapter: Path, *, output: Annotated[Path | None, _OUTPUT] = None, overwrite: bool = False) -> None:
    """Singular values of an adapter: size, effective rank and stable rank of each layer's update.

    Args:
        adapter: adapter or run folder.
        output: plot to write (.svg, .png, .pdf).
        overwrite: replace an existing output.
    """
    from rich.console import Console
    from rich.table import Table

    from lorafold.files import check_output
    from lorafold.runs import display as shown
    from lorafold.runs.spectra import check_plot, means, plot_spectra, spectra

    if output is not None:
        check_plot(output)
        check_output(output, overwrite)
    found = spectra(adapter)
    table = Table("layer", "rank", "largest singular value", "norm", "effective rank", "stable rank")
    for spectrum in found:
        table.add_row(spectrum.layer, str(spectrum.rank), *(f"{value:.4g}" for value in spectrum.figures()))
    table.add_section()
    for kind, figures in means(found).items():
        table.add_row(f"mean of {kind}", *(f"{value:.4g}" for value in figures))
    Console(markup=False).print(table)
    if output is not None:
        plot_spectra(found, output)
        shown.output(f"{output}: singular values and effective ranks of {len(found)} updates")
