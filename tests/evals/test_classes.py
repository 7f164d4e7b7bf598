"""Figures of classifiers against counts made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lorafold.evals.classes import scores


def test_figures_of_three_labels() -> None:
    true, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1]
    found = scores([1.0, 2.0, 0.0, 0.0, 0.0, 3.0], predicted, true, 3)
    assert found.confusion == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert (found.loss, found.rows, found.accuracy) == (1.0, 6, 0.5)
    assert found.f1 == pytest.approx([2 * 2 / (3 + 3), 2 * 1 / (2 + 3), 0.0])
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.4 + 0) / 3)


def test_a_label_that_is_neither_there_nor_predicted_does_not_count() -> None:
    assert scores([0.0, 0.0], [0, 1], [0, 1], 5).macro_f1 == 1.0


def test_f1_is_the_harmonic_mean_of_precision_and_recall() -> None:
    generator = np.random.default_rng(0)
    true, predicted = generator.integers(4, size=200), generator.integers(4, size=200)
    found = scores([0.0] * 200, predicted.tolist(), true.tolist(), 4)
    for label, f1 in enumerate(found.f1):
        hits = ((true == label) & (predicted == label)).sum()
        precision, recall = hits / (predicted == label).sum(), hits / (true == label).sum()
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
