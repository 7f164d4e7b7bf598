"""Entities of BIO tags: cases by hand, and what seqeval says of random ones."""

from __future__ import annotations

import pytest

from lorafold.evals.entities import Found, entities, tag_scores

CASES: dict[str, list[tuple[str, int, int]]] = {
    "O O": [],
    "B-PER I-PER O B-LOC": [("PER", 0, 1), ("LOC", 3, 3)],
    "B-PER B-PER": [("PER", 0, 0), ("PER", 1, 1)],
    "I-PER I-PER O I-PER": [("PER", 0, 1), ("PER", 3, 3)],  # without a beginning
    "B-PER I-LOC I-LOC": [("PER", 0, 0), ("LOC", 1, 2)],  # another type
    "I-PER B-PER I-PER": [("PER", 0, 0), ("PER", 1, 2)],
    "B-a-b I-a-b I-a": [("a-b", 0, 1), ("a", 2, 2)],  # the type is all behind the first hyphen
}


@pytest.mark.parametrize("tags", CASES)
def test_spans(tags: str) -> None:
    assert entities(tags.split()) == CASES[tags]


def test_figures_by_hand() -> None:
    """Three PER, of which one is found, one too long and one missed; two LOC, one found and one called PER."""
    labels = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    true = [[1, 2, 0, 1, 0, 1], [3, 4, 0, 3]]
    predicted = [[1, 2, 0, 1, 2, 0], [3, 4, 0, 1]]
    found = tag_scores([0.5] * 10, predicted, true, labels)
    assert found.entities == {"LOC": Found(1, 1, 2), "PER": Found(1, 3, 3)}
    loc = found.entities["LOC"]
    assert (loc.precision, loc.recall, loc.f1) == (1.0, 0.5, pytest.approx(2 / 3))
    assert found.values() == pytest.approx(
        {"entity_f1": 4 / 9, "entity_precision": 2 / 4, "entity_recall": 2 / 5, "accuracy": 0.7}
        | {"macro_f1": found.macro_f1}
    )
    assert (found.loss, found.rows) == (0.5, 10)


def test_rows_do_not_touch() -> None:
    """An entity ends with its row."""
    found = tag_scores([0.0] * 4, [[0, 1], [2, 1]], [[0, 1], [2, 1]], ["O", "B-X", "I-X"])
    assert found.entities == {"X": Found(3, 3, 3)}


def test_other_tags_have_no_entities() -> None:
    found = tag_scores([0.0, 0.0], [[0, 1]], [[0, 1]], ["NOUN", "VERB"])
    assert found.entities is None
    assert list(found.values()) == ["accuracy", "macro_f1"]


# random rows, each digit a tag of LABELS, a third of the predicted ones changed; what seqeval 1.2.2 says of them
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "B-MISC", "I-MISC"]
TRUE = (
    "5163334336554 426315164 003003635 654331321600 16461523 04541316613 65440530135 346 4 2440 0424 211252246243 "
    "434346133210 2 5026610 40236043055 36 46631131561 30 1266443 02621140663 3533 23500 5250"
)
PREDICTED = (
    "5063434336556 456355163 003006634 614341420600 14462523 02441316013 65444534532 346 4 2440 0424 013252246243 "
    "435336533210 2 5122310 40266043055 33 46631132561 60 1206433 04630340665 3534 23602 6050"
)
SEQEVAL = {  # precision, recall, F1, true entities
    "LOC": (0.6415094339622641, 0.6181818181818182, 0.6296296296296297, 55),
    "MISC": (0.7, 0.6829268292682927, 0.6913580246913581, 41),
    "PER": (0.8064516129032258, 0.6410256410256411, 0.7142857142857142, 39),
    "micro avg": (0.7016129032258065, 0.6444444444444445, 0.6718146718146719, 135),
}


def test_seqeval_counts_the_same() -> None:
    true, predicted = ([[int(tag) for tag in row] for row in rows.split()] for rows in (TRUE, PREDICTED))
    found = tag_scores([0.0], predicted, true, LABELS)
    assert found.entities is not None
    every = {**found.entities, "micro avg": found.all_entities}
    assert {kind: (f.precision, f.recall, f.f1, f.true) for kind, f in every.items()} == {
        kind: pytest.approx(values, abs=1e-12) for kind, values in SEQEVAL.items()
    }
    assert found.accuracy == pytest.approx(0.7413793103448276)
