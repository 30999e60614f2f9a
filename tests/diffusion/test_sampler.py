import functools
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core.mesh import batch_sharding, make_mesh
from medsyn_jax.diffusion.sampler import plan, record_noise, sample
from medsyn_jax.diffusion.schedule import make_table
from tests.diffusion import toy

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "samplers.npz"
OPTIONS = ("guidance", "interval", "rescale", "cache_every")
denoise = functools.partial(toy.denoise, jnp)
draw = jax.jit(sample, static_argnums=0, static_argnames=OPTIONS)
MIDDLE = (0.5, 5.0)


def full(x, t, context):
    deep = {"slow": jnp.cos(2 * x + context.mean(1)[:, None, None])}
    return shallow(x, t, context, deep), deep


def shallow(x, t, context, deep):
    return denoise(x, t, context) + 0.3 * deep["slow"]


@pytest.mark.parametrize(("sampler", "case"), toy.GOLDEN)
def test_ends_where_diffusers_does(sampler, case):
    table = make_table(sampler, toy.CASES[case], toy.GOLDEN_STEPS)
    latents, bad = draw(denoise, *toy.arrays(), table)
    with np.load(GOLDEN) as golden:
        wanted = golden[f"{sampler}/{case}"]
    assert np.abs(np.asarray(latents) - wanted).max() < toy.limit(sampler, case) * wanted.std()
    assert (np.asarray(bad) == -1).all()


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
@pytest.mark.parametrize("cache_every", [1, 3])
@pytest.mark.parametrize(
    ("guidance", "interval", "rescale"),
    [(1.0, MIDDLE, 0.0), (4.0, MIDDLE, 0.7), (4.0, (0.0, np.inf), 0.0)],
)
def test_against_a_plain_loop(sampler, cache_every, guidance, interval, rescale):
    """Guidance, interval, rescale and cache, written out with the two halves kept apart."""
    noise, context, uncond = map(jnp.asarray, toy.arrays())
    uncond = jnp.broadcast_to(uncond + 0.1, context.shape)
    table = make_table(sampler, toy.SD15, 12)
    x, last, held, sets_in = noise, 0 * noise, {}, True
    history = [0 * noise] * (table.steps.mix.shape[-1] - 3)
    for i in range(12):
        step = jax.tree.map(lambda a: jnp.asarray(a[i]), table.steps)  # noqa: B023
        t = jnp.full(len(x), step.time)
        guided = guidance != 1 and interval[0] < step.sigma <= interval[1]
        refresh = i % cache_every == 0 or (guided and sets_in)
        sets_in = not guided

        def output(half, states, x=x, step=step, t=t, refresh=refresh):
            if refresh:
                out, held[half] = full(step.scale * x, t, states)
                return out
            return shallow(step.scale * x, t, states, held[half])

        out = cond = output("cond", context)
        if guided:
            out = output("uncond", uncond)
            out = out + guidance * (cond - out)
            ratio = cond.std((1, 2, 3)) / out.std((1, 2, 3))
            out *= (rescale * ratio + 1 - rescale)[:, None, None, None]
        entries = [step.entry[0] * x + step.entry[1] * out, *history]
        parts = jnp.stack([x, last, *entries])
        x, last = jnp.einsum("rk,kbhwc->rbhwc", step.mix, parts, precision="highest")
        history = entries[:-1]

    options = {"guidance": guidance, "interval": interval, "rescale": rescale}
    got, _ = draw(
        (full, shallow), noise, context, uncond, table, **options, cache_every=cache_every
    )
    assert float(jnp.abs(got - x).max() / x.std()) < 2e-5


