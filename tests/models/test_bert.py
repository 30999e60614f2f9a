"""Where BERT's [CLS] looks: the weights that its last layer computes, without their dropout."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import softmax

from medsyn_jax.models.bert import Bert
from medsyn_jax.models.layers import split

RNG = np.random.default_rng(0)
IDS = jnp.asarray(RNG.integers(20, size=(3, 6)), jnp.int32)
MASK = jnp.arange(6)[None] < jnp.array([[6], [1], [4]])


def test_cls_attention():
    model = nnx.eval_shape(lambda: Bert(20, 8, 2, 2, 12, 6, dropout=0.5, rngs=nnx.Rngs(0)))
    structure, params, _ = split(model)  # random ones, for attention that is far from uniform
    params = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), params)

    def run(params, key):
        model = nnx.merge(structure, params, {}, copy=True)
        states = model(IDS, MASK, key)
        return states, model.cls_attention(states, MASK)

    states, found = jax.jit(run)(params, jax.random.key(0))
    x = np.asarray(states[-2], np.float64)
    last = jax.tree.map(np.asarray, params["layers"]["1"])
    query = (x[:, 0] @ last["query"]["kernel"] + last["query"]["bias"]).reshape(3, 2, 4)
    key = (x @ last["key"]["kernel"] + last["key"]["bias"]).reshape(3, 6, 2, 4)
    logits = np.einsum("bnd,btnd->bnt", query, key) / 2
    expected = softmax(np.where(np.asarray(MASK)[:, None], logits, -np.inf), -1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == jnp.float32
    assert np.ptp(expected[0], -1).min() > 0.1
