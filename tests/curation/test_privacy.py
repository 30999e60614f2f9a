"""Nearest training images against all products at once, and what is flagged."""

import numpy as np
import pytest

from medsyn_jax.curation import privacy


@pytest.mark.parametrize(("n", "m"), [(23, 31), (3, 4), (7, 5)])
def test_nearest_is_that_of_the_whole_matrix_block_by_block(monkeypatch, n, m):
    monkeypatch.setattr(privacy, "_QUERIES", 7)
    monkeypatch.setattr(privacy, "_TARGETS", 5)
    blocks = []
    whole = privacy._best
    monkeypatch.setattr(
        privacy, "_best", lambda *x: blocks.append((len(x[0]), len(x[1]))) or whole(*x)
    )
    rng = np.random.default_rng(n)
    queries, targets = (privacy.unit(-rng.random((k, 9))) for k in (n, m))
    targets[-1] = targets[0]  # a tie over blocks: the first counts
    found = privacy.nearest(queries, targets)
    products = queries.astype(np.float64) @ targets.T.astype(np.float64)
    np.testing.assert_array_equal(found.index, products[:, :-1].argmax(1))
    np.testing.assert_allclose(found.similarity, products.max(1), atol=1e-6)
    assert set(blocks) == {(min(7, n), min(5, m))}  # one shape, one compilation


def test_a_product_with_negative_targets_is_not_that_of_padding(monkeypatch):
    monkeypatch.setattr(privacy, "_TARGETS", 4)
    found = privacy.nearest(privacy.unit(np.ones((2, 3))), privacy.unit(-np.ones((5, 3))))
    np.testing.assert_allclose(found.similarity, -1, atol=1e-6)


def test_products_of_unit_pixels_are_correlations():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 8), np.uint8)
    images[2] = 9
    rows = privacy.unit_pixels(images)
    want = np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1]
    assert rows[0] @ rows[1] == pytest.approx(want, abs=1e-6)
    assert not rows[2].any()  # an image of one value is like nothing


def test_copies_are_flagged_and_images_like_the_held_out_ones_are_not():
    rng = np.random.default_rng(1)
    train, held_out, synthetic = (rng.normal(size=(n, 20)) for n in (500, 400, 60))
    synthetic[5] = train[17]
    synthetic[6] = 3 * (train[18] + 0.01 * rng.normal(size=20))
    rows = [privacy.unit(x) for x in (synthetic, held_out, train)]
    found = privacy.screen(*rows, 1.0)
    assert np.flatnonzero(found.flagged).tolist() == [5, 6]
    assert found.synthetic.index[[5, 6]].tolist() == [17, 18]
    assert found.threshold == pytest.approx(found.maximum)
    assert found.expected == 1 / 401
    lower = privacy.screen(*rows, 0.9)
    assert lower.threshold < found.threshold
    assert lower.maximum == found.maximum
    assert lower.expected == 41 / 401
    assert lower.flagged.sum() > 2


def test_leftovers_are_counted_by_text():
    texts = [
        "Compared to ___, and to ___.",
        "Dr. [**Last Name**] was told at 10:35 AM on 3/14/2012.",
        "XXXX view. <NAME> was seen by Dr. Smith on 2012-03-14.",
        "MRN: 12345; accession 99.",
        "No focal consolidation. A 2.5 x 3 cm mass, ratio 1:2. Dr was not told.",
    ]
    found = privacy.leftovers(texts)
    assert found == {
        "___": 1,
        "[** **]": 1,
        "XXXX": 1,
        "[NAME]": 1,
        "date": 2,
        "time": 1,
        "doctor": 1,
        "record number": 1,
    }
    assert not any(privacy.leftovers([texts[-1], ""]).values())
