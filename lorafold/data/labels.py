"""Texts with labels: read from columns, and turned into tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafold.data.fill import columns_of, fill
from lorafold.errors import DataError, bullet_list, nearest


@dataclass(frozen=True)
class Labelled:
    """One row: the tokens of its text, and the number of its label.

    Attributes:
        ids: token ids, special tokens included.
        label: number of the label among those of the model.
        row: number of the row in the file.
    """

    ids: list[int]
    label: int
    row: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> list[int]:
        """All its labels: one."""
        return [self.label]


def texts_and_labels(
    rows: Iterable[tuple[int, Mapping[str, Any]]], columns: Sequence[str], template: str, label_column: str
) -> list[tuple[int, str, str]]:
    """(number, text, label) of each row; whole numbers and truth values are labels as JSON writes them.

    Raises:
        DataError: a column is missing, a text is empty, or a label is neither text nor a whole number; up to ten
            rows are named.
    """
    if label_column not in columns:
        raise DataError(
            f"no column {label_column!r} for the labels{nearest(label_column, columns)}; the columns are: "
            f"{', '.join(columns)} (--label-column)"
        )
    columns_of(template, columns)
    found, faults = [], []
    for number, row in rows:
        text, label = fill(template, row), label_of(row[label_column])
        if not text.strip():
            faults.append(f"row {number}: the text is empty")
        if label is None:
            faults.append(f"row {number}: the label is {row[label_column]!r}; it must be text or a whole number")
        else:
            found.append((number, text, label))
    refuse_rows("rows without text or label", faults)
    return found


def label_of(value: Any) -> str | None:
    """A label as text; None where it is neither text nor a whole number nor a truth value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def refuse_rows(what: str, faults: Sequence[str]) -> None:
    """Raise what is wrong with rows, if anything is.

    Raises:
        DataError: naming up to ten of the faults.
    """
    if faults:
        more = [f"and {len(faults) - 10} more"] if len(faults) > 10 else []
        raise DataError(f"{what}:\n" + bullet_list([*faults[:10], *more]))


def label_names(labels: Iterable[str]) -> list[str]:
    """The labels there are, whole numbers by value and before words in the order of the alphabet.

    Raises:
        DataError: there are fewer than two, or as many as rows.
    """
    counts = Counter(labels)
    if len(counts) < 2:
        raise DataError(
            f"a classifier needs at least two labels; the training rows have only {', '.join(counts)!r}"
            " (a file that is sorted by label has to be shuffled before --limit takes its beginning)"
        )
    if len(counts) > 2 and len(counts) == counts.total():
        raise DataError(
            f"every one of {len(counts)} training rows has a label of its own, so there is nothing to learn; is "
            "--label-column the right column?"
        )
    return sorted(counts, key=lambda label: (not _is_whole(label), int(label) if _is_whole(label) else 0, label))


def _is_whole(label: str) -> bool:
    return label.removeprefix("-").isdecimal()


def numbered(
    labels: Iterable[str], names: Sequence[str], whose: str, by_number: bool = False, of: str = "rows"
) -> list[int]:
    """The number of each label among `names`; a head that was saved without names has LABEL_0, LABEL_1, ...

    Args:
        whose: what the labels belong to, for the message.
        by_number: `names` say what whole numbers mean.
        of: what has one label each, for the message.

    Raises:
        DataError: there are labels that the model does not have; all are named.
    """
    number = {str(i): i for i, name in enumerate(names) if by_number or name == f"LABEL_{i}"}
    number |= {name: i for i, name in enumerate(names)}
    labels = list(labels)
    unknown = Counter(label for label in labels if label not in number)
    if unknown:
        listed = ", ".join(f"{label!r} ({count} {of})" for label, count in list(unknown.items())[:10])
        more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
        cure = "; --label-names says what numbers mean" if any(map(_is_whole, unknown)) else ""
        raise DataError(f"{whose} have labels that the model does not: {listed}{more}; it has {', '.join(names)}{cure}")
    return [number[label] for label in labels]


def tokenize_labelled(
    rows: Sequence[tuple[int, str, str]], numbers: Sequence[int], tokenizer: Any, max_length: int
) -> list[Labelled]:
    """Rows as tokens, cut on the right to `max_length` special tokens included."""
    encoded = tokenizer([text for _, text, _ in rows], truncation=True, max_length=max_length)["input_ids"]
    return [Labelled(ids, n, row[0]) for ids, n, row in zip(encoded, numbers, rows, strict=True)]
