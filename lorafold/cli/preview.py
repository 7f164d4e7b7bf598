"""`lorafold preview`: tokens as they will be trained."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from lorafold.config import RowsConfig, check_positive


def preview(model: str, *, data: Annotated[RowsConfig, Parameter(name="*")], rows: int = 2) -> None:
    """Show rows as the tokens that will be trained, the supervised ones marked.

    Args:
        model: whose tokenizer and chat template are used.
        rows: how many rows to show.
    """
    from itertools import islice

    from rich.console import Console

    from lorafold.data.preview import render
    from lorafold.data.stream import RowStream
    from lorafold.models.load import load_tokenizer_only
    from lorafold.runs.display import Display
    from lorafold.runs.prepare import training_rows

    check_positive(rows=rows)
    console = Console()
    tokenizer = load_tokenizer_only(model)
    display = Display()
    tokenized = training_rows(data, tokenizer, display)
    for row in islice(tokenized.rows, rows):
        console.rule(f"row {row.row}: {len(row.ids)} tokens, {sum(row.supervised)} supervised")
        console.print(render(row, tokenizer))
    display.say(tokenized.describe())
    if isinstance(tokenized, RowStream):
        with display.bar("tokenizing", len(tokenized)) as advance:
            for _ in tokenized:
                advance()
        display.say(tokenized.describe_met())
