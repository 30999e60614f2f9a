"""The U-Net's own promises; its values are compared with diffusers' in test_pipeline_parity.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.models.diffusion.unet import UNet, embed_time
from medsyn_jax.models.layers import GroupNorm, split


@functools.cache
def network(**options):
    """Structure and random parameters of two levels of one layer, the outer one attentive."""
    kind = {"down": (True, False), "up": (False, True), "context_width": 6, "groups": 4}
    make = lambda: UNet(4, 4, (8, 16), 1, (2, 4), rngs=nnx.Rngs(0), **kind, **options)  # noqa: E731
    structure, params, _ = split(nnx.eval_shape(make))
    rng = np.random.default_rng(0)
    return structure, jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype("f"), params)


def batch(size=(6, 8)):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, *size, 4)).astype("f")
    return jnp.asarray(x), jnp.array([7, 800]), jnp.asarray(rng.standard_normal((2, 3, 6)), "f")


def call(method, *args, **options):
    structure, params = network(**options)

    @jax.jit
    def run(params, *arrays):
        model = nnx.merge(structure, params, {}, copy=True)
        return getattr(model, method)(*arrays, *(a for a in args if isinstance(a, int)))

    return run(params, *(a for a in args if not isinstance(a, int)))


@pytest.mark.parametrize("branch", [0, 1])
def test_shallow_goes_on_from_deep(branch):
    """At the time of the deep feature both agree; later only what is shallow has changed."""
    x, t, text = batch()
    out, deep = call("full", x, t, text, branch)
    assert deep.shape == (2, 6, 8, 16 if branch == 1 else 8)
    same = call("shallow", x, t, text, deep, branch)
    np.testing.assert_allclose(same, out, rtol=1e-5, atol=1e-5)
    later = call("shallow", x, t - 5, text, deep, branch)
    exact = call("full", x, t - 5, text, branch)[0]
    assert np.abs(later - out).max() > 1e-3
    assert np.abs(later - exact).max() > 1e-3


def test_the_outermost_level_bounds_the_branch():
    x, t, text = batch()
    with pytest.raises(ValueError, match="branch 2: the outermost level has 1 layers"):
        call("full", x, t, text, 2)


def test_bfloat16_stays_near_float32():
    """Computed in bf16 from float32 parameters: a few of its 8 bits are lost on the way."""
    x, t, text = batch()
    wide, narrow = call("__call__", x, t, text), call("__call__", x, t, text, dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    narrow = narrow.astype(jnp.float32)
    assert jnp.linalg.norm(narrow - wide) < 0.05 * jnp.linalg.norm(wide)


def test_times_are_told_apart_in_float32():
    """999 and 998.5 differ at the highest frequency by what float32 gives, not bf16."""
    a, b = np.asarray(embed_time(jnp.array([999.0, 998.5]), 8, True, 0.0))
    np.testing.assert_allclose(a[0], np.cos(999.0), atol=1e-4)
    np.testing.assert_allclose(b[4], np.sin(998.5), atol=1e-4)


def test_sizes_that_do_not_divide():
    kind = {"down": (True,), "up": (True,), "context_width": 6, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="8 features do not divide into 3 groups"):
        UNet(4, 4, (8,), 1, (2,), groups=3, **kind)
    with pytest.raises(ValueError, match="the width 8 is no multiple of the 3 heads"):
        UNet(4, 4, (8,), 1, (3,), groups=4, **kind)


def test_group_norm():
    """Every group of an image has mean 0 and variance 1, also far from zero and in bf16."""
    x = jnp.asarray(np.random.default_rng(0).normal(300, 2, (2, 5, 7, 6)), jnp.bfloat16)
    y = GroupNorm(6, 3, eps=1e-6, dtype=jnp.float32)(x).reshape(2, 35, 3, 2)
    rounding = 300 * np.finfo(np.float32).eps / 2  # of the mean, over the standard deviation
    np.testing.assert_allclose(y.mean((1, 3)), 0, atol=float(rounding))
    np.testing.assert_allclose(y.var((1, 3)), 1, atol=1e-4)
