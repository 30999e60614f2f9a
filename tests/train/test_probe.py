"""The jitted fit against AdamW written out in numpy, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from medsyn_jax.train import probe

SETTINGS = probe.ProbeSettings(
    kind="multilabel",
    learning_rate=0.02,
    weight_decay=0.1,
    batch_size=64,
    epochs=6,
    patience=10,
    standardize=False,
)
N, F, L, M = 40, 5, 2, 30
KEYS = jax.random.split(jax.random.key(1), 3)


def _replace(**changes) -> probe.ProbeSettings:
    return probe.ProbeSettings(**{**SETTINGS.__dict__, **changes})


def _data(seed: int = 0):
    """Linearly related features and labels: train (n) and validation (m), some labels unknown."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(N + M, F)).astype(np.float32) + 1
    labels = (features @ rng.normal(size=(F, L)) + rng.normal(size=(N + M, L)) > 0).astype(np.int8)
    labels[rng.random(labels.shape) < 0.15] = -2
    return features[:N], labels[:N], features[N:], labels[N:]


def _fit(features, labels, subsets, valid_features, valid_labels, settings=SETTINGS, classes=L):
    subsets = np.atleast_2d(np.asarray(subsets, np.int32))
    keys = KEYS[: len(subsets)]
    arrays = (features, labels, subsets, valid_features, valid_labels)
    got = probe.fit(*map(jnp.asarray, arrays), keys, classes=classes, settings=settings)
    return jax.tree.map(np.asarray, got)


def _slow_fit(features, labels, valid_features, valid_labels, key, settings):
    """Full-batch AdamW in float64: the layer and the validation score after each epoch."""
    start, _ = jax.random.split(key)
    kernel, bias = (np.asarray(a, np.float64) for a in probe._linear(start, F, L))
    first, second = [0.0, 0.0], [0.0, 0.0]
    known, target = labels >= 0, np.maximum(labels, 0)
    history = []
    for t in range(1, settings.epochs + 1):
        error = (1 / (1 + np.exp(-(features @ kernel + bias))) - target) * known / known.sum()
        moved = []
        grads = (features.T @ error, error.sum(0))
        for i, (p, g) in enumerate(zip((kernel, bias), grads, strict=True)):
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            update = (first[i] / (1 - 0.9**t)) / (np.sqrt(second[i] / (1 - 0.999**t)) + 1e-8)
            moved.append(p - settings.learning_rate * (update + settings.weight_decay * p))
        kernel, bias = moved
        logits = valid_features @ kernel + bias
        scores = [
            roc_auc_score(valid_labels[k, i], logits[k, i])
            for i, k in enumerate((valid_labels >= 0).T)
        ]
        history.append((kernel, bias, np.mean(scores)))
    return history


def test_fit_is_adamw_and_keeps_the_best_epoch():
    train_x, train_y, valid_x, valid_y = _data()
    got = _fit(train_x, train_y, np.arange(N), valid_x, valid_y)
    history = _slow_fit(train_x, train_y, valid_x, valid_y, KEYS[0], SETTINGS)
    scores = [score for *_, score in history]
    best = int(np.argmax(scores))
    assert got.best_epoch[0] == best + 1
    assert got.epochs[0] == SETTINGS.epochs
    assert got.score[0] == pytest.approx(scores[best], abs=1e-6)
    np.testing.assert_allclose(got.kernel[0], history[best][0], atol=2e-6)
    np.testing.assert_allclose(got.bias[0], history[best][1], atol=2e-6)
    assert len(set(scores)) > 2  # the choice is one


def test_early_stopping_counts_epochs_without_a_better_score():
    train_x, _, valid_x, _ = _data()
    clear = (train_x.sum(1, keepdims=True) > F).astype(np.int8).repeat(L, 1)
    against = (valid_x.sum(1, keepdims=True) < F).astype(np.int8).repeat(L, 1)
    settings = _replace(epochs=60, patience=4)
    got = _fit(train_x, clear, np.arange(N), valid_x, against, settings)
    assert got.epochs[0] == got.best_epoch[0] + 4 < 60


