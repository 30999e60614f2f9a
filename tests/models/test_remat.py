"""Activations that are recomputed in the backward pass change neither loss nor gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medsyn_jax.core import tree
from medsyn_jax.models.bert import Bert
from medsyn_jax.models.layers import split, statistics
from medsyn_jax.models.resnet import ResNet

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.normal(size=(4, 32, 32, 1)), jnp.float32)
IDS = jnp.asarray(RNG.integers(20, size=(4, 6)), jnp.int32)
MASK = jnp.asarray(np.arange(6) < RNG.integers(2, 7, size=(4, 1)))


def resnet(remat):
    return ResNet((1, 1, 1, 1), 4, "basic", 1, "3x3", remat=remat, rngs=nnx.Rngs(0))


def bert(remat):
    return Bert(20, 16, 2, 2, 32, 8, dropout=0.3, remat=remat, rngs=nnx.Rngs(0))


def see(model):
    return model(IMAGES, train=True).layer4


def read(model):
    return model(IDS, MASK, key=jax.random.key(1))[-1]  # and has to drop out the same again


@pytest.mark.parametrize(("make", "call"), [(resnet, see), (bert, read)])
def test_remat_changes_neither_loss_nor_gradients(make, call):
    found = []
    for remat in (False, True):
        structure, params, stats = split(make(remat))

        def loss_fn(params, structure=structure, stats=stats):
            model = nnx.merge(structure, params, stats, copy=True)
            return jnp.square(call(model)[:, 1]).mean(), statistics(model)

        grad = jax.value_and_grad(loss_fn, has_aux=True)
        assert ("remat" in str(jax.make_jaxpr(grad)(params))) == remat
        (loss, stats), grads = jax.jit(grad)(params)
        found.append(tree.named({"loss": loss, "stats": stats, "grads": grads}))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
