"""Losses against what they are written out in float64, and what unknown labels do to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medsyn_jax.core import metrics
from medsyn_jax.objectives import classify


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(12, 3)).astype(np.float32) * 3
    labels = rng.choice([1, 0, -1, -2], size=(12, 3)).astype(np.int8)
    weight = (np.arange(12) < 10).astype(np.float32)
    return logits, labels, weight


def test_policy_maps_uncertain_and_unmentioned_label_by_label():
    labels = jnp.array([[1, 0, -1], [-1, -1, -2], [-2, 1, 0]], jnp.int8)
    uncertain = jnp.array([1, 0, -2], jnp.int8)
    unmentioned = jnp.array([0, -2, 0], jnp.int8)
    got = classify.apply_policy(labels, uncertain, unmentioned)
    # the third label leaves uncertain out, though unmentioned counts as negative
    assert got.tolist() == [[1, 0, -2], [1, 0, 0], [0, 1, 0]]
    assert got.dtype == jnp.int8


def test_multilabel_loss_is_the_mean_over_known_entries(case):
    logits, labels, _ = case
    total, count = 0.0, 0
    for row in range(10):
        for column in range(3):
            if labels[row, column] >= 0:
                p = 1 / (1 + np.exp(-np.float64(logits[row, column])))
                total -= np.log(p if labels[row, column] else 1 - p)
                count += 1
    got = classify.multilabel_loss(*map(jnp.asarray, case))
    assert got == pytest.approx(total / count, rel=1e-6)
    assert 0 < count < 30


def test_multiclass_loss_is_the_mean_over_known_records(case):
    logits, _, weight = case
    classes = np.array([0, 1, 2, -2, 1, 0, 2, 2, -1, 1, 0, 0], np.int32)
    log_p = logits - np.log(np.exp(np.float64(logits)).sum(1, keepdims=True))
    rows = [i for i in range(10) if classes[i] >= 0]
    expected = -np.mean([log_p[i, classes[i]] for i in rows])
    got = classify.multiclass_loss(jnp.asarray(logits), jnp.asarray(classes), jnp.asarray(weight))
    assert got == pytest.approx(expected, rel=1e-6)


def test_what_is_unknown_or_padding_has_no_gradient(case):
    logits, labels, weight = map(jnp.asarray, case)
    gradient = jax.grad(classify.multilabel_loss)(logits, labels, weight)
    counted = (np.asarray(labels) >= 0) & (np.asarray(weight)[:, None] > 0)
    np.testing.assert_array_equal(np.asarray(gradient) != 0, counted)


def test_nothing_known_is_loss_zero_and_gradient_zero():
    logits, weight = jnp.ones((2, 2)), jnp.ones(2)
    unknown = jnp.full((2, 2), -2, jnp.int8)
    value, gradient = jax.value_and_grad(classify.multilabel_loss)(logits, unknown, weight)
    assert value == 0
    assert not gradient.any()
    value, gradient = jax.value_and_grad(classify.multiclass_loss)(
        logits, jnp.full(2, -2, jnp.int32), weight
    )
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("levels", [None, 1])
def test_mean_auroc_is_sklearns_over_the_labels_that_have_both_classes(levels):
    rng = np.random.default_rng(1)
    labels = rng.choice([1, 0, -2], size=(200, 4)).astype(np.int8)
    labels[:, 3] = 0  # no positive: left out of the mean
    scores = rng.normal(size=(200, 4)).astype(np.float32) + np.maximum(labels, 0)
    if levels:
        scores = np.round(scores)
    known = labels >= 0
    expected = [roc_auc_score(labels[k, i], scores[k, i]) for i, k in enumerate(known.T[:3])]
    got = classify.mean_auroc(jnp.asarray(scores), jnp.asarray(labels))
    assert got == pytest.approx(np.mean(expected), abs=1e-6)
    host = [metrics.auroc(scores[:, i], labels[:, i])[0] for i in range(3)]
    assert host == pytest.approx(expected, abs=1e-12)
    assert jnp.isnan(classify.mean_auroc(jnp.asarray(scores), jnp.zeros((200, 4), jnp.int8)))


def test_mean_accuracy_leaves_unknown_classes_out():
    logits = jnp.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 9.0]])
    assert classify.mean_accuracy(logits, jnp.array([0, 1, 1, -2])) == pytest.approx(2 / 3)


def test_scores_of_logits_that_are_not_finite_are_nan():
    labels = jnp.array([[0], [1], [0]], jnp.int8)
    for bad in (jnp.nan, jnp.inf):
        logits = jnp.array([[0.0], [1.0], [bad]])
        assert jnp.isnan(classify.mean_auroc(logits, labels))
        assert jnp.isnan(classify.mean_accuracy(logits, labels[:, 0]))
