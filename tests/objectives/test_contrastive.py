import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.objectives.contrastive import contrastive_loss, normalize


def reference(v, t, temperature, wi, wt):
    """Float64, written out with loops from ConVIRT's eqs. 2 to 4."""
    v = [row / np.sqrt((row * row).sum()) for row in v.astype(np.result_type(v, np.float64))]
    t = [row / np.sqrt((row * row).sum()) for row in t.astype(np.float64)]
    total = 0.0
    for i in range(len(v)):
        own = v[i] @ t[i] / temperature
        total += wi * (np.log(sum(np.exp(v[i] @ other / temperature) for other in t)) - own)
        total += wt * (np.log(sum(np.exp(t[i] @ other / temperature) for other in v)) - own)
    return total / len(v)


@pytest.mark.parametrize("settings", [(0.07, 1.0, 1.0), (0.1, 0.75, 0.25)])
def test_value_and_gradient_against_a_float64_loop(settings):
    rng = np.random.default_rng(0)
    v, t = rng.normal(size=(2, 6, 5)).astype(np.float32)
    temperature, wi, wt = settings

    def f(v, t):
        v, t = jnp.asarray(v), jnp.asarray(t)
        return contrastive_loss(v, t, temperature=temperature, image_to_text=wi, text_to_image=wt)[
            0
        ]

    np.testing.assert_allclose(f(v, t), reference(v, t, *settings), rtol=1e-5)
    grad, slopes = np.asarray(jax.grad(f)(v, t), np.float64), np.zeros(v.shape)
    for place in np.ndindex(*v.shape):
        moved = v.astype(complex)  # complex steps: exact to rounding
        moved[place] += 1e-30j
        slopes[place] = reference(moved, t, *settings).imag / 1e-30
    np.testing.assert_allclose(grad, slopes, rtol=1e-5, atol=1e-5 * np.abs(slopes).max())


@pytest.mark.parametrize("rows", [1, 3])
def test_identical_rows_are_at_chance_and_a_batch_of_one_has_no_loss(rows):
    v, t = jnp.ones((rows, 4)), jnp.full((rows, 4), 2.0)
    (loss, _), grads = jax.value_and_grad(
        lambda v, t: contrastive_loss(v, t, temperature=0.1), (0, 1), has_aux=True
    )(v, t)
    np.testing.assert_allclose(loss, 2 * np.log(rows), atol=1e-6)
    for g in grads:
        np.testing.assert_allclose(g, 0, atol=1e-6)


def test_perfect_pairs_hit_and_bfloat16_is_computed_in_float32():
    x = jnp.eye(4, 8, dtype=jnp.bfloat16)
    loss, metrics = contrastive_loss(x, x, temperature=0.01)
    assert loss.dtype == jnp.float32
    assert float(loss) < 1e-6
    assert float(metrics["batch_recall@1"]) == 1.0


def test_a_zero_embedding_gives_a_finite_gradient():
    x = jnp.zeros((2, 3)).at[1].set(1.0)
    grads = jax.grad(lambda x: normalize(x).sum())(x)
    assert bool(jnp.isfinite(grads).all())
