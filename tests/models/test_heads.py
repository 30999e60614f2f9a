"""Projection heads against plain numpy, and the towers that end in them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medsyn_jax.core import optim, tree
from medsyn_jax.models.heads import Head
from medsyn_jax.models.layers import split
from medsyn_jax.models.towers import PairEncoder
from medsyn_jax.train import step as steps
from tests.train import toy

X = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)


def arrays(head):
    return {k: np.asarray(v, np.float64) for k, v in tree.named(split(head)[1]).items()}


def test_a_linear_head_is_one_matrix_and_a_bias():
    head = Head("linear", 7, 3, rngs=nnx.Rngs(0))
    p = arrays(head)
    assert p.keys() == {"last/kernel", "last/bias"}
    want = X @ p["last/kernel"] + p["last/bias"]
    np.testing.assert_allclose(head(jnp.asarray(X), True), want, rtol=1e-5, atol=1e-6)


def test_an_mlp_head_has_a_relu_between_two():
    head = Head("mlp", 7, 3, 6, rngs=nnx.Rngs(0))
    p = arrays(head)
    hidden = X @ p["first/kernel"] + p["first/bias"]
    assert (hidden < 0).any()
    want = np.maximum(hidden, 0) @ p["last/kernel"] + p["last/bias"]
    for train in (True, False):
        np.testing.assert_allclose(head(jnp.asarray(X), train), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_towers_with_this_head_train(kind):
    heads = {**toy.HEADS, "kind": kind}

    def make(rngs):
        return PairEncoder(toy.IMAGE, toy.TEXT, heads, vocab_size=20, rngs=rngs)

    structure, params, stats = split(make(nnx.Rngs(0)))
    assert not [name for name in tree.named(stats) if "head" in name]
    frozen = ("(image|text)/.*",)  # which leaves little to compile
    tx = optim.adamw(params, optax.constant_schedule(1e-2), frozen=frozen)
    state = {"step": jnp.int32(0), "params": params, "stats": stats, "opt": tx.init(params)}
    step = jax.jit(steps.make_step(toy.loss_fn_of(structure), tx, frozen=frozen))
    batch = jax.tree.map(jnp.asarray, toy.batch_of(0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, jax.random.key(0))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    for name, value in tree.named(params).items():
        if "head" in name:
            assert not np.array_equal(value, tree.named(state["params"])[name]), name
