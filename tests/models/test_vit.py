"""The vision transformer: its published size, its values from the formulas, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf, softmax

from medsyn_jax.core import tree
from medsyn_jax.models.layers import split
from medsyn_jax.models.vit import ViT

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 12, 12, 2)), jnp.float32)


def small(**options):
    return ViT(12, 4, 8, 2, 2, 12, 2, **options, rngs=nnx.Rngs(0))


def drawn(shapes):
    """Random parameters, large enough for attention that is far from uniform."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), shapes)


def test_size_of_vit_b_16():
    """timm's vit_base_patch16_224 without its classifier has 85,798,656 parameters."""

    def run(images):
        model = ViT(224, 16, 768, 12, 12, 3072, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        assert model.features == 768
        return split(model)[1], model(images, train=True)

    params, seen = jax.eval_shape(run, jax.ShapeDtypeStruct((5, 224, 224, 3), jnp.float32))
    assert tree.size(params) == 85_798_656
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert [(x.shape, x.dtype) for x in seen] == [
        ((5, 196, 768), jnp.bfloat16),
        ((5, 768), jnp.bfloat16),
        ((5, 12, 196), jnp.float32),
    ]


def reference(p, image, heads=2, size=4, eps=1e-6):
    """One image in float64: states after the final norm, and each layer's weights [heads, t, t]."""

    def norm(x, at):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * at["scale"] + at["bias"]

    def dense(x, at):
        return x @ at["kernel"] + at["bias"]

    tokens = [p["cls"]]
    for i in range(0, image.shape[0], size):
        for j in range(0, image.shape[1], size):
            square = image[i : i + size, j : j + size]
            tokens.append(np.einsum("hwc,hwcf->f", square, p["patches"]["kernel"]))
            tokens[-1] = tokens[-1] + p["patches"]["bias"]
    x, maps = np.stack(tokens) + p["position"]["table"], []
    for number in range(len(p["layers"])):
        at = p["layers"][str(number)]
        y = norm(x, at["attention_norm"])
        qkv = (np.split(dense(y, at[name]), heads, -1) for name in ("query", "key", "value"))
        each = [
            (softmax(q @ k.T / np.sqrt(q.shape[1]), -1), v) for q, k, v in zip(*qkv, strict=True)
        ]
        maps.append(np.stack([weights for weights, _ in each]))
        x = x + dense(np.concatenate([weights @ v for weights, v in each], -1), at["out"])
        y = dense(norm(x, at["mlp_norm"]), at["up"])
        x = x + dense(y * (1 + erf(y / np.sqrt(2))) / 2, at["down"])
    return norm(x, p["norm"]), maps


def test_values():
    structure, params, _ = split(nnx.eval_shape(small))
    assert " at 0x" not in repr(structure)  # the same in every process
    params = drawn(params)
    see = jax.jit(lambda p: nnx.merge(structure, p, {}, copy=True)(IMAGES, train=False))
    seen = see(params)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for i, image in enumerate(np.asarray(IMAGES, np.float64)):
        states, maps = reference(exact, image)
        np.testing.assert_allclose(seen.pooled[i], states[0], atol=1e-4)
        np.testing.assert_allclose(seen.patches[i], states[1:], atol=1e-4)
        np.testing.assert_allclose(seen.cls_attention[i], maps[-1][:, 0, 1:], atol=1e-5)


def test_remat_changes_neither_loss_nor_gradients():
    found = []
    for remat in (False, True):
        structure, params, _ = split(nnx.eval_shape(lambda remat=remat: small(remat=remat)))
        params = drawn(params)

        def loss_fn(params, structure=structure):
            seen = nnx.merge(structure, params, {}, copy=True)(IMAGES, True)
            return sum(jnp.square(x[:, 1]).mean() for x in seen)

        grad = jax.value_and_grad(loss_fn)
        assert ("remat" in str(jax.make_jaxpr(grad)(params))) == remat
        found.append(tree.named(jax.jit(grad)(params)))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert np.any(value) or name.endswith("key/bias")  # which softmax ignores


def test_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="side 12 is no multiple of the patches' 5 pixels"):
        ViT(12, 5, 8, 1, 2, 12, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width 8 is no multiple of the 3 heads"):
        ViT(12, 4, 8, 1, 3, 12, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="is for 12 x 12 pixels, not 12 x 8"):
        nnx.eval_shape(lambda: small()(IMAGES[:, :, :8]))
