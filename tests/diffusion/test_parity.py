"""Every sampler against diffusers with the same denoiser."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.diffusion.sampler import sample
from medsyn_jax.diffusion.schedule import SAMPLERS, make_table
from tests.diffusion import toy

pytestmark = [
    pytest.mark.parity,
    # diffusers 0.42 on NumPy 2 asks torch for arrays in a way that NumPy calls deprecated.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
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
