"""The diffusion objectives against their formulas in float64 NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.objectives import diffusion

RNG = np.random.default_rng(0)
X0, NOISE = RNG.normal(size=(2, 3, 2, 2, 1))
ALPHA = np.array([0.99, 0.5, 0.01])


def f32(x):
    return jnp.asarray(x, jnp.float32)


def noised():
    a = ALPHA[:, None, None, None]
    return np.sqrt(a) * X0 + np.sqrt(1 - a) * NOISE


def test_noise_is_added_as_the_schedule_says():
    found = diffusion.add_noise(f32(X0), f32(NOISE), f32(ALPHA))
    np.testing.assert_allclose(found, noised(), rtol=1e-5, atol=1e-6)


def test_x0_can_be_had_back_from_either_target():
    a = ALPHA[:, None, None, None]
    e = diffusion.target(f32(X0), f32(NOISE), f32(ALPHA), "epsilon")
    v = diffusion.target(f32(X0), f32(NOISE), f32(ALPHA), "v_prediction")
    from_e = (noised() - np.sqrt(1 - a) * e) / np.sqrt(a)
    from_v = np.sqrt(a) * noised() - np.sqrt(1 - a) * v
    np.testing.assert_allclose(from_e, X0, atol=1e-5)
    np.testing.assert_allclose(from_v, X0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_weights_make_the_error_that_of_x0_clipped(prediction):
    """Whatever is predicted, weight x error = min(SNR, gamma) x error of x_0."""
    weight = np.asarray(diffusion.snr_weight(f32(ALPHA), 5.0, prediction), np.float64)
    snr = ALPHA / (1 - ALPHA)
    # d(x0)^2 = d(e)^2 / SNR = d(v)^2 (1 - a)
    per_x0 = snr if prediction == "epsilon" else 1 / (1 - ALPHA)
    np.testing.assert_allclose(weight * per_x0, np.minimum(snr, 5.0), rtol=1e-5)


def test_weights_are_finite_at_both_ends_and_one_without_gamma():
    ends = f32([0.0, 1.0])
    for prediction in ("epsilon", "v_prediction"):
        assert np.isfinite(diffusion.snr_weight(ends, 5.0, prediction)).all()
        assert (diffusion.snr_weight(ends, 0.0, prediction) == 1).all()


def test_the_error_is_the_mean_square_of_each_record():
    found = diffusion.denoising_error(f32(X0), f32(NOISE))
    np.testing.assert_allclose(found, ((X0 - NOISE) ** 2).reshape(3, -1).mean(1), rtol=1e-6)
    half = diffusion.denoising_error(jnp.zeros((3, 2, 2, 1), jnp.bfloat16), f32(NOISE))
    assert half.dtype == jnp.float32


def test_the_autoencoder_pays_for_error_and_for_leaving_the_prior():
    mean, logvar = RNG.normal(size=(2, 3, 1, 1, 2))
    kl = -0.5 * (1 + logvar - mean**2 - np.exp(logvar)).mean()
    loss, parts = diffusion.autoencoder_loss(f32(X0), f32(NOISE), f32(mean), f32(logvar), 0.1)
    np.testing.assert_allclose(parts["l1"], np.abs(X0 - NOISE).mean(), rtol=1e-6)
    np.testing.assert_allclose(parts["kl"], kl, rtol=1e-5)
    np.testing.assert_allclose(loss, np.abs(X0 - NOISE).mean() + 0.1 * kl, rtol=1e-6)
    same, _ = diffusion.autoencoder_loss(f32(X0), f32(X0), f32(0 * mean), f32(0 * logvar), 0.1)
    assert same == 0
