"""Images out of a tiny pipeline with random weights, and what they depend on."""

import copy
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.diffusion import generator
from medsyn_jax.diffusion.generator import Generator, NotFinite, Sampling
from medsyn_jax.models.diffusion import pipeline as pipelines
from scripts import random_pipeline

PROMPTS = ["Large right effusion.", "No acute disease.", "Marked edema of the left lung."]
SAMPLING = Sampling("dpm++2m", 4, guidance=3.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return random_pipeline.write(tmp_path_factory.mktemp("made") / "pipeline")


@pytest.fixture(scope="module")
def one(pipeline):
    return Generator(pipeline, SAMPLING, seed=0, batch=2, devices=jax.devices()[:1])


def changed(pipeline, name, path, value):
    """The pipeline with one parameter replaced."""
    part = pipeline.parts[name]
    params = jax.tree.map_with_path(
        lambda where, leaf: value if [k.key for k in where] == path.split("/") else leaf,
        part.params,
    )
    parts = pipeline.parts | {name: dataclasses.replace(part, params=params)}
    return dataclasses.replace(pipeline, parts=parts)


def with_other(made, pipeline, name, path, value):
    """A generator like `made` with one parameter replaced; its programs take parameters as they
    come."""
    sick = copy.copy(made)
    params = {n: p.params for n, p in changed(pipeline, name, path, value).parts.items()}
    sick._params = jax.device_put(params, made._whole)
    return sick


def test_pixels_are_the_same_on_any_number_of_devices(pipeline, one):
    indices = np.arange(7, 26)  # neither chunks nor devices come out even
    prompts = [PROMPTS[i % 3] for i in range(19)]
    images = one.images(indices, prompts)
    assert images.shape == (19, 16, 16)
    assert images.dtype == np.uint8
    assert images.std() > 20
    many = Generator(pipeline, SAMPLING, seed=0, batch=2)
    assert jax.device_count() == 8
    np.testing.assert_array_equal(many.images(indices, prompts), images)
    several = [f"{PROMPTS[0]} {i}" for i in range(5)]
    np.testing.assert_array_equal(many.encode(several), one.encode(several))


def test_an_image_is_that_of_its_index_attempt_and_prompt(one):
    a, b, c, again = one.images([5, 6, 5, 5], [*PROMPTS[:2], PROMPTS[1], PROMPTS[0]])

    def apart(x, y):
        return np.abs(x.astype(int) - y).max()

    assert apart(a, again) <= 1  # another place in another chunk
    assert min(apart(a, b), apart(a, c), apart(b, c)) > 10
    (other,) = one.images([5], PROMPTS[:1], attempt=1)
    assert apart(a, other) > 10
    (same,) = one.images([5], PROMPTS[:1], attempt=1)
    np.testing.assert_array_equal(same, other)


def test_options_of_the_sampler_reach_it_in_bfloat16(pipeline, one):
    options = {"interval": (0.5, 5.0), "rescale": 0.5, "cache_every": 2}
    made = Generator(
        pipeline,
        dataclasses.replace(SAMPLING, **options),
        seed=0,
        batch=2,
        size=24,
        dtype=jnp.bfloat16,
        devices=jax.devices()[:1],
    )
    images = made.images([5, 6], PROMPTS[:2])
    assert images.shape == (2, 24, 24)
    assert images.std() > 20
    assert made.encode(PROMPTS).dtype == jnp.bfloat16


def test_a_record_that_is_not_finite_is_named(pipeline, one):
    (row,) = set(one.tokenizer.encode(["edema"], 3)[0][0].tolist()) - set(
        one.tokenizer.encode(["effusion"], 3)[0][0].tolist()
    )
    table = pipeline.parts["text_encoder"].params["word"]["table"].copy()
    table[row] = np.nan
    sick = with_other(one, pipeline, "text_encoder", "word/table", table)
    assert len(sick.images([30, 31], PROMPTS[:2])) == 2
    with pytest.raises(NotFinite) as raised:
        sick.images([30, 31, 32], PROMPTS)
    assert (raised.value.index, raised.value.step) == (32, 0)
    bias = np.full_like(pipeline.parts["vae"].params["decoder"]["leave"]["bias"], np.inf)
    sick = with_other(one, pipeline, "vae", "decoder/leave/bias", bias)
    with pytest.raises(NotFinite, match="record 7: not finite after step 4"):
        sick.images([7], PROMPTS[:1])


def test_pixels_are_rounded_to_the_nearest():
    levels = jnp.array([-1.5, -1.0, -1 + 0.6 / 127.5, 0.0, 1.0, 1.2], jnp.float32)
    x = jnp.stack([levels, levels], -1)[None, None]
    assert generator.grey(x).tolist() == [[[0, 0, 1, 128, 255, 255]]]
    assert generator.grey(jnp.array([[[[-2.0, 1.5, 0.3]]]])).item() == round((0 + 2 + 1.3) * 42.5)


@pytest.mark.parametrize(
    ("name", "path", "shape", "told"),
    [
        ("vae", "decoder/enter/kernel", (3, 3, 5, 8), "latents of 4 channels, vae/ takes 5"),
        ("unet", "leave/kernel", (3, 3, 8, 8), "unet/ takes 4 channels and gives 8"),
        ("text_encoder", "word/table", (400, 24), "texts of 16 channels, text_encoder/ makes 24"),
        ("text_encoder", "word/table", (90, 16), "tokens, text_encoder/ knows 90"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_told(pipeline, name, path, shape, told):
    with pytest.raises(UserError, match=told):
        Generator(
            changed(pipeline, name, path, np.zeros(shape, np.float32)), SAMPLING, seed=0, batch=2
        )


def test_settings_that_cannot_be_are_told(pipeline):
    for settings, size, told in (
        (SAMPLING, 15, "config.size: 15: use a multiple of 2"),
        (Sampling("plms", 4), 0, "sampler: 'plms' is unknown"),
        (Sampling("ddim", 0), 0, "sampler steps: 0"),
    ):
        with pytest.raises(UserError, match=told):
            Generator(pipeline, settings, seed=0, batch=2, size=size)


@pytest.mark.parametrize("side", [0, -1, True, 8.0, 10**11, None, "8", [], [8, 9], [[8]], {}])
def test_a_size_that_nothing_has_is_asked_for(pipeline, side):
    unet = pipeline.parts["unet"]
    for given, size in ((8, 16), ([8, 8], 16), (side, None)):
        part = dataclasses.replace(unet, config={**unet.config, "sample_size": given})
        other = dataclasses.replace(pipeline, parts={**pipeline.parts, "unet": part})
        if size:
            assert generator.native_size(other) == size
        else:
            with pytest.raises(UserError, match=r"sample_size: .*: set config.size"):
                generator.native_size(other)


def test_the_fingerprint_tells_pipelines_apart(pipeline, tmp_path):
    pipelines.write(tmp_path / "copy", pipeline)
    whole = generator.fingerprint(pipeline)
    assert generator.fingerprint(pipelines.read(tmp_path / "copy")) == whole
    bias = pipeline.parts["unet"].params["leave"]["bias"].copy()
    bias[0] += 1e-3
    others = [changed(pipeline, "unet", "leave/bias", bias)]
    others.append(dataclasses.replace(pipeline, scheduler={**pipeline.scheduler, "beta_end": 0.02}))
    vocab = tmp_path / "copy" / "tokenizer" / "tokenizer.json"
    vocab.write_text(vocab.read_text().replace("effusion", "confusion"))
    others.append(pipelines.read(tmp_path / "copy"))
    assert len({whole, *map(generator.fingerprint, others)}) == 4


@pytest.mark.parity
def test_an_image_is_the_one_that_diffusers_draws(pipeline, tmp_path):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    sampling = Sampling("pndm", 10, guidance=4.0)
    pipelines.write(tmp_path / "copy", pipeline)
    ours = Generator(pipeline, sampling, seed=3, batch=1, devices=jax.devices()[:1])
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "copy")
    theirs.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(PROMPTS):
        key = jax.random.fold_in(jax.random.key(3), i)
        noise = np.asarray(jax.random.normal(key, (1, 8, 8, 4))).transpose(0, 3, 1, 2)
        drawn = theirs(
            prompt,
            latents=torch.from_numpy(noise.copy()),
            num_inference_steps=10,
            guidance_scale=4.0,
            output_type="np",
            height=16,
            width=16,
        ).images[0]
        (found,) = ours.images([i], [prompt])
        wanted = 255 * drawn.mean(-1)
        worst = np.abs(found - wanted).max()
        print(f"\nan image against diffusers': {worst:.2f} of 255 at most, {prompt!r}")
        assert worst <= 1.0
        assert math.isfinite(wanted.std())
        assert wanted.std() > 10
