"""The convex probe against scikit-learn's LogisticRegression, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from medsyn_jax.core.errors import UserError
from medsyn_jax.train import logistic, probe


def data(n: int, f: int, labels: int, noise: float, seed: int = 0):
    """Features of unequal scales, which are not centred, and scores that are linear in them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, f)) * np.logspace(0, -2, f) + 1
    standard = (x - x.mean(0)) / x.std(0)
    scores = standard @ rng.normal(size=(f, labels)) / f**0.5 + noise * rng.normal(size=(n, labels))
    return x.astype(np.float32), scores


def solved(x, y, c, kind="multilabel", subsets=None, valid=None):
    subsets = np.arange(len(x))[None] if subsets is None else np.asarray(subsets)
    classes = y.shape[1] if y.ndim == 2 else int(y.max()) + 1
    columns, policy = np.arange(classes), np.full(classes, -2, np.int8)
    task = probe.Task(kind, ("",) * classes, columns, policy, policy)
    penalties = np.atleast_1d(c).tolist()
    arguments = {"inverse_penalties": penalties, "where": " here"}
    return logistic.fit_seeds(
        task, (x, y), valid or (x, y), [subsets.astype(np.int32)], **arguments
    )[0]


def theirs(x, y, c):
    """Coefficients for standardised features [f, c'], their scale, and scores [n, c']."""
    scaler = StandardScaler().fit(x.astype(np.float64))
    model = LogisticRegression(C=c, tol=1e-10, max_iter=10000)
    standard = scaler.transform(x.astype(np.float64))
    model.fit(standard[y >= 0], y[y >= 0])
    return model.coef_.T, scaler.scale_[:, None], model.decision_function(standard)


def scores_of(fitted, x):
    return np.asarray(probe.logits(fitted, jnp.asarray(x)))[0]


@pytest.mark.parametrize(
    ("n", "f", "noise", "c"),
    [
        (150, 12, 1.0, 0.01),
        (150, 12, 1.0, 100.0),
        (40, 90, 1.0, 0.01),  # fewer records than features: separable
        (40, 90, 1.0, 1.0),
        (150, 12, 0.0, 10.0),  # separable, more records than features
    ],
)
def test_labels_are_solved_as_by_sklearn_with_unknown_ones_left_out(n, f, noise, c):
    x, scores = data(n, f, 3, noise)
    y = (scores > 0.5).astype(np.int8)
    y[np.random.default_rng(1).random(y.shape) < 0.15] = -2
    y[::11] = -1
    got = solved(x, y, c)
    for i in range(3):
        coefficients, scale, want = theirs(x, y[:, i], c)
        size = np.abs(coefficients).max()
        kernel = got.kernel[0, :, i : i + 1] * scale
        np.testing.assert_allclose(kernel, coefficients, atol=1e-4 * min(size, 1))
        np.testing.assert_allclose(scores_of(got, x)[:, i], want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(("n", "f", "c"), [(150, 12, 0.1), (150, 12, 10.0), (40, 90, 1.0)])
def test_classes_are_solved_as_by_sklearn(n, f, c):
    x, scores = data(n, f, 4, 1.0)
    y = scores.argmax(1).astype(np.int32)
    y[::11] = -2
    got = solved(x, y, c, "multiclass")
    coefficients, scale, want = theirs(x, y, c)
    np.testing.assert_allclose(got.kernel[0] * scale, coefficients, atol=1e-4)
    np.testing.assert_allclose(scores_of(got, x), want, atol=1e-4 * np.abs(want).max())


def test_the_minimum_is_the_same_from_any_start():
    x, scores = data(60, 8, 2, 1.0)
    z = jnp.asarray((x - x.mean(0)) / x.std(0))
    y, ones = (scores > 0).astype(np.float32), jnp.ones((60, 2))
    problem = logistic.Problem("multilabel", ones, jnp.asarray(y), jnp.ones(2, bool))
    spectrum, penalty = (z * z).sum(0), jnp.full(8, 0.1)
    rng = np.random.default_rng(0)
    starts = [np.zeros((8, 2)), *rng.normal(scale=[[[1]], [[10]], [[100]]], size=(3, 8, 2))]
    solve = jax.jit(lambda start: logistic.solve(z, spectrum, problem, penalty, start))
    ends = [np.asarray(solve(jnp.asarray(start, jnp.float32))) for start in starts]
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-5)