def test_a_step_costs_no_more_than_it_must():
    """Calls, counted as they run: 2 b records inside the interval only, b elsewhere and without."""
    calls = Counter()

    def count(kind, x):
        jax.debug.callback(lambda: calls.update([(kind, len(x))]))

    def counted(x, t, context):
        count("full", x)
        return full(x, t, context)

    def counted_shallow(x, t, context, deep):
        count("shallow", x)
        return shallow(x, t, context, deep)

    table = make_table("pndm", toy.SD15, 20)
    guided, _ = plan(table.steps.sigma, guidance=3.0, interval=MIDDLE, cache_every=1)
    inside = int(guided.sum())
    assert inside == sum(0.5 < s <= 5 for s in table.steps.sigma)
    pair = (counted, counted_shallow)
    for options, wanted in [
        ({}, {("full", 3): 21}),
        ({"guidance": 3.0}, {("full", 6): 21}),
        ({"guidance": 3.0, "interval": MIDDLE}, {("full", 6): inside, ("full", 3): 21 - inside}),
        ({"cache_every": 4}, {("full", 3): 6, ("shallow", 3): 15}),
    ]:
        calls.clear()
        jax.block_until_ready(draw(pair, *toy.arrays(), table, **options))
        jax.effects_barrier()
        assert calls == wanted


def test_guidance_of_one_is_no_guidance():
    noise, context, _ = toy.arrays()
    table = make_table("dpm++2m", toy.SD15, 6)
    alone, _ = draw(denoise, noise, context, None, table)
    as_uncond, _ = draw(denoise, noise, context, context, table, guidance=5.0)
    np.testing.assert_allclose(alone, as_uncond, atol=1e-5)


def test_a_batch_over_eight_devices_is_the_batch_on_one_and_stays_in_place():
    noise, context, uncond = toy.arrays(16)
    table = make_table("unipc", toy.SD15, 8)
    split = batch_sharding(make_mesh())
    options = {"guidance": 4.0, "interval": MIDDLE, "rescale": 0.5, "cache_every": 2}
    args = (*(jax.device_put(a, split) for a in (noise, context)), uncond, table)
    lowered = draw.lower((full, shallow), *args, **options).compile()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in lowered.as_text()
    one, _ = draw((full, shallow), noise, context, uncond, table, **options)
    eight, bad = draw((full, shallow), *args, **options)
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_array_equal(one, eight)
    assert bad.shape == (16,)


def test_noise_belongs_to_the_record():
    key = jax.random.key(5)
    make = jax.jit(record_noise, static_argnums=2)
    indices = np.array([7, 4711, 0, 2**31 - 1, 3, 4, 5, 6], np.int32)
    batch = make(key, indices, (8, 8, 4))
    split = make(key, jax.device_put(indices, batch_sharding(make_mesh())), (8, 8, 4))
    np.testing.assert_array_equal(batch, split)
    for i in (1, 3):
        np.testing.assert_array_equal(make(key, indices[i : i + 1], (8, 8, 4))[0], batch[i])
    assert batch.dtype == jnp.float32
    assert len(np.unique(batch)) > 0.99 * batch.size
    assert abs(float(batch.std()) - 1) < 0.05


def test_names_the_record_and_step_that_is_lost():
    def breaks(x, t, context):
        lost = (context[:, 0, 0] > 50) & (t < 500)
        return jnp.where(lost[:, None, None, None], jnp.nan, denoise(x, t, context))

    noise, context, uncond = toy.arrays()
    context[1] = 99.0
    table = make_table("pndm", toy.SD15, 10)
    _, bad = draw(breaks, noise, context, uncond, table, guidance=2.0)
    first = int((table.steps.time < 500).argmax())
    assert np.asarray(bad).tolist() == [-1, first, -1]


def test_a_denoiser_may_compute_in_bfloat16():
    def low(x, t, context):
        return denoise(*(a.astype(jnp.bfloat16) for a in (x, t, context)))

    table = make_table("dpm++2m", toy.SD15, 5)
    got, _ = draw(low, *toy.arrays(), table, guidance=2.0)
    exact, _ = draw(denoise, *toy.arrays(), table, guidance=2.0)
    assert got.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(got - exact).max() / exact.std()) < 0.2
