"""Every sampler against diffusers with the same denoiser."""

import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.diffusion import noise
from medsyn_jax.diffusion.sampler import sample
from medsyn_jax.diffusion.schedule import SAMPLERS, make_table
from tests.diffusion import toy

pytestmark = [
    pytest.mark.parity,
    # diffusers 0.42 on NumPy 2 asks torch for arrays in a way that NumPy calls deprecated.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]
OURS = jax.jit(
    functools.partial(sample, functools.partial(toy.denoise, jnp)),
    static_argnames=("guidance", "rescale"),
)


def difference(sampler, config, steps, **guide):
    """Largest difference from diffusers, in standard deviations of its latents."""
    theirs = toy.diffusers_sample(sampler, config, steps, **guide)
    latents, bad = OURS(*toy.arrays(), make_table(sampler, config, steps), **guide)
    assert (np.asarray(bad) == -1).all()
    return np.abs(np.asarray(latents) - theirs).max() / theirs.std()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_final_latents(sampler):
    """It prints the worst of all spacings, eps and v: a row of docs/results.md."""
    worst = dict.fromkeys(itertools.product((2, 3, 20, 25, 50, 75), ("plain", "guided")), 0.0)
    spacings = ({}, *({"timestep_spacing": s} for s in ("leading", "trailing", "linspace")))
    for change, spacing in itertools.product(({}, toy.V), spacings):
        guide = {"guidance": 4.0, "rescale": 0.7 if change else 0.0}
        for steps, way in worst:
            options = guide if way == "guided" else {}
            found = difference(sampler, toy.SD15 | change | spacing, steps, **options)
            assert found < toy.limit(sampler, "sd15"), (change, spacing, steps, way)
            worst[steps, way] = max(worst[steps, way], found)
    row = [f"{n}: {worst[n, 'plain']:.1e} ({worst[n, 'guided']:.1e})" for n in (20, 25, 50, 75)]
    print(f"\n{sampler} against diffusers, steps: {', '.join(row)}")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_further_fields(sampler):
    changes = {
        "alpha_one": {"set_alpha_to_one": True, "steps_offset": 0},
        "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
        "trained": {"trained_betas": np.linspace(1e-4, 0.1, 80).tolist()}
        | {"num_train_timesteps": 80},
        "cosine": {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "leading"} | toy.V,
        "sigma_min": {"final_sigmas_type": "sigma_min"},
        "karras": {"use_karras_sigmas": True},
        "karras_trailing": {"use_karras_sigmas": True, "timestep_spacing": "trailing"} | toy.V,
        "karras_min": {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
        "zero_snr": toy.ZERO_SNR,
    }
    if sampler == "pndm":
        del changes["zero_snr"]
    for case, change in changes.items():
        for steps in (9, 20):
            assert difference(sampler, toy.SD15 | change, steps) < toy.limit(sampler, case), case


@pytest.mark.parametrize("name", sorted({*noise._NOISE} - {"DPMSolverSDEScheduler"}))
@pytest.mark.parametrize("fields", [{}, toy.SD15, toy.SD15 | toy.V], ids=["own", "sd15", "sd15_v"])
def test_files_of_every_class(name, fields, tmp_path):
    """The noise schedule of the class, and the times and noise levels of our samplers, of a file
    as diffusers saves it. (DPMSolverSDE needs one more library.)"""
    import diffusers

    given = {field: value for field, value in fields.items() if field[0] != "_"}
    saved = getattr(diffusers, name).from_config(given)
    saved.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scheduler_config.json").read_text())
    for file in (config, given | {"_class_name": name}):
        np.testing.assert_allclose(noise.alphas_cumprod(file), saved.alphas_cumprod, atol=1e-6)
    config |= {"clip_sample": False}  # as the pipeline reads it
    for sampler, cls in toy.CLASSES.items():
        # The last two are fields that mean another thing in some of these classes.
        ends = {"algorithm_type": "dpmsolver++", "lower_order_final": True}
        given = {"steps_offset": 1} | config | {"skip_prk_steps": True} | ends
        theirs = getattr(diffusers, cls).from_config(given)
        theirs.set_timesteps(20)
        ours = make_table(sampler, config | {"skip_prk_steps": True}, 20).steps
        np.testing.assert_allclose(ours.time, theirs.timesteps, atol=0.02)
        if sampler not in ("ddim", "pndm"):
            np.testing.assert_allclose(ours.sigma, theirs.sigmas[:-1], rtol=2e-4)
