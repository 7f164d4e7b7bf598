"""What an adapter's singular values say of it: how large each update is, and how many ranks it really uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorafold.adapters.lowrank import LowRank, effective_rank, singular_values, stable_rank
from lorafold.errors import ConfigError
from lorafold.files import replacing
from lorafold.models.adapter_updates import read_updates
from lorafold.runs.arithmetic import adapter_folder

PLOTS = (".svg", ".png", ".pdf")


@dataclass(frozen=True)
class Spectrum:
    """One update of an adapter.

    Attributes:
        layer: name of the layer; of an adapter that learns scales, `scales of` it.
        rank: of its factors; of offsets learned directly, the number of singular values.
        values: singular values, falling, float64: of s B A (for QA-LoRA those of the change of the weights), or of the
            table of offsets, where these are learned directly.
    """

    layer: str
    rank: int
    values: Tensor

    @property
    def kind(self) -> str:
        """The last part of the layer's name, such as `q_proj`, or `scales of q_proj`."""
        kind = self.layer.rpartition(".")[2]
        return f"scales of {kind}" if self.layer.startswith("scales of ") else kind

    def figures(self) -> tuple[float, float, float, float]:
        """Spectral norm, Frobenius norm, effective rank, stable rank."""
        values = self.values
        return float(values[0]), float(values.square().sum().sqrt()), effective_rank(values), stable_rank(values)


def spectra(folder: Path) -> list[Spectrum]:
    """The spectra of an adapter or run folder, in the order of the layers.

    Raises:
        AdapterError: it is none, or damaged.
    """
    found = []
    for place, update in read_updates(adapter_folder(folder)).updates.items():
        values = singular_values(update) if isinstance(update, LowRank) else torch.linalg.svdvals(update.double())
        layer = f"scales of {place.layer}" if place.part == "scale" else place.layer
        found.append(Spectrum(layer, update.rank if isinstance(update, LowRank) else len(values), values))
    return found


def means(found: Sequence[Spectrum]) -> dict[str, tuple[float, ...]]:
    """Kind of layer -> the mean of its ranks and of each of its `figures`."""
    kinds: dict[str, list[tuple[float, ...]]] = {}
    for spectrum in found:
        kinds.setdefault(spectrum.kind, []).append((spectrum.rank, *spectrum.figures()))
    return {kind: tuple(sum(column) / len(rows) for column in zip(*rows, strict=True)) for kind, rows in kinds.items()}


def check_plot(path: Path) -> None:
    """Refuse the name of a plot that says no known format.

    Raises:
        ConfigError: naming those that are known.
    """
    if path.suffix not in PLOTS:
        raise ConfigError(f"a plot is written as {', '.join(PLOTS)}, not {path.suffix or 'without an ending'}: {path}")


def plot_spectra(found: Sequence[Spectrum], path: Path) -> None:
    """Draw the singular values of every layer and the effective ranks over depth; the ending names the format.

    Raises:
        OutputError: it cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(spectrum.kind for spectrum in found))
    with mpl.rc_context({"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "lorafold"}):
        figure = Figure(figsize=(10, 4), layout="constrained")
        falling, ranks = figure.subplots(1, 2)
        for number, kind in enumerate(kinds):
            own = [spectrum for spectrum in found if spectrum.kind == kind]
            for spectrum in own:
                shares = spectrum.values / spectrum.values[0].clamp_min(torch.finfo(torch.float64).tiny)
                falling.plot(range(1, len(shares) + 1), shares.tolist(), color=f"C{number}", linewidth=1, alpha=0.5)
            ranks.plot([spectrum.figures()[2] for spectrum in own], color=f"C{number}", marker=".", label=kind)
        falling.set(xlabel="number", ylabel="singular value / largest", yscale="log")
        falling.set_ylim(bottom=max(falling.get_ylim()[0], 1e-4))
        ranks.set(xlabel="layer", ylabel="effective rank", ylim=(0, None))
        ranks.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
        for axes in (falling, ranks):
            axes.grid(alpha=0.3)
        with replacing(path) as temporary:
            metadata = {"Date": None} if path.suffix == ".svg" else None
            figure.savefig(temporary, format=path.suffix[1:], metadata=metadata, dpi=150)
