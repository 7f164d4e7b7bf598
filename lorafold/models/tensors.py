"""Writing safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from lorafold.files import default_mode


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str] | None) -> None:
    """Write a safetensors file; what goes wrong is an OSError, as for any other file."""
    try:
        save_file(tensors, path, metadata=header)
        path.chmod(default_mode())  # safetensors makes it readable for the owner alone
    except SafetensorError as error:
        raise OSError(str(error)) from error
