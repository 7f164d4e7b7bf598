"""Templates that name columns in braces, such as `"Q: {question}"`, and nothing else: no attributes, no formats.

Whatever stands between single braces is taken as the name of a column, so that any name can be used.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from lorafold.errors import DataError, bullet_list, nearest

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def fill(template: str, row: Mapping[str, Any]) -> str:
    """Put the values of a row where the template names their columns; missing values are empty text.

    Raises:
        DataError: a name in braces is not a column of the row, or a brace stands alone.
    """
    columns_of(template, row)
    literal = {"{{": "{", "}}": "}"}
    return _FIELD.sub(lambda match: literal.get(match[0]) or filling(row[match[1]]), template)


def columns_of(template: str, columns: Iterable[str]) -> list[str]:
    """Columns that a template names, in order.

    Raises:
        DataError: a name in braces is not among the columns, or a brace stands alone; all such faults at once.
    """
    known = list(columns)
    names, faults = [], []
    for match in _FIELD.finditer(template):
        if match[0] in ("{", "}"):
            faults.append(f"a single {match[0]} at character {match.start()}: double it to mean the brace itself")
        elif match[1] is not None and match[1] not in known:
            faults.append(f"no column {match[1]!r}{nearest(match[1], known)}")
        elif match[1] is not None:
            names.append(match[1])
    if faults:
        raise DataError(f"in the template {template!r}:\n{bullet_list(faults)}\nthe columns are: {', '.join(known)}")
    return names


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: None, or NaN, as tables have it where a number is missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def filling(value: Any) -> str:
    """A value as it is put into a template: text as it is, nothing for a missing one, the rest as JSON writes it."""
    if is_missing(value):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
