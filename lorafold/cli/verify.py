"""`lorafold verify`: prove that a file is what was trained."""

from __future__ import annotations

from pathlib import Path


def verify(file: Path, *, run: Path, data: Path | None = None, tokens: int = 2000, runtime: bool = True) -> int:
    """Prove that a folded file is what was trained; exit code 1 when it is not.

    Args:
        file: the folded .gguf file, or MLX folder.
        run: run or adapter folder it was folded from.
        data: rows for the comparison in the runtime, instead of the run's held-out rows.
        tokens: predictions compared in the runtime.
        runtime: compare in llama.cpp or MLX, where it is installed.
    """
    from lorafold.config import check_positive
    from lorafold.errors import DataError
    from lorafold.models.load import load_tokenizer_only
    from lorafold.runs.display import Display, output
    from lorafold.runs.folder import read_trained
    from lorafold.runs.prepare import held_out_rows
    from lorafold.runs.verify import check_table, missing_runtime, verify_file, verify_runtime

    check_positive(tokens=tokens)
    trained = read_trained(run)
    checks = verify_file(file, trained)
    display = Display()
    missing = missing_runtime(trained) if runtime else None
    if runtime and trained.bare and data is None:
        missing = "an adapter folder has no held-out rows: the runtime is compared on those of --data"
    if runtime and missing is None:
        tokenizer = load_tokenizer_only(str(file))
        try:
            rows = held_out_rows(trained, tokenizer, data).rows
        except DataError:
            output(check_table(checks))  # these hold whatever has become of the data
            raise
        checks += verify_runtime(file, trained, rows, display, tokens).checks()
    elif missing:
        display.say(missing)
    output(check_table(checks))
    return 1 if any(check.passed is False for check in checks) else 0
