"""Writing files so that nothing is ever half-written: to a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lorafold.errors import LoraFoldError

_MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".md")


class OutputError(LoraFoldError):
    """An output path exists already, cannot be written, or the disk is full."""


def check_output(path: Path, overwrite: bool = False, advice: str = "choose another path or pass --overwrite") -> None:
    """Refuse an output path before any work is done.

    Args:
        advice: what to do about a path that exists already.

    Raises:
        OutputError: it exists (and may not be overwritten, or is a folder with more in it than a model or an adapter),
            or its folder is missing or not writable.
    """
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists already; {advice}")
    if path.is_dir():
        _refuse_other_things(path)
    parent = _existing_parent(path)
    if not parent.is_dir():
        raise OutputError(f"{path} cannot be written: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: no permission to write in {parent}")


def _refuse_other_things(folder: Path) -> None:
    """A folder is replaced whole, so it must hold nothing but the files of a model or an adapter."""
    names = {p.name: p.is_file() and p.suffix in _MODEL_FILES for p in folder.iterdir()}
    known = all(names.values()) and not names.keys().isdisjoint(("config.json", "adapter_config.json"))
    if names and not known:
        other = sorted(name for name, of_a_model in names.items() if not of_a_model) or sorted(names)
        raise OutputError(
            f"{folder} is not replaced: besides model or adapter files it holds {', '.join(other[:5])}; choose another "
            "path, or remove the folder yourself"
        )


def _existing_parent(path: Path) -> Path:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    return parent


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path; when the block succeeds it becomes `path`, when it fails nothing is left.

    Raises:
        OutputError: for any operating-system error while writing, such as a full disk.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        os.chmod(temporary, default_mode())
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path} was not written: {reason(error)}; nothing was left behind") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """The same for a folder: it appears whole under its name, or not at all.

    An older one is replaced if it holds nothing but the files of a model or an adapter.
    """
    path = path.resolve()
    if path.is_dir():
        _refuse_other_things(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        if path.is_dir():
            old = path.with_name(f"{temporary.name}.old")
            os.replace(path, old)
            try:
                os.replace(temporary, path)
            except OSError:
                os.replace(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path} was not written: {reason(error)}; nothing was left behind") from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())


def reason(error: OSError) -> str:
    """Why writing failed, in words."""
    return "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


def default_mode() -> int:
    """Permissions of a new file."""
    return 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def parse_bytes(text: str) -> int | None:
    """`"1.5GB"` -> 1,500,000,000, `"2GiB"` -> 2^31; None for what is no positive number with a unit from KB to TiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT])(i?)B\s*", text, re.IGNORECASE)
    if not found:
        return None
    return int(float(found[1]) * (1024 if found[3] else 1000) ** ("KMGT".index(found[2].upper()) + 1)) or None
