"""Losses, probes and views are asked for in fp32: TPUs would multiply in bf16, GPUs in TF32.

A CPU multiplies in fp32 whatever is asked, so this looks at the programs, not at values.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from medsyn_jax.data.images import transforms
from medsyn_jax.objectives import gloria, mgca
from medsyn_jax.objectives.contrastive import contrastive_loss
from medsyn_jax.train import logistic, probe

KEY = jax.random.key(0)
VIEW = {"size": 8, "area": (0.5, 1.0), "blur": (0.1, 2.0)}


def products(jaxpr):
    """The precision of every matrix product of a program and of those within it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.params["precision"]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def probe_fit(features, valid):
    settings = probe.ProbeSettings(0.1, 0.0, 2, 2, "multilabel", 4, True)
    labels, subsets = jnp.zeros((8, 2), jnp.int8), jnp.arange(8)[None]
    arrays = (features, labels, subsets, valid, labels, KEY[None])
    return probe.fit(*arrays, classes=2, settings=settings)


def logistic_fit(features, valid):
    labels, subsets = jnp.zeros((8, 2), jnp.int8), (jnp.arange(8)[None],)
    arrays = (features, labels, subsets, valid, labels, jnp.ones(2))
    return logistic.fit(*arrays, kind="multilabel", classes=2)


def probe_logits(kernel, features):
    ones = jnp.ones(1)
    fitted = probe.Probe(kernel, jnp.ones((1, 2)), ones, jnp.int32(ones), jnp.int32(ones))
    return probe.logits(fitted, features)


PAIRS, WORDS, REGIONS = jnp.ones((4, 3)), jnp.ones((4, 5, 3)), jnp.ones((4, 6, 3))
TAUS = {"temperature": 0.07, "token_temperature": 0.1, "prototype_temperature": 0.2}
TAUS |= {"epsilon": 0.05, "iterations": 3, "mask_padding": True}
MGCA = [PAIRS, PAIRS, WORDS, REGIONS, jnp.ones((4, 5), bool)]
MGCA += [jnp.ones((4, 5)) / 5, jnp.ones((4, 6)) / 6, jnp.ones((7, 3))]
CASES = {
    "contrastive": (
        jax.grad(lambda v, t: contrastive_loss(v, t, temperature=0.1)[0], (0, 1)),
        [jnp.ones((4, 3)), jnp.ones((4, 3))],
    ),
    "gloria": (
        jax.grad(lambda v, t, m: gloria.local_loss(v, t, m)[0], (0, 1)),
        [REGIONS, WORDS, jnp.ones((4, 5), bool)],
    ),
    "mgca": (jax.grad(lambda *x: mgca.mgca_loss(*x, **TAUS)[0], (0, 1, 2, 3)), MGCA),
    "views": (lambda x: transforms.augment(KEY, x, **VIEW), [jnp.ones((2, 16, 16), jnp.uint8)]),
    "fit": (probe_fit, [jnp.ones((8, 3)), jnp.ones((8, 3))]),
    "logistic": (logistic_fit, [jnp.ones((8, 3)), jnp.ones((8, 3))]),
    "logits": (probe_logits, [jnp.ones((1, 3, 2)), jnp.ones((4, 3))]),
}


@pytest.mark.parametrize("name", CASES)
def test_every_matrix_product_is_asked_for_in_fp32(name):
    function, inputs = CASES[name]
    found = list(products(jax.make_jaxpr(function)(*inputs).jaxpr))
    assert len(found) >= 1
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}
