"""Rows on their way through a model that is quantized block by block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorafold.models.load import load
from lorafold.quant.linear import QuantLinear
from lorafold.runs.quantize import QuantizeConfig, quantize_model
from tests.practice import tiny_folder_of, token_rows

PASSES = 3 + 4 + 6 + 7  # layers that run before o, before gate and up, before down, and in the whole block


@pytest.mark.parametrize("room", [1 << 29, 100_000])
def test_what_layers_have_computed_is_not_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """With room for all of it, or for some: the same bytes as without."""
    source, calls = tiny_folder_of(tmp_path / "m", "llama"), {torch.nn.Linear: 0, QuantLinear: 0}

    def counted(kind: type[torch.nn.Module]) -> None:
        own = kind.forward

        def forward(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
            calls[kind] += 1
            return own(layer, x)

        monkeypatch.setattr(kind, "forward", forward)

    for kind in calls:
        counted(kind)
    monkeypatch.setattr("lorafold.runs.quantize._PACK_TOKENS", 1)  # a pack for each row
    found = []
    for name, size in (("with", room), ("without", 0)):
        monkeypatch.setattr("lorafold.runs.blocks._REMEMBERED_BYTES", size)
        calls |= dict.fromkeys(calls, 0)
        quantize_model(load(source), token_rows(3), QuantizeConfig(bits=2), tmp_path / name, lambda _: None)
        found.append((dict(calls), (tmp_path / name / "model.safetensors").read_bytes()))
    (kept, ours), (again, theirs) = found
    assert ours == theirs
    rows, blocks = 3, 3
    assert again[QuantLinear] == rows * blocks * PASSES
    if room > 1 << 20:
        assert kept[QuantLinear] == rows * blocks * 7
        assert again[torch.nn.Linear] - kept[torch.nn.Linear] == rows * blocks * (PASSES - 7)
    else:
        assert rows * blocks * 7 < kept[QuantLinear] < again[QuantLinear]
