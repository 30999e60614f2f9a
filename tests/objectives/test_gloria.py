"""GLoRIA's losses against their formulas, written as loops over float64 (complex for gradients)."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medsyn_jax.objectives import gloria

TAUS = {"tau1": 4.0, "tau2": 5.0}


def draw(b, r, w, d, lengths, seed=0):
    rng = np.random.default_rng(seed)
    regions, words = rng.normal(size=(b, r, d)), rng.normal(size=(b, w, d))
    mask = np.arange(w) < np.array(lengths)[:, None]
    return regions / d**0.25, words / d**0.25, mask


def single(*arrays):
    return tuple(jnp.asarray(a, jnp.float32) if a.dtype != bool else jnp.asarray(a) for a in arrays)


def softmax(x):
    e = np.exp(x - x.real.max())
    return e / e.sum()


def pair(v, t, tau1, tau2):
    """S of one image and the real words of one report, word by word."""
    s = v @ t.T
    a = np.stack([softmax(row) for row in s])
    total = 0.0
    for k, word in enumerate(t):
        c = sum(b * region for b, region in zip(softmax(tau1 * a[:, k]), v, strict=True))
        cos = (word * c).sum() / np.sqrt((word * word).sum() * (c * c).sum())
        total += np.exp(tau2 * cos)
    return np.log(total)


def similarities(regions, words, mask, tau1, tau2):
    rows = [[pair(v, t[m], tau1, tau2) for t, m in zip(words, mask, strict=True)] for v in regions]
    return np.array(rows)


def entropies(logits):
    """Both cross-entropies against the diagonal."""
    own = range(len(logits))
    return [-np.mean([np.log(softmax(x[i])[i]) for i in own]) for x in (logits, logits.T)]


def reference_loss(regions, words, mask, tau3=10.0):
    return sum(entropies(tau3 * similarities(regions, words, mask, **TAUS)))


def slopes(f, x):
    """The gradient of f at x by complex steps: exact to rounding."""
    found = np.zeros(x.shape)
    for place in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[place] += 1e-30j
        found[place] = f(moved).imag / 1e-30
    return found


@pytest.fixture(params=["by image", "by image, in blocks", "by report", "one by one", "on TPU"])
def order(request, monkeypatch):
    """Every way to compute the pairs, whatever the platform; 5 reports in blocks of 3."""
    if request.param == "by image":
        return {}
    if request.param == "by image, in blocks":
        monkeypatch.setattr(gloria, "_ARRAYS", 2**20 // (4 * 6 * 5 * 3))
        return {"memory_mib": 1}
    branch = "tpu" if request.param == "on TPU" else "default"
    monkeypatch.setattr(
        gloria.lax, "platform_dependent", lambda *args, **branches: branches[branch](*args)
    )
    kernels = gloria.gloria_tpu.products
    monkeypatch.setattr(gloria.gloria_tpu, "products", lambda *args: kernels(*args[:4], True))
    if request.param == "on TPU":
        return {"mesh": Mesh(np.array(jax.devices()[:1]), ("data",))}
    return {"memory_mib": 0 if request.param == "one by one" else 512}


def assert_near(found, expected, rtol=1e-5):
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_similarity_and_its_gradient(order):
    """Three images and five reports of 5, 1, 3, 2 and 4 words."""
    regions, words, mask = draw(5, 6, 5, 7, (5, 1, 3, 2, 4))
    regions = regions[:3]
    find = functools.partial(gloria.local_similarity, **order, **TAUS)
    assert_near(find(*single(regions, words, mask)), similarities(regions, words, mask, **TAUS))
    weight = np.random.default_rng(1).normal(size=(3, 5))

    def total(regions, words):
        return (weight * similarities(regions, words, mask, **TAUS)).sum()

    v, t, m = single(regions, words, mask)
    found = jax.grad(lambda v, t: (find(v, t, m) * weight.astype("f")).sum(), (0, 1))(v, t)
    assert_near(found[0], slopes(lambda x: total(x, words), regions))
    assert_near(found[1], slopes(lambda x: total(regions, x), words))


def test_local_loss_and_its_gradient():
    regions, words, mask = draw(3, 4, 4, 5, (4, 1, 2))
    v, t, m = single(regions, words, mask)
    (loss, parts), found = jax.value_and_grad(gloria.local_loss, (0, 1), has_aux=True)(v, t, m)
    assert_near(loss, reference_loss(regions, words, mask))
    assert_near(sum(parts.values()), loss)
    assert_near(found[0], slopes(lambda x: reference_loss(x, words, mask), regions))
    assert_near(found[1], slopes(lambda x: reference_loss(regions, x, mask), words))


def test_global_loss_and_its_gradient():
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 5, 6))

    def reference(image, text):
        rows = [
            [(v * t).sum() / np.sqrt((v * v).sum() * (t * t).sum()) for t in text] for v in image
        ]
        return sum(entropies(10 * np.array(rows)))

    v, t = single(image, text)
    (loss, _), found = jax.value_and_grad(gloria.global_loss, (0, 1), has_aux=True)(v, t)
    assert_near(loss, reference(image, text))
    assert_near(found[0], slopes(lambda x: reference(x, text), image))
    assert_near(found[1], slopes(lambda x: reference(image, x), text))


def test_a_batch_of_one_has_no_loss():
    v, t, m = single(*draw(1, 4, 3, 5, (2,)))
    (loss, _), grads = jax.value_and_grad(gloria.local_loss, (0, 1), has_aux=True)(v, t, m)
    assert float(loss) == 0
    assert all(not np.any(g) for g in grads)


def test_identical_rows_are_at_chance():
    v, t, m = (jnp.repeat(x, 4, 0) for x in single(*draw(1, 4, 3, 5, (2,))))
    assert_near(gloria.local_loss(v, t, m)[0], 2 * np.log(4))


@pytest.mark.parametrize("what", ["no words", "constant regions", "no regions"])
def test_a_degenerate_record_gives_finite_gradients(what):
    regions, words, mask = draw(3, 4, 3, 5, (3, 2, 1))
    if what == "no words":
        mask[1] = False
    regions[1] = {"constant regions": 1.0, "no regions": 0.0}.get(what, regions[1])
    v, t, m = single(regions, words, mask)
    (loss, _), grads = jax.value_and_grad(gloria.local_loss, (0, 1), has_aux=True)(v, t, m)
    assert np.isfinite(loss)
    assert all(np.isfinite(g).all() for g in grads)
    if what == "no words":
        assert not gloria.local_similarity(v, t, m)[:, 1].any()
        assert not grads[1][1].any()


def test_padding_changes_nothing():
    regions, words, mask = draw(3, 4, 6, 5, (4, 2, 1))
    v, t, m = single(regions, words, mask)
    other = jnp.where(m[..., None], t, 7.0)
    a, b = (gloria.local_similarity(v, x, m) for x in (t, other))
    assert_near(a, b, rtol=1e-6)
    assert_near(a, gloria.local_similarity(v, t[:, :4], m[:, :4]), rtol=1e-6)


def test_a_feature_that_is_not_a_number_is_seen_in_the_loss():
    v, t, m = single(*draw(3, 4, 3, 5, (3, 2, 1)))
    assert np.isnan(gloria.local_loss(v.at[0, 0, 0].set(jnp.nan), t, m)[0])


@pytest.mark.parametrize("name", ["tau1", "tau2", "tau3"])
def test_a_temperature_is_above_0(name):
    v, t, m = single(*draw(2, 4, 3, 5, (3, 2)))
    with pytest.raises(ValueError, match=f"{name}: 0.0: give a number above 0"):
        gloria.local_loss(v, t, m, **{name: 0.0})


def test_what_the_devices_do_not_divide_is_refused():
    v, t, m = single(*draw(6, 4, 3, 5, (3,) * 6))
    mesh = Mesh(np.array(jax.devices()), ("data",))
    with pytest.raises(ValueError, match="6 images and 6 reports do not divide over 8 devices"):
        gloria.local_loss(v, t, m, mesh=mesh)


def test_tau1_has_a_limit():
    v, t, m = single(*draw(2, 4, 3, 5, (3, 2)))
    assert np.isfinite(gloria.local_loss(v, t, m, tau1=float(gloria.TAU1_MOST))[0])
    with pytest.raises(ValueError, match=r"tau1: 400\.0: give a number up to 150"):
        gloria.local_loss(v, t, m, tau1=400.0)


def test_bfloat16_is_near_and_bounded(order):
    v, t, m = single(*draw(3, 16, 5, 8, (5, 3, 1)))
    find = functools.partial(gloria.local_similarity, **order)
    found = find(v.astype(jnp.bfloat16), t.astype(jnp.bfloat16), m)
    np.testing.assert_allclose(found, find(v, t, m), atol=0.05)
    # Regions whose mean is nothing: what rounding leaves of c_w has any length.
    v = 0.01 * (v - v.mean(1, keepdims=True))
    find = functools.partial(find, v.astype(jnp.bfloat16), word_mask=m)
    scores, back = jax.vjp(find, t.astype(jnp.bfloat16))
    assert float(scores.max()) <= 5.0 + np.log(5) + 1e-5
    assert np.isfinite(back(jnp.ones_like(scores))[0].astype(jnp.float32)).all()


def test_eight_devices_equal_one_and_words_travel_once():
    args = single(*draw(16, 6, 5, 8, tuple(range(1, 6)) * 3 + (5,)))
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def loss(v, t, m, mesh=None):
        return gloria.local_loss(v, t, m, mesh=mesh)[0]

    f = jax.jit(jax.value_and_grad(loss, (0, 1)), static_argnums=3)
    one, grads = f(*args)
    rows = NamedSharding(mesh, P("data"))
    compiled = f.lower(*jax.device_put(args, rows), mesh).compile()
    many, grads8 = compiled(*jax.device_put(args, rows))
    assert_near(many, one)
    for a, b in zip(grads8, grads, strict=True):
        assert_near(a, b)
    collectives = re.findall(r" (all-gather|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert collectives.count("reduce-scatter") == 1
    assert collectives.count("all-gather") <= 3  # words, mask, scores


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("sound", [True, False])
def test_a_tpu_gets_the_kernels_only_where_they_compute_the_same(dtype, sound, monkeypatch):
    """The comparison is that of a TPU, with the kernels in interpreter mode."""
    lines, products = [], gloria.gloria_tpu.products

    def interpreted(*args):
        dot, quad = products(*args[:4], True)
        return dot, quad if sound else 1.3 * quad

    monkeypatch.setattr(gloria.gloria_tpu, "products", interpreted)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(gloria.pallas, "_verdicts", {})
    monkeypatch.setattr(gloria.pallas, "_reported", set())
    monkeypatch.setattr(gloria.pallas.log, "say", lines.append)
    v, t, m = single(*draw(3, 16, 5, 24, (5, 3, 1)))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    find = functools.partial(gloria.local_similarity, mesh=mesh)
    traced = jax.jit(find).trace(v.astype(dtype), t.astype(dtype), m)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert len(lines) == (not sound)
    # XLA's path goes through blocks of reports in a loop of its own; the kernels over a grid.
    assert "local loss" in "".join(lines) or sound
    assert ("pallas" in str(traced.jaxpr)) == sound, lowered
