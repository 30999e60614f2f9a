"""Alignment scores and the filter by them."""

import numpy as np
import pytest

from medsyn_jax.curation import quality
from medsyn_jax.curation.privacy import unit


def test_shuffled_alignment_is_the_mean_over_the_other_reports():
    rng = np.random.default_rng(0)
    image, text = (unit(rng.normal(size=(9, 4))) for _ in range(2))
    reports = np.array(list("abacadaef"))
    text[reports == "a"] = text[0]
    got = quality.shuffled_alignment(image, text, reports)
    for i in range(9):
        others = [float(image[i] @ text[j]) for j in range(9) if reports[j] != reports[i]]
        assert got[i] == pytest.approx(np.mean(others), abs=1e-6)
    np.testing.assert_allclose(quality.alignment(image, text), np.diag(image @ text.T), atol=1e-6)
    assert np.isnan(quality.shuffled_alignment(image, text, np.array(["a"] * 9))).all()


def test_the_first_good_attempt_is_kept_or_else_the_best():
    threshold = quality.alignment_threshold(np.linspace(0, 1, 101), 0.05)
    assert threshold == pytest.approx(0.05)
    nan = np.nan
    scores = np.array([[0.06, nan, nan], [0.01, 0.2, 0.9], [0.01, 0.04, 0.03], [-0.3, 0.05, nan]])
    assert quality.keep(scores, 0.05).sum() == 4
    assert quality.choose(scores, 0.05).tolist() == [0, 1, 1, 1]
    assert quality.keep(scores, 0.05).any(axis=1).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="without a scored attempt"):
        quality.choose(np.array([[0.1], [nan]]), 0.05)


def test_what_fails_is_made_anew_and_what_passes_is_left_alone():
    """Images are their own scores here: row 0 passes, 1 passes at last, 2 never does."""
    offered = {1: [0.1, 0.2, 0.9], 2: [0.3, 0.4, 0.0]}
    asked = []

    def again(rows, attempt):
        asked.append((rows, attempt))
        return [np.array(offered[row][attempt]) for row in rows]

    first = [np.array(0.7), np.array(0.1), np.array(0.3)]
    kept, attempts = quality.retry(first, again, lambda made, rows: np.stack(made), 0.5, 3)
    assert [float(x) for x in kept] == [0.7, 0.9, 0.4]
    assert attempts == [0, 2, 1]
    assert asked == [([1, 2], 1), ([1, 2], 2)]
