"""`lorafold generate`: answers side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


def generate(
    models: tuple[str, ...],
    /,
    *,
    prompt: Annotated[tuple[str, ...], Parameter(consume_multiple=False)],
    adapter: tuple[Path, ...] = (),
    template: str = "auto",
    max_new_tokens: int = 128,
    runtime: Literal["torch", "llama.cpp"] = "torch",
) -> None:
    """Answer prompts greedily, with several models or adapters side by side.

    Args:
        models: one or more models (base file, folded file, ...); adapters go on the first.
        prompt: what to ask; give it several times for several prompts.
        adapter: adapter or run folders, each tried on the first model.
        template: chat, alpaca, plain, or auto: chat where the model has a template.
        max_new_tokens: longest answer, in tokens.
        runtime: torch, or llama.cpp (GGUF files).
    """
    from rich.console import Console
    from rich.table import Table

    from lorafold.cli.variants import in_llama_cpp, in_torch, tokenizer_of, variants
    from lorafold.config import check_positive
    from lorafold.data.rows import Example
    from lorafold.data.tokens import prompt_ids
    from lorafold.evals.generate import generate as generate_in_torch

    check_positive(max_new_tokens=max_new_tokens)
    columns = variants(models, adapter)
    table = Table(show_lines=True)
    table.add_column("prompt")
    answers: list[list[str]] = []
    for variant in columns:
        table.add_column(variant.label)
        if runtime == "torch":
            loaded = in_torch(variant)
            tokenizer = loaded.tokenizer
            ids = [
                prompt_ids(Example(row=i, kind="prompt", prompt=p), tokenizer, template) for i, p in enumerate(prompt)
            ]
            out = [generate_in_torch(loaded, i, max_new_tokens) for i in ids]
        else:
            tokenizer = tokenizer_of(variant, runtime)
            ids = [
                prompt_ids(Example(row=i, kind="prompt", prompt=p), tokenizer, template) for i, p in enumerate(prompt)
            ]
            with in_llama_cpp(variant, max(map(len, ids)) + max_new_tokens) as engine:
                out = [engine.generate(i, max_new_tokens) for i in ids]
        answers.append([str(tokenizer.decode(o, skip_special_tokens=True)).strip() for o in out])
    for i, text in enumerate(prompt):
        table.add_row(text, *(column[i] for column in answers))
    Console(markup=False).print(table)
