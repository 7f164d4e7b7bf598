"""The rules of docs/architecture.md that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lorafold"
COMMON = {"errors", "config", "files"}
ALLOWED = {
    "kernels": set(),
    "quant": {"kernels"},
    "adapters": {"quant"},
    "models": {"kernels", "quant", "adapters"},
    "data": set(),
    "evals": {"kernels", "models", "data", "quant"},
    "train": {"models", "adapters", "data", "evals"},
    "runs": {"quant", "adapters", "models", "data", "evals", "train"},
    "cli": {"quant", "adapters", "models", "data", "evals", "train", "runs"},
    "__main__": {"cli"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path, nested: bool = True) -> list[str]:
    """Dotted names that a file imports; `nested` includes imports inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if nested else tree.body
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(dotted: str) -> str | None:
    """`"lorafold.quant.ggml.CODECS"` -> `"quant"`; None for other packages."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "lorafold" and len(parts) > 1 else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path) -> None:
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = COMMON | ALLOWED.get(own, set()) | {own, "__version__"}
    wrong = {name for name in imports(path) if room(name) not in (None, *allowed)}
    assert not wrong


def test_common_modules_import_no_room() -> None:
    files = [p for p in MODULES if p.relative_to(PACKAGE).parts[0].removesuffix(".py") in COMMON]
    assert len(files) >= len(COMMON)
    for path in files:
        assert {room(name) for name in imports(path)} <= {None, *COMMON}


ENGINES = {
    "xllamacpp": "evals/llama_cpp.py",
    "mlx": "evals/mlx_lm.py",
    "mlx_lm": "evals/mlx_lm.py",
    "triton": "kernels/gpu.py",
    "llvmlite": "kernels/floats.py kernels/lanes.py kernels/rows.py kernels/tiles.py quant/vectors.py",
    "numba": "kernels/attention.py kernels/block.py kernels/compiled.py kernels/floats.py kernels/lanes.py "
    "kernels/packs.py kernels/products.py kernels/rows.py kernels/tiled_attention.py kernels/tiles.py "
    "quant/kernels.py quant/vectors.py quant/solver.py",
}


def test_only_one_module_knows_that_there_are_workers() -> None:
    users = [p for p in MODULES if any(name.startswith("torch.distributed") for name in imports(p))]
    assert [str(p.relative_to(PACKAGE)) for p in users] == ["train/distributed.py"]


@pytest.mark.parametrize(("engine", "owners"), ENGINES.items())
def test_engines_are_touched_in_one_place(engine: str, owners: str) -> None:
    users = {str(p.relative_to(PACKAGE)) for p in MODULES if any(n.split(".")[0] == engine for n in imports(p))}
    assert users == set(owners.split())


def test_nothing_is_unpickled() -> None:
    for path in MODULES:
        assert not {n.split(".")[0] for n in imports(path)} & {"pickle", "dill", "cloudpickle", "shelve"}, path
        assert "torch.load" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_modules_are_explained_and_of_one_concept(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 400


def test_functions_import_only_where_a_command_or_an_extra_needs_it() -> None:
    """Commands load heavy libraries when they are called; elsewhere only optional packages may wait or be tried.

    And what draws: 25 MB that training can do without.
    """
    optional = {"triton", "xllamacpp", "mlx", "mlx_lm", "matplotlib"}
    for path in MODULES:
        if path.parent.name != "cli":
            late = set(imports(path)) - set(imports(path, nested=False))
            assert {name.split(".")[0] for name in late} <= optional, path


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import lorafold", ["torch", "transformers", "numba", "pyarrow", "matplotlib"]),
        ("from lorafold.cli.main import run; run(['--help'])", ["torch", "transformers", "numba", "pyarrow"]),
        ("import lorafold.runs.start", ["matplotlib", "pandas", "datasets"]),
    ],
)
def test_starting_is_light(code: str, heavy: list[str]) -> None:
    """Neither the import nor the help of the command line loads heavy libraries; training none that it can spare."""
    check = f"{code}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], check=True, capture_output=True, text=True).stdout
    assert out.strip().endswith("[]")
