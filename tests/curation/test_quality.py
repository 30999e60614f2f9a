"""Alignment scores, the filter by them, and the intervals of the figures."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medsyn_jax.core import estimates
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
    attempt, kept = quality.choose(scores, 0.05)
    assert attempt.tolist() == [0, 1, 1, 1]
    assert kept.tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match="without a scored attempt"):
        quality.choose(np.array([[0.1], [nan]]), 0.05)


@pytest.mark.parametrize("count", [0, 3, 40])
def test_a_rate_has_the_exact_interval(count):
    entry = estimates.rate(np.arange(40) < count)
    want = stats.binomtest(count, 40).proportion_ci(method="exact")
    assert (entry["value"], entry["n"]) == (count / 40, 40)
    assert entry["ci95"] == pytest.approx([want.low, want.high], abs=1e-9)


def test_a_mean_is_drawn_by_group():
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 10)
    values = rng.normal(size=30)[groups]
    clustered = estimates.mean(values, groups)
    alone = estimates.mean(values, np.arange(300))
    assert clustered["value"] == pytest.approx(values.mean())
    assert np.diff(clustered["ci95"])[0] > 2 * np.diff(alone["ci95"])[0]


def test_aurocs_are_sklearns_and_a_rare_label_does_not_spoil_the_mean():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(2, 50, 2)).astype(np.float32)
    labels = rng.choice([1, 0, -2], size=(50, 2)).astype(np.int8)
    labels[:, 1] = -2
    labels[:4, 1] = (1, 0, 0, 0)  # its only positive is missing from 1 resample in e
    args = labels, ("a", "b"), np.arange(50)
    found, figures = (f(logits, *args) for f in (estimates.aurocs, estimates.auroc_figures))
    assert list(found) == list(figures) == ["a", "b", "mean"]
    for i, name in enumerate("ab"):
        known = labels[:, i] >= 0
        want = np.mean([roc_auc_score(labels[known, i], x[known, i]) for x in logits])
        assert found[name]["value"] == pytest.approx(want, abs=1e-9)
        assert found[name]["n"] == known.sum()
    both = [found[name]["value"] for name in "ab"]
    assert found["mean"]["value"] == pytest.approx(np.mean(both))
    assert len(found["mean"]["ci95"]) == 2
    assert 0.25 < np.isnan(figures["b"].draws).mean() < 0.5
    assert np.isfinite(figures["mean"].draws).all()


def test_a_difference_is_drawn_on_the_same_resamples():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, size=(80, 1)).astype(np.int8)
    logits = rng.normal(size=(1, 80, 1)) + labels
    near = logits + 0.05 * rng.normal(size=logits.shape)
    a, b = (estimates.auroc_figures(x, labels, "a", np.arange(80))["mean"] for x in (near, logits))
    gain = (a - b).estimate()
    assert gain["value"] == pytest.approx(a.values[0] - b.values[0])
    widths = [np.diff(entry["ci95"])[0] for entry in (gain, a.estimate(), b.estimate())]
    assert widths[0] < 0.2 * min(widths[1:])


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
