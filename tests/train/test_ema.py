"""The average of the parameters against the recurrence written out."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medsyn_jax.train import ema


@pytest.mark.parametrize("decay", [0.0, 0.15, 0.9])
def test_it_follows_the_parameters_after_each_update(decay):
    tx = ema.keep_average(optax.sgd(0.5), decay)
    params, expected = {"w": jnp.array([1.0, -2.0])}, np.array([1.0, -2.0])
    opt, plain = tx.init(params), np.array([1.0, -2.0])
    for n in range(5):
        updates, opt = tx.update({"w": jnp.array([0.2, 0.4])}, opt, params)
        params = optax.apply_updates(params, updates)
        plain = plain - 0.5 * np.array([0.2, 0.4])
        keep = min(decay, (1 + n) / (10 + n))
        expected = keep * expected + (1 - keep) * plain
        np.testing.assert_allclose(params["w"], plain, rtol=1e-6)
        np.testing.assert_allclose(ema.averaged(opt)["w"], expected, rtol=1e-5)
    assert int(opt[1].count) == 5