def test_orders_paddings_and_other_records_play_no_part():
    x, scores = data(80, 6, 2, 1.0)
    y = (scores > 0).astype(np.int8)
    rows = np.random.default_rng(0).permutation(80)[:30]
    padded = [np.append(rows, [-1, -1]), np.append([-1, -1], rows[::-1]), np.append(rows, [-1, -1])]
    got = solved(x, y, 1.0, subsets=padded, valid=(x, y))
    np.testing.assert_array_equal(got.kernel[0], got.kernel[1])
    np.testing.assert_array_equal(got.kernel[0], got.kernel[2])
    alone = solved(x[rows], y[rows], 1.0, valid=(x, y))
    np.testing.assert_allclose(got.kernel[0], alone.kernel[0], rtol=1e-4, atol=1e-5)


def test_each_label_has_the_penalty_of_its_lowest_validation_loss():
    x, scores = data(60, 40, 2, 0.0)
    scores[:, 1] = np.random.default_rng(3).normal(size=60)  # nothing to be learnt
    y = (scores > 0).astype(np.int8)
    valid = (x[30:], y[30:])
    grid = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]
    rows = np.arange(30)[None]
    got = solved(x, y, grid[::-1], subsets=rows, valid=valid)  # in whatever order
    each = np.stack([solved(x, y, c, subsets=rows, valid=valid).loss[0] for c in grid])
    np.testing.assert_allclose(got.inverse_penalty[0], np.array(grid)[each.argmin(0)])
    np.testing.assert_allclose(got.loss[0], each.min(0), rtol=1e-4)
    assert got.inverse_penalty[0, 0] > got.inverse_penalty[0, 1]


def test_a_label_or_class_that_the_records_lack_leaves_the_others_as_they_are():
    x, scores = data(60, 6, 3, 1.0)
    y = (scores > 0).astype(np.int8)
    whole = solved(x, y, 1.0)
    y[:, 1] = 0
    lacking = solved(x, y, 1.0)
    np.testing.assert_allclose(lacking.kernel[..., [0, 2]], whole.kernel[..., [0, 2]], atol=1e-5)
    assert (np.asarray(lacking.kernel[..., 1]) == 0).all()
    classes = np.where(scores.argmax(1) == 1, -2, scores.argmax(1)).astype(np.int32)
    got = solved(x, classes, 1.0, "multiclass")
    # Two classes with a penalty on both are one label with twice the C.
    two = np.where(classes >= 0, classes == 2, -2).astype(np.int8)
    one = solved(x, two[:, None], 2.0)
    difference = got.kernel[0, :, 2:] - got.kernel[0, :, :1]
    np.testing.assert_allclose(difference, one.kernel[0], rtol=1e-4, atol=1e-5)
    assert np.isfinite(got.kernel).all()
    assert (np.asarray(got.kernel[0, :, 1]) == 0).all()


def test_features_that_are_not_finite_are_refused():
    x, scores = data(30, 4, 1, 1.0)
    x[3, 2] = np.nan
    with pytest.raises(UserError, match="logistic regression here is not finite: the features"):
        solved(x, (scores > 0).astype(np.int8), 1.0)


def test_a_constant_feature_has_no_weight():
    x, scores = data(40, 5, 1, 1.0)
    x[:, 2] = 7
    got = solved(x, (scores > 0).astype(np.int8), 1.0)
    assert got.kernel[0, 2, 0] == 0
