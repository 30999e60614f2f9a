"""The forms written for one platform equal the plain ones, in values and in every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.models import kernels
from medsyn_jax.models.layers import BatchNorm, dropout


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same_gradients(ours, plain, *args, atol=2e-5):
    """Both are weighed by the same random numbers, so that no two errors cancel."""
    weight = normal(99, *plain(*args).shape)

    def total(fn):
        return lambda *args: (fn(*args) * weight).sum()

    numbers = tuple(range(len(args)))

    @jax.jit
    def both(*args):
        return [(fn(*args), jax.grad(total(fn), numbers)(*args)) for fn in (ours, plain)]

    (y, grads), (expected, others) = both(*args)
    np.testing.assert_allclose(y, expected, atol=atol, rtol=1e-5)
    for a, b in zip(grads, others, strict=True):
        np.testing.assert_allclose(a, b, atol=atol * max(1.0, float(jnp.abs(b).max())), rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 10), (10, 6)])
def test_matmul(inputs, outputs):
    x, kernel = normal(0, 4, 5, inputs), normal(1, inputs, outputs)
    assert_same_gradients(kernels.matmul, jnp.matmul, x, kernel)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("side", [6, 7])
def test_convolve(size, stride, side):
    x, kernel = normal(0, 2, side, side, 3), normal(1, size, size, 3, 4)
    assert_same_gradients(
        lambda x, k: kernels.convolve(x, k, stride),
        lambda x, k: kernels._convolution(x, k, stride),
        x,
        kernel,
    )


@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 8, 3), (1, 1, 5, 3), (1, 3, 2, 40)])
def test_convolve_by_tiles(shape):
    """The last has so few pixels that the gradient of its kernel is not made of tiles."""
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 4)
    native = functools.partial(kernels._convolution, stride=1)
    assert_same_gradients(kernels._by_tiles, native, x, kernel)


@pytest.mark.parametrize(("elements", "parts"), [(1, 6), (7 * 8 * 4 * 2, 3), (7 * 8 * 4 * 6, 1)])
def test_tiles_of_some_images_at_a_time(monkeypatch, elements, parts):
    """The widest array of an image has 7 x 8 pixels and 4 outputs."""
    monkeypatch.setattr(kernels, "_CHUNK", elements)
    x, kernel = normal(0, 6, 7, 8, 3), normal(1, 3, 3, 3, 4)
    assert len(kernels._chunks(x, kernel)) == parts
    native = functools.partial(kernels._convolution, stride=1)
    assert_same_gradients(kernels._by_tiles, native, x, kernel)


@pytest.mark.parametrize("shape", [(2, 4, 5, 3), (1, 1, 1, 2)])
def test_convolve_doubled(shape):
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[-1], 4)

    def plain(x, kernel):
        return kernels._convolution(jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), kernel, 1)

    assert_same_gradients(kernels.convolve_doubled, plain, x, kernel)


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "stride", "tiled"),
    [
        ((1, 17, 16, 256), 256, jnp.float32, 1, True),
        ((1, 17, 16, 256), 256, jnp.bfloat16, 1, False),
        ((1, 17, 16, 256), 256, jnp.float32, 2, False),
        ((1, 17, 16, 256), 4, jnp.float32, 1, False),
        ((1, 16, 16, 256), 256, jnp.float32, 1, False),
        ((1, 28, 30, 64), 64, jnp.float32, 1, True),
        ((1, 27, 30, 64), 64, jnp.float32, 1, False),
        ((1, 30, 30, 63), 64, jnp.float32, 1, False),
        ((1, 112, 112, 32), 64, jnp.float32, 1, True),
        ((20, 112, 112, 64), 64, jnp.float32, 1, True),  # many images, each of them small
        ((1, 256, 256, 256), 256, jnp.float32, 1, False),
    ],
)
def test_which_convolutions_are_made_of_tiles(shape, outputs, dtype, stride, tiled):
    x, kernel = (jax.ShapeDtypeStruct(s, dtype) for s in (shape, (3, 3, shape[-1], outputs)))
    lowered = jax.jit(lambda x, k: kernels.convolve(x, k, stride)).lower(x, kernel)
    assert ("stablehlo.convolution" not in lowered.as_text()) == tiled


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (1, 7, 9, 2), (1, 1, 2, 1)])
def test_max_pool(shape):
    assert_same_gradients(kernels.max_pool, kernels._max_pool_native, normal(0, *shape))


def test_max_pool_gives_the_gradient_of_equals_to_the_first():
    x = jnp.zeros((1, 4, 4, 1))
    grad = jax.grad(lambda x: kernels.max_pool(x).sum())(x)[0, :, :, 0]
    # Windows start at rows and columns -1 and 1; of a window of equals the first real pixel wins.
    np.testing.assert_array_equal(grad, [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_shortcut", [False, True])
def test_normalize(relu, with_shortcut):
    x, scale, bias = normal(0, 3, 4, 4, 5) * 2 + 1, normal(1, 5), normal(2, 5)
    shortcut = (normal(3, 3, 4, 4, 5),) if with_shortcut else ()

    def ours(x, scale, bias, *shortcut):
        return kernels.normalize(x, scale, bias, (*shortcut, None)[0], 1e-5, relu)[0]

    def plain(x, scale, bias, *shortcut):
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        y = (x - mean) / jnp.sqrt(var + 1e-5) * scale[None, None, None] + bias[None, None, None]
        y = y + shortcut[0] if shortcut else y
        return jax.nn.relu(y) if relu else y

    assert_same_gradients(ours, plain, x, scale, bias, *shortcut, atol=1e-4)


def test_running_statistics_are_the_unbiased_ones_and_evaluation_uses_them():
    norm, x = BatchNorm(3), normal(0, 4, 5, 3) * 3 + 1
    norm(x, train=True)
    np.testing.assert_allclose(norm.mean[...], 0.1 * x.mean((0, 1)), rtol=1e-5)
    expected = 0.9 + 0.1 * np.asarray(x).var((0, 1), ddof=1)
    np.testing.assert_allclose(norm.var[...], expected, rtol=1e-5)
    seen = norm(x, train=False)
    mean, var = (np.asarray(v[...])[None, None] for v in (norm.mean, norm.var))
    np.testing.assert_allclose(seen, (np.asarray(x) - mean) / np.sqrt(var + 1e-5), atol=1e-5)


def test_gelu_is_the_exact_one():
    x = jnp.linspace(-6, 6, 101)
    assert_same_gradients(kernels.gelu, lambda x: jax.nn.gelu(x, approximate=False), x, atol=1e-5)
    assert kernels.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("last", [64, 65])
def test_dropout_keeps_the_mean_and_draws_each_element_by_itself(last):
    x, rate = jnp.ones((400, last)), 0.1
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert set(np.unique(y).round(4)) == {0.0, np.float32(1 / (1 - rate)).round(4)}
    # 400 draws an element: a share beyond .1 +- .08 is five standard deviations away.
    assert np.abs((y == 0).mean(0) - rate).max() < 0.08
    assert abs((y == 0).mean() - rate) < 0.01
    dropped = (y == 0).astype(float) - rate
    half = (last + 1) // 2  # elements that share a random word must not share its decision
    pairs = (dropped[:, : last - half] * dropped[:, half:]).mean()
    assert abs(pairs) < 0.005
    assert dropout(x, rate, None) is x


def test_convolve_few_pixels_of_many_channels():
    x, kernel = normal(0, 1, 2, 3, 5), normal(1, 3, 3, 5, 24)
    assert_same_gradients(
        lambda x, k: kernels.convolve(x, k, 1),
        lambda x, k: kernels._convolution(x, k, 1),
        x,
        kernel,
    )
    lowered = jax.jit(lambda x, k: kernels.convolve(x, k, 1)).lower(x, kernel).as_text()
    assert "convolution" not in lowered