def test_padding_of_a_shorter_subset_changes_nothing():
    train_x, train_y, valid_x, valid_y = _data()
    rows = np.array([3, 9, 12, 20, 21, 25, 30, 31])
    history = _slow_fit(train_x[rows], train_y[rows], valid_x, valid_y, KEYS[0], SETTINGS)
    within = np.full(N, -1)
    within[::5] = rows  # padding inside the only batch
    got = _fit(train_x, train_y, within, valid_x, valid_y)
    np.testing.assert_allclose(got.kernel[0], history[got.best_epoch[0] - 1][0], atol=2e-6)
    whole = np.full((3, 20), -1)
    whole[:, 2:18:2] = rows  # batches of 8: the second and third hold padding only
    got = _fit(train_x, train_y, whole, valid_x, valid_y, _replace(batch_size=8))
    np.testing.assert_allclose(got.kernel[0], history[got.best_epoch[0] - 1][0], atol=2e-6)


def test_seeds_differ_and_do_not_see_each_other():
    data = _data()
    subsets = np.random.default_rng(0).permuted(np.tile(np.arange(N), (5, 1)), axis=1)[:, :20]
    settings = _replace(batch_size=8)
    first = _fit(*data[:2], subsets[:3], *data[2:], settings)
    second = _fit(*data[:2], subsets[[0, 3, 4]], *data[2:], settings)
    np.testing.assert_array_equal(first.kernel[0], second.kernel[0])
    assert len(np.unique(first.bias[:, 0])) == 3
    same = _fit(*data[:2], subsets[[0, 0, 0]], *data[2:], settings)
    assert len(np.unique(same.bias[:, 0])) == 3  # initialization and order differ as well


def test_only_the_records_of_the_subset_teach():
    train_x, train_y, valid_x, valid_y = _data()
    subsets = np.tile(np.arange(0, N, 2), (3, 1))
    settings = _replace(standardize=True, batch_size=8)
    first = _fit(train_x, train_y, subsets, valid_x, valid_y, settings)
    train_x[1::2] = 1e3
    train_y[1::2] = 1 - train_y[1::2]
    second = _fit(train_x, train_y, subsets, valid_x, valid_y, settings)
    np.testing.assert_array_equal(first.kernel, second.kernel)


def test_a_standardized_fit_does_not_depend_on_the_scale_of_the_features():
    train_x, train_y, valid_x, valid_y = _data()
    scale, shift = np.float32([1, 10, 0.1, 3, 50]), np.float32([0, 5, 1, -20, 3])
    train_x[:, 4] = 2.5  # a dead feature has no variance to divide by
    for standardize in (True, False):
        settings = _replace(standardize=standardize, epochs=12)
        logits = []
        for a, b in ((np.ones(F, np.float32), np.zeros(F, np.float32)), (scale, shift)):
            got = _fit(train_x * a + b, train_y, np.arange(N), valid_x * a + b, valid_y, settings)
            layer = probe.Probe(*map(jnp.asarray, got))
            logits.append(np.asarray(probe.logits(layer, jnp.asarray(valid_x * a + b))))
        assert (np.abs(logits[0] - logits[1]).max() < 1e-3) == standardize


def test_multiclass_learns_separable_classes():
    rng, classes = np.random.default_rng(0), 3
    labels = rng.integers(0, classes, 90).astype(np.int32)
    features = (rng.normal(size=(90, F)) + 6 * np.eye(classes, F)[labels]).astype(np.float32)
    labels[:5] = -2  # unknown class
    settings = _replace(kind="multiclass", epochs=80, learning_rate=0.05, batch_size=16)
    got = _fit(
        features, labels, np.arange(60), features[60:], labels[60:], settings, classes=classes
    )
    assert got.score[0] == 1
    logits = probe.logits(probe.Probe(*map(jnp.asarray, got)), jnp.asarray(features[5:60]))
    assert (np.asarray(logits)[0].argmax(1) == labels[5:60]).mean() > 0.95


def test_two_classes_are_scored_by_auroc():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 2)).astype(np.float32)
    labels = rng.integers(0, 2, 50).astype(np.int8)
    got = probe.score(jnp.asarray(logits), jnp.asarray(labels), "multiclass")
    expected = roc_auc_score(labels, logits[:, 1] - logits[:, 0])
    assert got == pytest.approx(expected, abs=1e-6)


def test_a_fit_that_diverges_says_so_in_its_score():
    train_x, train_y, valid_x, valid_y = _data()
    train_x[0] = np.inf
    got = _fit(train_x, train_y, np.arange(N), valid_x, valid_y)
    assert got.score[0] == -np.inf
    assert got.best_epoch[0] == 0
