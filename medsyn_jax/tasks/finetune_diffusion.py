"""Training of a latent diffusion model on reports and radiographs.

With `config.pipeline` the training starts from a Stable Diffusion folder, as RoentGen did. Without,
an autoencoder and a text encoder are trained first, and the U-Net starts from random weights. The
result is a pipeline folder again: <workdir>/pipeline.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import checks, estimates, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.data.images import transforms
from medsyn_jax.data.text import tokenizers
from medsyn_jax.diffusion import generator, schedule
from medsyn_jax.models import towers
from medsyn_jax.models.diffusion import pipeline as pipelines
from medsyn_jax.models.diffusion.pipeline import Part, Pipeline, module_of
from medsyn_jax.models.heads import Head
from medsyn_jax.models.layers import statistics
from medsyn_jax.objectives import diffusion
from medsyn_jax.objectives.contrastive import contrastive_loss
from medsyn_jax.train import corpus, latents
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.run import FREE as FREE
from medsyn_jax.train.run import RULES, Data, Training, fit_averaged, prepare, rules

PREDICTIONS = ("epsilon", "v_prediction")
_MOST_ENCODED = 1024  # images that the spread of the latents is measured on

Batch = dict[str, jax.Array]


def run(config: Any, workdir: Path) -> None:
    """Train to the lowest validation error, and write the pipeline and its validation loss.

    Raises UserError for a pipeline or data that do not fit the config.
    """
    mesh = meshes.make_mesh(**config.mesh)
    meshes.per_process(config.data.batch_size, mesh, config.optim.accumulate)
    start = pipelines.read(config.pipeline, report=log.say) if config.pipeline else None
    if start is not None:
        schedule.make_table("ddim", start.scheduler, 1)  # refuses schedules without a sampler
    folders, tokenizer = prepare(config, workdir, start.tokenizer if start else "")
    data = Data(config.data, folders, tokenizer, ("valid",))
    outputs.write_config(workdir, config)
    if start is None:
        start = _trained_parts(config, workdir, data, mesh)
    if config.precompute:
        folders = _with_latents(config, workdir, folders, start)
        data = Data(config.data, folders, tokenizer, ("valid",), latents=True)
    trained = ("unet", "text_encoder") if config.train_text else ("unet",)
    params = {name: start.parts[name].params for name in trained}
    constants = {name: part.params for name, part in start.parts.items() if name not in trained}
    training = Training(config, config, config.data.batch_size, data, workdir, mesh)
    alphas = schedule.alphas_cumprod(start.scheduler)
    denoised = _denoised_fn(config, start, alphas)
    loss_fn = _loss_fn(config, denoised, start, len(alphas), tokenizer)
    error_fn = _error_fn(denoised, len(alphas))
    params, errors = fit_averaged(training, params, constants, loss_fn, error_fn)
    if jax.process_index() == 0:
        parts = {
            name: replace(part, params=_half(params.get(name, part.params)))
            for name, part in start.parts.items()
        }
        pipelines.write(workdir / "pipeline", replace(start, parts=parts))
    loss = estimates.mean(errors, np.array(data.held_out["valid"].subjects()))
    outputs.write_results(workdir, "finetune_diffusion", {"valid/loss": loss})
    log.say_cost("done")


def _check_stages(config: Any) -> None:
    if config.pipeline:
        return
    checks.choice("scheduler.prediction_type", PREDICTIONS)(config)
    checks.numbers("above 0", "contrastive", "temperature")(config)
    for stage in ("autoencoder", "contrastive"):
        checks.numbers("above 0", stage, "batch_size")(config)
        for rule in rules(f"{stage}."):
            rule(config)


CHECKS = (
    checks.numbers("from 0", "", "min_snr"),  # which a config of another task lacks
    checks.numbers("below 1", "", "ema caption_dropout"),
    *RULES,
    _check_stages,
    checks.files(lambda config: {"pipeline": config.pipeline} | corpus.files(config)),
)


def _with_latents(
    config: Any, workdir: Path, folders: Sequence[Path], start: Pipeline
) -> list[Path]:
    """Copies of sets of shards, encoded once, with latents in the place of images."""
    part = start.parts["vae"]
    made_by = generator.fingerprint(replace(start, parts={"vae": part}))
    encode, root, size = _encode_fn(config, start), workdir / "latents", config.data.size
    return [
        latents.precompute(folder, root, encode, part.params, made_by, size) for folder in folders
    ]


def _pixels(images: jax.Array, channels: int) -> jax.Array:
    """uint8 [b, h, w] to fp32 [b, h, w, channels] in [-1, 1]."""
    x = images.astype(jnp.float32)[..., None] / 127.5 - 1
    return jnp.broadcast_to(x, (*x.shape[:-1], channels))


def _encode_fn(config: Any, start: Pipeline) -> Callable:
    """fn(autoencoder's parameters, uint8 images) -> fp32 [b, p, q, 2 z], mean and log-variance."""
    module = module_of(start.parts["vae"], config.dtype, config.remat)
    channels = start.parts["vae"].config.get("in_channels", 3)

    def fn(params: Any, images: jax.Array) -> jax.Array:
        moments = module(params).encode(_pixels(images, channels))
        return jnp.concatenate(moments, -1).astype(jnp.float32)

    return fn


def _denoised_fn(config: Any, start: Pipeline, alphas: np.ndarray) -> Callable:
    """fn(params of all parts, batch, ids, t [b], key) -> (output, target, alpha [b])."""
    text_encoder, unet = (
        module_of(start.parts[name], config.dtype, config.remat)
        for name in ("text_encoder", "unet")
    )
    prediction = _prediction(start)
    encode, table = _encode_fn(config, start), jnp.asarray(alphas, jnp.float32)

    def fn(params: Any, batch: Batch, ids: jax.Array, t: jax.Array, key: jax.Array) -> tuple:
        for_latents, for_noise = jax.random.split(key)
        stored = batch.get("latents")
        moments = encode(params["vae"], batch["image"]) if stored is None else stored
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, -1)
        drawn = jax.random.normal(for_latents, mean.shape)
        latents = (mean + jnp.exp(0.5 * logvar) * drawn) * start.scaling_factor
        noise = jax.random.normal(for_noise, latents.shape)
        alpha = table[t]
        context = text_encoder(params["text_encoder"])(ids)
        x = diffusion.add_noise(latents, noise, alpha)
        output = unet(params["unet"])(x, t, context)
        return output, diffusion.target(latents, noise, alpha, prediction), alpha

    return fn


