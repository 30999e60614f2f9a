"""The autoencoder's own promises; its values are compared in test_pipeline_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.models.diffusion.vae import Autoencoder
from medsyn_jax.models.layers import Conv, split


@pytest.mark.parametrize("levels", [1, 3])
def test_sizes(levels):
    """A latent has 2 ** (levels - 1) times fewer rows; grey in, color out if asked."""
    make = lambda: Autoencoder(1, 3, 5, (8,) * levels, 1, groups=4, rngs=nnx.Rngs(0))  # noqa: E731
    x = jax.ShapeDtypeStruct((2, 16, 24, 1), jnp.float32)
    scale = 2 ** (levels - 1)
    mean, logvar = jax.eval_shape(lambda x: make().encode(x), x)
    assert mean.shape == logvar.shape == (2, 16 // scale, 24 // scale, 5)
    assert jax.eval_shape(lambda x: make()(x), x).shape == (2, 16, 24, 3)


def test_log_variance_is_clipped():
    model = Autoencoder(1, 1, 2, (4,), 1, groups=2, rngs=nnx.Rngs(0))
    structure, params, _ = split(model)
    assert params["quant"]["bias"].shape == (4,)
    params["quant"]["bias"] = jnp.array([99.0, -99.0, 99.0, -99.0])
    mean, logvar = nnx.merge(structure, params, {}).encode(jnp.zeros((1, 2, 2, 1)))
    assert mean.max() > 90
    assert mean.min() < -90
    assert logvar.max() == 20
    assert logvar.min() == -30


def test_zeros_after_the_last_row_only():
    """A window of ones counts the pixels under it: fewer on the last row and column alone."""
    layer = Conv(1, 1, 3, 2, edges=(0, 1), rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((3, 3, 1, 1))
    found = layer(jnp.ones((1, 6, 6, 1)))[0, :, :, 0]
    np.testing.assert_array_equal(found, [[9, 9, 6], [9, 9, 6], [6, 6, 4]])
