"""`lorafold demo`: the whole story on the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def demo(output_dir: Annotated[Path, Parameter(name=["--output-dir", "-o"])] = Path("lorafold-demo")) -> int:
    """Tune, fold and verify the embedded SmolLM2 on built-in product records: some minutes on two cores.

    Args:
        output_dir: folder for the runs, the tuned file and the report; it must not exist, or be empty.
    """
    from lorafold.files import check_output
    from lorafold.runs.demo import run_demo
    from lorafold.runs.display import Display

    check_output(output_dir, overwrite=output_dir.is_dir() and not any(output_dir.iterdir()))
    return 0 if run_demo(output_dir, Display()) else 1
