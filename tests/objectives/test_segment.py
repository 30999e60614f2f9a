"""The segmentation loss against float64 NumPy, and against torch as MGCA's code writes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.objectives import segment


def drawn(count=3, side=5, scale=4.0, seed=0):
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(size=(count, side, side)).astype(np.float32)
    truth = rng.choice([0.0, 0.3, 1.0], p=[0.6, 0.2, 0.2], size=logits.shape)  # with soft edges
    return logits, truth.astype(np.float32)


def loss_of(logits, truth):
    return segment.loss(segment.sums(jnp.asarray(logits), jnp.asarray(truth)))[0]


def in_float64(x, t):
    x, t = x.astype(np.float64), t.astype(np.float64)
    p = 1 / (1 + np.exp(-x))
    entropy = -t * np.log(p) - (1 - t) * np.log(1 - p)
    focal = (1 / (1 + np.exp(x * (2 * t - 1)))) ** 2 * entropy
    return 10 * focal.mean() - np.log((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))


@pytest.mark.parametrize("scale", [0.1, 4.0])
def test_values_are_those_of_the_formula(scale):
    logits, truth = drawn(scale=scale)
    assert float(loss_of(logits, truth)) == pytest.approx(in_float64(logits, truth), rel=1e-5)


def test_a_batch_without_a_mask_has_a_gradient_that_lowers_its_logits():
    logits, truth = drawn(scale=0.1)[0], np.zeros((3, 5, 5), np.float32)
    assert float(loss_of(logits, truth)) == pytest.approx(in_float64(logits, truth), rel=1e-5)
    assert (np.asarray(jax.grad(loss_of)(jnp.asarray(logits), truth)) > 1e-3).all()


def test_logits_of_any_size_give_finite_values_and_gradients():
    logits, truth = drawn(scale=1e4)
    value, grad = jax.value_and_grad(loss_of)(jnp.asarray(logits), truth)
    assert np.isfinite(value)
    assert np.isfinite(grad).all()


def test_a_right_answer_costs_nothing():
    truth = np.zeros((2, 4, 4), np.float32)
    truth[0, 1:3, 1:3] = 1
    assert float(loss_of(40 * (2 * truth - 1), truth)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parity
def test_values_and_gradients_are_torchs():
    torch = pytest.importorskip("torch")
    logits, truth = drawn(count=8, side=32)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(truth, dtype=torch.float64)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(x, t, reduction="none")
    weight = torch.exp(2 * torch.nn.functional.logsigmoid(-x * (2 * t - 1)))
    p = torch.sigmoid(x)
    dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
    want = 10 * (weight * entropy).mean() - torch.log(dice)
    want.backward()
    value, grad = jax.value_and_grad(loss_of)(jnp.asarray(logits), truth)
    assert float(value) == pytest.approx(want.item(), rel=1e-5)
    bound = 1e-5 * x.grad.abs().max().item()
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=bound)