def _prediction(start: Pipeline) -> diffusion.Prediction:
    return start.scheduler.get("prediction_type") or "epsilon"


def _loss_fn(
    config: Any, denoised: Callable, start: Pipeline, times: int, tokenizer: tokenizers.Tokenizer
) -> steps.LossFn:
    empty = jnp.asarray(tokenizer.encode([""], config.data.tokens)[0])
    dropped, gamma = config.caption_dropout, config.min_snr

    def loss_fn(params: Any, constants: Any, batch: Batch, key: jax.Array) -> tuple:
        for_times, for_captions, key = jax.random.split(key, 3)
        count = batch["ids"].shape[0]
        t = jax.random.randint(for_times, (count,), 0, times)
        drop = jax.random.bernoulli(for_captions, dropped, (count, 1))
        ids = jnp.where(drop, empty, batch["ids"])
        output, target, alpha = denoised({**constants, **params}, batch, ids, t, key)
        error = diffusion.denoising_error(output, target)
        weight = diffusion.snr_weight(alpha, gamma, _prediction(start))
        return (weight * error).mean(), (constants, {"mse": error.mean()})

    return loss_fn


def _error_fn(denoised: Callable, times: int) -> Callable:
    """fn(params, constants, batch) -> unweighted errors [b], at a fixed time of each record."""

    def fn(params: Any, constants: Any, batch: Batch) -> jax.Array:
        # Multiples of the golden ratio spread the records' times evenly over the schedule.
        share = batch["index"].astype(jnp.float32) * 0.6180339887 % 1.0
        t = (share * times).astype(jnp.int32)
        args = ({**constants, **params}, batch, batch["ids"], t, jax.random.key(0))
        return diffusion.denoising_error(*denoised(*args)[:2])

    return fn


def _trained_parts(config: Any, workdir: Path, data: Data, mesh: Mesh) -> Pipeline:
    """A trained autoencoder, a text encoder trained with images, and a random U-Net."""
    settings = {name: config[name].to_dict() for name in pipelines.PARTS}
    vocabulary = {"vocab_size": data.tokenizer.vocab_size}
    settings["text_encoder"] |= vocabulary | {"max_position_embeddings": config.data.tokens}
    parts = {}
    for i, (name, setting) in enumerate(settings.items()):
        part = pipelines.part(name, setting, {}, f"config.{name}")
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        params, _ = jax.device_get(states.random(part.make, key))
        parts[name] = replace(part, params=params)
    parts["vae"] = _trained_autoencoder(config, workdir, data, mesh, parts["vae"])
    parts["text_encoder"] = _trained_text(config, workdir, data, mesh, parts["text_encoder"])
    return Pipeline(parts, config.scheduler.to_dict(), data.tokenizer.folder)


