"""Overlap of masks against scikit-learn and by hand, and figures of heat maps."""

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from medsyn_jax.core import regions


def test_grounding_by_hand():
    """A hot corner that is the region, and a map that is hot everywhere but there."""
    region = np.zeros((2, 4, 4), bool)
    region[:, :2, :2] = True
    good = region[0].astype(float) + np.arange(16).reshape(4, 4) * 1e-3
    heat = np.stack([good, -good])
    assert regions.pointing(heat, region).tolist() == [1, 0]
    flat = np.zeros_like(heat)
    np.testing.assert_allclose(regions.pointing(flat, region), region.mean((1, 2)))
    inside, outside = good[region[0]], good[~region[0]]
    ratio = (inside.mean() - outside.mean()) / np.sqrt(inside.var() + outside.var())
    np.testing.assert_allclose(regions.contrast_to_noise(heat, region), [ratio, -ratio])
    found = regions.dice(heat, region, np.array([-2.0, 0.5]))
    np.testing.assert_allclose(found, [[8 / 20, 1.0], [8 / 20, 0.0]])


def masks_of(count=24, seed=0):
    """Two networks' masks and the truth, of which the first six are empty, bool [.., n, 8, 8]."""
    rng = np.random.default_rng(seed)
    truth = rng.random((count, 8, 8)) < 0.3
    truth[:6] = False
    predicted = truth[None] ^ (rng.random((2, count, 8, 8)) < 0.2)
    predicted[:, 3:6] = False  # three empty images are rightly left empty
    predicted[:, 6] = False  # and a mask is missed
    return predicted, truth


def test_overlaps_are_sklearns_f1_and_jaccard():
    predicted, truth = masks_of()
    pixels = (1, 2)
    counts = regions.Pixels(
        np.stack([(p & truth).sum(pixels) for p in predicted]),
        np.stack([p.sum(pixels) for p in predicted]),
        truth.sum(pixels),
    )
    figures = regions.overlaps(counts, np.arange(24) // 2, batch=10)
    for name, score in (("dice", f1_score), ("iou", jaccard_score)):
        for kind, first in (("with_empty", 0), ("without_empty", 6)):
            for i, p in enumerate(predicted):
                pairs = list(zip(truth[first:], p[first:], strict=True))
                each = [score(t.ravel(), q.ravel(), zero_division=1.0) for t, q in pairs]
                figure = figures[f"{name}/per_image/{kind}"]
                assert figure.values[i] == pytest.approx(np.mean(each), abs=1e-12)
                whole = score(truth[first:].ravel(), p[first:].ravel())
                figure = figures[f"{name}/per_set/{kind}"]
                assert figure.values[i] == pytest.approx(whole, abs=1e-12)
                assert (figure.n, figure.counts) == (24 - first, {"positives": 18})
                assert figure.draws.shape == (1000, 2)
                assert abs(figure.draws[:, i].mean() - figure.values[i]) < 0.05
    pairs = list(zip(truth, predicted[0], strict=True))
    each = [f1_score(t.ravel(), q.ravel(), zero_division=1.0) for t, q in pairs]
    by_batch = np.mean([np.mean(each[:10]), np.mean(each[10:20]), np.mean(each[20:])])
    compatible = figures["dice/mgca_compat"]
    assert compatible.values[0] == pytest.approx(by_batch, abs=1e-12)
    assert abs(by_batch - np.mean(each)) > 1e-3
    assert "ci95" not in compatible.estimate()


def test_overlaps_of_images_without_masks_have_the_empty_kind_alone():
    none, some = np.zeros((1, 4), int), np.array([[0, 0, 0, 5]])
    figures = regions.overlaps(regions.Pixels(none, some, none[0]), np.arange(4), batch=8)
    assert not [name for name in figures if "without_empty" in name]
    assert figures["dice/per_image/with_empty"].values == pytest.approx([0.75])
    assert figures["dice/per_set/with_empty"].values == pytest.approx([0.0])
    figures = regions.overlaps(regions.Pixels(none, none, none[0]), np.arange(4), batch=8)
    assert figures["dice/per_set/with_empty"].estimate()["value"] is None  # 0 / 0
