"""Metrics against scikit-learn and against the same thing written slowly."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from medsyn_jax.core import estimates, metrics


def _case(seed: int, n: int, levels: int | None = None):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n).astype(np.int8)
    scores = rng.normal(size=n).astype(np.float32) + labels
    if levels:
        scores = np.round(scores * levels).astype(np.float32)
    return scores, labels


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, None), (2, 1), (3, 2)])
def test_auroc_is_sklearns_with_and_without_ties(seed, levels):
    scores, labels = _case(seed, 301, levels)
    assert metrics.auroc(scores, labels)[0] == pytest.approx(
        roc_auc_score(labels, scores), abs=1e-12
    )


def test_auroc_leaves_unknown_labels_out():
    scores, labels = _case(4, 200, 2)
    known = np.arange(200) % 3 != 0
    masked = np.where(known, labels, np.where(np.arange(200) % 2 == 0, -1, -2)).astype(np.int8)
    expected = roc_auc_score(labels[known], scores[known])
    assert metrics.auroc(scores, masked)[0] == pytest.approx(expected, abs=1e-12)
    scores[0] = np.nan  # record 0 is unknown, so its score does not matter
    assert metrics.auroc(scores, masked)[0] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("labels", [np.ones(5), np.zeros(5), np.full(5, -1), np.ones(0)])
def test_auroc_of_one_class_is_nan(labels):
    assert np.isnan(metrics.auroc(np.arange(len(labels), dtype=np.float32), labels))


@pytest.mark.parametrize("levels", [3, 10_000])
def test_a_roc_curve_is_sklearns_at_its_own_rates_and_has_the_area_of_the_auroc(levels):
    rng = np.random.default_rng(levels)
    labels = rng.integers(-1, 2, 300)
    scores = np.round(levels * (rng.random(300) + 0.3 * labels)) / levels
    known = labels >= 0
    fpr, tpr, _ = roc_curve(labels[known], scores[known], drop_intermediate=False)
    rates, last = np.unique(fpr[::-1], return_index=True)
    highest = tpr[::-1][last]
    np.testing.assert_allclose(metrics.roc_curve(scores, labels, rates), highest, atol=1e-12)
    area = np.trapezoid(metrics.roc_curve(scores, labels, metrics.ROC_GRID), metrics.ROC_GRID)
    assert area == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=0.01)


def test_a_perfect_roc_curve_begins_at_1_and_that_of_a_constant_score_is_the_diagonal():
    labels = np.array([0, 1, 1, 0])
    grid = np.linspace(0, 1, 5)
    assert metrics.roc_curve(1.0 * labels, labels, grid).tolist() == [1.0] * 5
    assert metrics.roc_curve(0.0 * labels, labels, grid).tolist() == grid.tolist()


def test_auroc_of_a_constant_score_is_one_half():
    assert metrics.auroc(np.zeros(6), np.array([0, 1, 1, 0, 0, 1])) == 0.5


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, 1), (2, 3)])
def test_average_precision_is_sklearns_also_weighted_and_with_unknown_labels(seed, levels):
    scores, labels = _case(seed, 200, levels)
    labels[::7] = -1
    known = labels >= 0
    want = average_precision_score(labels[known], scores[known])
    assert metrics.average_precision(scores, labels)[0] == pytest.approx(want, abs=1e-9)
    weights = np.random.default_rng(0).integers(0, 3, (4, 200)).astype(np.float64)
    for value, w in zip(metrics.average_precision(scores, labels, weights), weights, strict=True):
        want = average_precision_score(labels[known], scores[known], sample_weight=w[known])
        assert value == pytest.approx(want, abs=1e-9)


def test_average_precision_of_one_class_is_nan_and_of_a_constant_score_the_share_of_positives():
    assert np.isnan(metrics.average_precision(np.arange(3.0), np.zeros(3)))
    assert np.isnan(metrics.average_precision(np.arange(3.0), np.ones(3)))
    assert metrics.average_precision(np.zeros(4), np.array([1, 0, 0, 0])) == 0.25
    without_positive = np.array([[0, 1, 1, 1.0]])
    labels = np.array([1, 0, 0, 0])
    assert np.isnan(metrics.average_precision(np.arange(4.0), labels, without_positive))
    with pytest.raises(ValueError, match="not finite"):
        metrics.average_precision(np.array([0.1, np.nan]), np.array([0, 1]))


@pytest.mark.parametrize("levels", [None, 2])
def test_the_best_threshold_has_the_highest_f1(levels):
    scores, labels = _case(5, 100, levels)
    labels[::9] = -2
    known = labels >= 0
    best = max(f1_score(labels[known], scores[known] >= t) for t in scores)
    chosen = metrics.best_threshold(scores, labels)
    assert f1_score(labels[known], scores[known] >= chosen) == pytest.approx(best)
    assert metrics.best_threshold(scores, np.minimum(labels, 0)) == 0


def test_auroc_refuses_scores_that_are_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        metrics.auroc(np.array([0.1, np.nan]), np.array([0, 1]))


@pytest.mark.parametrize("levels", [None, 1])
def test_weighted_auroc_is_the_auroc_of_the_resampled_records(levels):
    scores, labels = _case(5, 120, levels)
    (weights,) = estimates.resample_weights(np.arange(120), 20, seed=1)
    values = metrics.auroc(scores, labels, weights)
    for value, row in zip(values, weights.astype(int), strict=True):
        drawn = np.repeat(np.arange(120), row)
        assert value == pytest.approx(roc_auc_score(labels[drawn], scores[drawn]), abs=1e-12)


def test_accuracy_leaves_unknown_classes_out():
    predicted, classes = np.array([0, 1, 2, 2, 0]), np.array([0, 1, 1, -1, 0])
    assert metrics.accuracy(predicted, classes)[0] == 0.75
    weights = np.array([[1, 0, 3, 5, 0], [0, 0, 0, 2, 0]], np.float32)
    values = metrics.accuracy(predicted, classes, weights)
    assert values[0] == 0.25
    assert np.isnan(values[1])


# ------------------------------------------------------------ retrieval


def _slow_ranks(similarity, reports):
    """Rank of each image's report among the distinct reports, and of each report's best image."""
    distinct = sorted(set(reports))
    first = {r: reports.index(r) for r in distinct}
    forward = []
    for i, report in enumerate(reports):
        scores = {r: similarity[i, first[r]] for r in distinct}
        forward.append(1 + sum(s > scores[report] for s in scores.values()))
    backward = []
    for report in distinct:
        column = similarity[:, first[report]]
        best = max(column[i] for i, r in enumerate(reports) if r == report)
        backward.append(1 + sum(s > best for s in column))
    return forward, backward


def test_retrieval_is_the_slow_version_with_repeated_reports():
    rng = np.random.default_rng(0)
    reports = [f"report {i}" for i in rng.integers(0, 25, 40)]
    texts = {r: rng.normal(size=6) for r in sorted(set(reports))}
    text = np.stack([texts[r] for r in reports])
    image = text + rng.normal(scale=1.5, size=text.shape)
    similarity = (image @ text.T).astype(np.float32)
    similarity = similarity[:, [reports.index(r) for r in reports]]  # equal text, equal score
    result = metrics.retrieval(similarity, np.array(reports), resamples=50)
    forward, backward = _slow_ranks(similarity, reports)
    for direction, ranks in {"image_to_text": forward, "text_to_image": backward}.items():
        for k in (1, 5, 10):
            entry = result[f"{direction}/recall@{k}"]
            assert entry["value"] == pytest.approx(np.mean(np.array(ranks) <= k))
            assert entry["n"] == len(ranks)
            assert entry["ci95"][0] <= entry["value"] <= entry["ci95"][1]
        assert result[f"{direction}/median_rank"]["value"] == pytest.approx(np.median(ranks))
    assert 0 < result["image_to_text/recall@1"]["value"] < 1  # the case is not trivial


def test_retrieval_of_the_right_pairs_is_perfect():
    result = metrics.retrieval(np.eye(12, dtype=np.float32), np.arange(12))
    assert result["image_to_text/recall@1"]["value"] == 1
    assert result["text_to_image/median_rank"]["value"] == 1
    assert result["text_to_image/recall@1"]["ci95"] == [1, 1]


@pytest.mark.parametrize("reports", [np.arange(30), np.arange(30) // 3])
def test_a_constant_similarity_gives_chance(reports):
    result = metrics.retrieval(np.ones((30, 30), np.float32), reports)
    distinct = len(set(reports))
    assert result["image_to_text/recall@5"]["value"] == pytest.approx(5 / distinct)
    assert result["image_to_text/median_rank"]["value"] == pytest.approx((distinct + 1) / 2)
    for name, entry in result.items():
        if "recall" in name:
            assert entry["value"] == pytest.approx(entry["chance"])
    if distinct < 30:  # a report of 3 images is found by luck more often: 1 - C(27, 5) / C(30, 5)
        assert result["text_to_image/recall@5"]["chance"] == pytest.approx(1 - 80730 / 142506)


def test_partial_ties_are_broken_at_random_on_average():
    # the positive ties with two negatives below one better: place 2, 3 or 4
    similarity = np.array([[2.0, 2.0, 2.0, 3.0]])
    ranks = metrics.retrieval_ranks(similarity, np.array([0]), np.arange(4))
    recalls = [metrics.recall_at(ranks, k)[0] for k in (1, 2, 3, 4)]
    assert recalls == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert metrics.expected_rank(ranks)[0] == 3


def test_retrieval_works_in_blocks(monkeypatch):
    similarity = np.random.default_rng(1).normal(size=(50, 50)).astype(np.float32)
    whole = metrics.retrieval(similarity, np.arange(50) // 2)
    monkeypatch.setattr(metrics, "_QUERIES", 7)
    assert metrics.retrieval(similarity, np.arange(50) // 2) == whole


def test_weighted_median_is_that_of_the_repeated_values():
    rng = np.random.default_rng(2)
    values = rng.integers(1, 9, 30).astype(float)
    (weights,) = estimates.resample_weights(rng.integers(0, 11, 30), 200)
    slow = [np.median(np.repeat(values, row.astype(int))) for row in weights]
    np.testing.assert_array_equal(metrics.weighted_median(values, weights), slow)


def test_retrieval_refuses_what_would_rank_first_by_accident():
    similarity = np.eye(3)
    similarity[1, 1] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        metrics.retrieval(similarity, np.arange(3))
    with pytest.raises(ValueError, match="no positive"):
        metrics.retrieval_ranks(np.eye(2), np.array([0, 5]), np.array([0, 1]))