def _trained_autoencoder(config: Any, workdir: Path, data: Data, mesh: Mesh, part: Part) -> Part:
    """Train the autoencoder; its config gets the factor that scales latents to unit spread."""
    vae = module_of(part, config.dtype, config.remat)
    channels, kl_weight = part.config["in_channels"], config.autoencoder.kl_weight

    def loss_fn(params: Any, constants: Any, batch: Batch, key: jax.Array) -> tuple:
        x, module = _pixels(batch["image"], channels), vae(params["vae"])
        mean, logvar = module.encode(x)
        drawn = jax.random.normal(key, mean.shape, mean.dtype)
        decoded = module.decode(mean + jnp.exp(0.5 * logvar) * drawn)
        loss, metrics = diffusion.autoencoder_loss(x, decoded, mean, logvar, kl_weight)
        return loss, (constants, metrics)

    def error_fn(params: Any, constants: Any, batch: Batch) -> jax.Array:
        x = _pixels(batch["image"], channels)
        return jnp.abs(vae(params["vae"])(x) - x).mean((1, 2, 3))

    log.say("autoencoder")
    section, folder = config.autoencoder, workdir / "autoencoder"
    training = Training(config, section, section.batch_size, data, folder, mesh)
    params, errors = fit_averaged(training, {"vae": part.params}, {}, loss_fn, error_fn)
    log.say(f"autoencoder: mean absolute error {errors.mean() / 2:.4f} of the grey range")
    encode = jax.jit(lambda p, images: vae(p).encode(_pixels(images, channels))[0])
    images = data.train[0].take(np.arange(min(_MOST_ENCODED, len(data.train[0]))))["image"]
    chunks = np.array_split(images, max(1, len(images) // 64))
    spread = np.std(np.concatenate([jax.device_get(encode(params["vae"], c)) for c in chunks]))
    scaled = dict(part.config) | {"scaling_factor": float(np.float32(1 / spread))}
    return pipelines.part("vae", scaled, params["vae"], "config.vae")


def _trained_text(config: Any, workdir: Path, data: Data, mesh: Mesh, part: Part) -> Part:
    """Train the text encoder to match reports with images, as CLIP's was.

    From the error of a U-Net alone it learns much more slowly which words are visible in an image.
    """
    section, text = config.contrastive, module_of(part, config.dtype, config.remat)
    image = section.image.to_dict()
    pixels = {k: image[k] for k in transforms.PIXELS}

    def make(rngs: nnx.Rngs) -> nnx.Module:
        encoder = towers.image_encoder(image, config.dtype, rngs)
        width = part.config["hidden_size"]
        heads = [
            Head("linear", n, width, dtype=config.dtype, rngs=rngs)
            for n in (encoder.features, width)
        ]
        return nnx.Dict({"encoder": encoder, "image_head": heads[0], "text_head": heads[1]})

    structure, *_ = states.shapes(make)
    tower, stats = jax.device_get(states.random(make, jax.random.key(config.seed)))

    def contrast(params: Any, stats: Any, batch: Batch, train: bool) -> tuple:
        model = nnx.merge(structure, params["tower"], stats, copy=True)
        images = transforms.normalize(batch["image"], **pixels)
        v = model["image_head"](model["encoder"](images, train).pooled, train)
        states = text(params["text_encoder"])(batch["ids"])
        t = model["text_head"](towers.pool_tokens(states, batch["mask"], "mean"), train)
        return *contrastive_loss(v, t, temperature=section.temperature), statistics(model)

    def loss_fn(params: Any, stats: Any, batch: Batch, key: jax.Array) -> tuple:
        del key
        loss, metrics, stats = contrast(params, stats, batch, True)
        return loss, (stats, metrics)

    def error_fn(params: Any, stats: Any, batch: Batch) -> jax.Array:
        """The loss of the whole batch for each of its records."""
        return jnp.broadcast_to(contrast(params, stats, batch, False)[0], batch["index"].shape)

    log.say("text encoder")
    folder = workdir / "text_encoder"
    training = Training(config, section, section.batch_size, data, folder, mesh)
    params = {"text_encoder": part.params, "tower": tower}
    params, _ = fit_averaged(training, params, stats, loss_fn, error_fn)
    return replace(part, params=params["text_encoder"])


def _half(params: Any) -> Any:
    """Parameters in bfloat16, the type of published generators."""
    return jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)
