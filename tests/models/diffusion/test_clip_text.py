"""The text encoder's own promises; its values are compared in test_pipeline_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.models.diffusion.clip_text import ClipText


def test_no_token_sees_a_later_one():
    model = ClipText(20, 8, 2, 2, 12, 9, "quick_gelu", rngs=nnx.Rngs(0))
    run = jax.jit(lambda ids: model(ids))
    ids = np.arange(7, dtype=np.int32)[None]
    other = np.where(np.arange(7) == 4, 19, ids).astype(np.int32)
    a, b = run(ids), run(other)
    np.testing.assert_array_equal(a[:, :4], b[:, :4])
    assert np.abs(a[:, 4:] - b[:, 4:]).max(-1).min() > 1e-4
    np.testing.assert_allclose(run(ids[:, :3]), a[:, :3], atol=1e-6)


def test_settings_that_do_not_fit():
    with pytest.raises(ValueError, match="act 'relu': choose from quick_gelu, gelu"):
        ClipText(20, 8, 1, 2, 12, 9, "relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="the width 8 is no multiple of the 3 heads"):
        ClipText(20, 8, 1, 3, 12, 9, "gelu", rngs=nnx.Rngs(0))


def test_computes_in_bfloat16():
    options = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    model = ClipText(20, 8, 1, 2, 12, 9, "gelu", **options)
    out = jax.eval_shape(model, jax.ShapeDtypeStruct((2, 9), jnp.int32))
    assert (out.shape, out.dtype) == ((2, 9, 8), jnp.bfloat16)
