"""Tiny models as MLX folders, converted and quantized by mlx-lm itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tests.practice import tiny_folder_of
from tests.tiny import tiny_config


def tiny_mlx(
    folder: Path, architecture: str = "llama", bits: int = 4, group: int = 32, dtype: str = "bfloat16", **options: Any
) -> Path:
    """The path of the folder; the option `predicate` chooses bits layer by layer, as mlx-lm's quant_predicate does."""
    from mlx_lm.convert import convert

    source = tiny_folder_of(folder / "source", architecture)
    _spell_as_mlx(source / "config.json", architecture)
    path = folder / "mlx"
    chosen = {"q_group_size": group, "q_bits": bits, "dtype": dtype, "quant_predicate": options.get("predicate")}
    convert(str(source), str(path), quantize=True, **chosen)
    shutil.rmtree(source)
    return path


def _spell_as_mlx(path: Path, architecture: str) -> None:
    """mlx-lm reads rope options where older configs had them."""
    config = json.loads(path.read_text())
    config.pop("rope_parameters")
    rope = tiny_config(architecture).rope_parameters
    if "full_attention" in rope:
        config |= {"rope_local_base_freq": rope["sliding_attention"]["rope_theta"], "sliding_window_pattern": 6}
        rope = rope["full_attention"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    config |= {"rope_theta": rope["rope_theta"]} | ({"rope_scaling": scaling} if len(scaling) > 1 else {})
    path.write_text(json.dumps(config))
