"""Bootstrap intervals: by record, by subject and by seed."""

import json

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from medsyn_jax.core import estimates, metrics
from medsyn_jax.core.estimates import Figure


def test_resamples_draw_n_records_or_whole_subjects():
    rows = np.concatenate(list(estimates.resample_weights(np.arange(50), 30, seed=3)))
    assert rows.shape == (30, 50)
    assert (rows.sum(axis=1) == 50).all()
    assert len(np.unique(rows, axis=0)) == 30
    subjects = np.array(["a", "b", "b", "c", "c", "c"])
    rows = np.concatenate(list(estimates.resample_weights(subjects, 40, seed=3)))
    assert (rows[:, 1] == rows[:, 2]).all()
    assert (rows[:, 3] == rows[:, 4]).all()
    assert (rows[:, [0, 1, 3]].sum(axis=1) == 3).all()


def test_resamples_come_in_bounded_chunks_and_repeat_with_the_seed(monkeypatch):
    whole = estimates.bootstrap(lambda w: w[:, 0], np.arange(40), 25, seed=9)
    again = estimates.bootstrap(lambda w: w[:, 0], np.arange(40), 25, seed=9)
    np.testing.assert_array_equal(whole, again)
    other = estimates.bootstrap(lambda w: w[:, 0], np.arange(40), 25, seed=10)
    assert not np.array_equal(whole, other)
    monkeypatch.setattr(estimates, "_CHUNK", 400)
    sizes = [len(w) for w in estimates.resample_weights(np.arange(40), 25, seed=9)]
    assert sizes == [10, 10, 5]


def test_interval_of_a_mean_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=400)
    draws = estimates.bootstrap(lambda w: w @ values / w.sum(1), np.arange(400), 4000)
    low, high = estimates.interval95(draws)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_interval_by_subject_is_wider_when_subjects_repeat():
    values = np.repeat(np.random.default_rng(0).normal(size=50), 8)
    subjects = np.repeat(np.arange(50), 8)

    def width(groups):
        draws = estimates.bootstrap(lambda w: w @ values / w.sum(1), groups)
        low, high = estimates.interval95(draws)
        return high - low

    assert width(subjects) == pytest.approx(np.sqrt(8) * width(np.arange(400)), rel=0.15)


def test_one_subject_has_no_interval():
    values, subjects = np.array([0.25, 0.5, 1.0]), np.array(["a", "a", "b"])
    mean = lambda w: (w @ values / w.sum(1))[:, None]  # noqa: E731
    assert estimates.mean(values[:2], subjects[:2]) == {"value": 0.375, "n": 2}
    assert "ci95" in estimates.mean(values, subjects)
    assert "ci95" in estimates.figure(mean, np.array([True, True, True]), subjects).estimate()
    alone = estimates.figure(mean, np.array([True, True, False]), subjects).estimate()
    assert alone["n"] == 2
    assert "ci95" not in alone


def test_estimates_are_strict_json():
    entry = estimates.estimate(np.nan, 4, np.full(10, np.nan))
    assert entry == {"value": None, "n": 4}
    entry = estimates.estimate(np.float32(0.5), np.int64(4), np.array([0.4, 0.6, np.nan]))
    assert json.loads(json.dumps(entry, allow_nan=False))["ci95"] == pytest.approx([0.405, 0.595])


def test_interval_over_seeds_holds_the_spread_between_seeds():
    test_noise = np.random.default_rng(0).normal(scale=0.01, size=2000)
    values = np.array([0.6, 0.7, 0.8])
    entry = Figure(values, values + test_noise[:, None], 100).estimate()
    assert entry["value"] == pytest.approx(0.7)
    assert entry["seed_std"] == pytest.approx(0.1)
    assert entry["seeds"] == pytest.approx([0.6, 0.7, 0.8])
    assert entry["ci95"][0] < 0.63
    assert entry["ci95"][1] > 0.77
    single = Figure(values[:1], values[:1] + test_noise[:, None], 100).estimate()
    assert single["seed_std"] is None
    assert single["ci95"] == pytest.approx([0.58, 0.62], abs=0.003)


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
    figures = metrics.aurocs(logits, *args)
    found = {name: figure.estimate() for name, figure in figures.items()}
    assert list(found) == ["a", "b", "mean"]
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
    a, b = (metrics.aurocs(x, labels, "a", np.arange(80))["mean"] for x in (near, logits))
    gain = (a - b).estimate()
    assert gain["value"] == pytest.approx(a.values[0] - b.values[0])
    widths = [np.diff(entry["ci95"])[0] for entry in (gain, a.estimate(), b.estimate())]
    assert widths[0] < 0.2 * min(widths[1:])
