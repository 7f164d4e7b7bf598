"""Tokens as they will be trained, for the terminal.

Neighbouring tokens have different shades. What is learned stands between ⟦ and ⟧ and in green, special tokens are
magenta, a line break is shown as ⏎. The part of a character that a token holds is shown as … until it is complete.
"""

from __future__ import annotations

from typing import Any

from rich.text import Text

from lorafold.data.tokens import Tokens

_SHADES = ("on grey15", "on grey27")
_GIVEN, _LEARNED, _SPECIAL, _BRACKET = "grey74", "bold green", "bold magenta", "bold yellow"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def render(tokens: Tokens, tokenizer: Any) -> Text:
    """Show a row token by token.

    Args:
        tokens: the row.
        tokenizer: transformers' tokenizer that made it.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    shown = Text()
    learning = False
    pieces = _pieces(tokens.ids, tokenizer)
    for i, (index, supervised, piece) in enumerate(zip(tokens.ids, tokens.supervised, pieces, strict=True)):
        if supervised != learning:
            shown.append("⟦" if supervised else "⟧", style=_BRACKET)
            learning = supervised
        colour = _SPECIAL if index in special else _LEARNED if supervised else _GIVEN
        shown.append(piece.replace("\n", "⏎\n"), style=f"{colour} {_SHADES[i % 2]}")
    if learning:
        shown.append("⟧", style=_BRACKET)
    return shown


def _pieces(ids: list[int], tokenizer: Any) -> list[str]:
    """Text of each token; a character made of several tokens stands at its last one."""
    pieces: list[str] = []
    before: list[int] = []  # tokens of the text before, since some tokenizers drop the space of a first one
    pending: list[int] = []
    for index in ids:
        pending.append(index)
        text = _added_text(before, pending, tokenizer)
        if text.endswith(_INCOMPLETE) and len(pending) < 4:
            pieces.append("…")
        else:
            pieces.append(text)
            before, pending = pending, []
    return pieces


def _added_text(before: list[int], ids: list[int], tokenizer: Any) -> str:
    options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    head, whole = tokenizer.decode(before, **options), tokenizer.decode(before + ids, **options)
    return whole[len(head) :] if whole.startswith(head) else tokenizer.decode(ids, **options)
