"""Training of a latent diffusion model on reports and radiographs.

With `config.pipeline` it goes on from a Stable Diffusion folder, as RoentGen did; without, an
autoencoder and a text encoder are trained first, and the U-Net starts from nothing. The result is a
pipeline folder again: <workdir>/pipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
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
from medsyn_jax.data.loading import loader
from medsyn_jax.data.text import tokenizers
from medsyn_jax.diffusion import generator, schedule
from medsyn_jax.models import towers
from medsyn_jax.models.diffusion import pipeline as pipelines
from medsyn_jax.models.diffusion.pipeline import Part, Pipeline, module_of
from medsyn_jax.models.heads import Head
from medsyn_jax.models.layers import split, statistics
from medsyn_jax.objectives import diffusion
from medsyn_jax.objectives.contrastive import contrastive_loss
from medsyn_jax.train import corpus, latents
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.run import FREE as FREE
from medsyn_jax.train.run import Training, fit_averaged, rules

PREDICTIONS = ("epsilon", "v_prediction")
_SEEN = 1024  # images whose latents say how far the autoencoder's latents spread

Batch = dict[str, jax.Array]


@dataclass
class Data:
    """What a run reads; `valid` is of the first source and never trained on."""

    train: list[loader.Source]
    valid: loader.Source
    tokenizer: tokenizers.Tokenizer


def run(config: Any, workdir: Path) -> None:
    """Train, keep the checkpoint with the lowest validation error, and write its pipeline.

    Raises UserError for what the config asks that is not there or does not fit.
    """
    mesh = meshes.make_mesh(**config.mesh)
    meshes.per_process(config.data.batch_size, mesh, config.optim.accumulate)
    start = pipelines.read(config.pipeline, report=log.say) if config.pipeline else None
    if start is not None:
        schedule.make_table("ddim", start.scheduler, 1)  # refuses what no sampler could draw by
    data = _data(config, workdir, start)
    outputs.write_config(workdir, config)
    if start is None:
        start = _from_nothing(config, workdir, data, mesh)
    if config.precompute:
        data = _with_latents(config, workdir, data, start)
    trained = ("unet", "text_encoder") if config.train_text else ("unet",)
    params = {name: start.parts[name].params for name in trained}
    still = {name: part.params for name, part in start.parts.items() if name not in trained}
    training = _training(config, config, config.data.batch_size, workdir, data, mesh)
    alphas = schedule.alphas_cumprod(start.scheduler)
    noised = _noised_fn(config, start, alphas)
    loss_fn = _loss_fn(config, noised, start, len(alphas), data.tokenizer)
    error_fn = _error_fn(noised, len(alphas))
    params, errors = fit_averaged(training, params, still, loss_fn, error_fn, data.valid)
    if jax.process_index() == 0:
        parts = {
            name: replace(part, params=_half(params.get(name, part.params)))
            for name, part in start.parts.items()
        }
        pipelines.write(workdir / "pipeline", replace(start, parts=parts))
    figure = _figure(errors, data.valid)
    outputs.write_results(workdir, "finetune_diffusion", {"valid/loss": figure})
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
    checks.choice("dtype", checks.DTYPES),
    checks.numbers("above 0", "data", "batch_size size tokens"),
    checks.numbers("from 0", "", "seed"),
    checks.numbers("from 0", "data", "threads"),
    checks.numbers("below 1", "", "ema caption_dropout"),
    checks.texts("data", "sources sections"),
    *rules(),
    _check_stages,
    lambda config: loader.check_weights(config.data.weights, len(config.data.sources)),
    checks.files(lambda config: {"pipeline": config.pipeline} | corpus.files(config)),
)


def _data(config: Any, workdir: Path, start: Pipeline | None) -> Data:
    settings, root = config.data, workdir.parent / "data"
    folders = [
        corpus.prepare(named, config.ingest, root, f"source {i}")
        for i, named in enumerate(settings.sources)
    ]
    words = (settings.sections, settings.vocab_size, settings.tokens)
    own = start.tokenizer if start else None
    own = own or corpus.tokenizer(workdir / "tokenizer", folders, *words)
    return _opened(config, folders, tokenizers.load(own))


def _opened(
    config: Any, folders: list[Path], tokenizer: tokenizers.Tokenizer, stored: bool = False
) -> Data:
    settings = config.data

    def source(folder: Path, split: str) -> loader.Source:
        texts = (settings.sections, tokenizer, settings.tokens)
        return loader.Source(folder, split, *texts, settings.size, latents=stored)

    train = [source(folder, "train") for folder in folders]
    return Data(train, source(folders[0], "valid"), tokenizer)


def _with_latents(config: Any, workdir: Path, data: Data, start: Pipeline) -> Data:
    """The same records with their latents in the place of the images, encoded once."""
    part, encode = start.parts["vae"], _encode_fn(config, start)
    folders = [
        latents.precompute(
            Path(source.records.directory),
            workdir / "latents",
            encode,
            part.params,
            generator.fingerprint(replace(start, parts={"vae": part})),
            config.data.size,
        )
        for source in data.train
    ]
    return _opened(config, folders, data.tokenizer, stored=True)


def _pixels(images: jax.Array, channels: int) -> jax.Array:
    """uint8 [b, h, w] to fp32 [b, h, w, channels] in [-1, 1]."""
    x = images.astype(jnp.float32)[..., None] / 127.5 - 1
    return jnp.broadcast_to(x, (*x.shape[:-1], channels))


def _encode_fn(config: Any, start: Pipeline) -> Callable:
    """fn(parameters of the autoencoder, uint8 images) -> mean and log-variance, one array, fp32."""
    module = module_of(start.parts["vae"], config.dtype, config.remat)
    channels = start.parts["vae"].config.get("in_channels", 3)

    def fn(params: Any, images: jax.Array) -> jax.Array:
        moments = module(params).encode(_pixels(images, channels))
        return jnp.concatenate(moments, -1).astype(jnp.float32)

    return fn


def _noised_fn(config: Any, start: Pipeline, alphas: np.ndarray) -> Callable:
    """fn(params of all parts, batch, ids, t [b], key) -> (output, wanted, alpha [b])."""
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
    config: Any, noised: Callable, start: Pipeline, times: int, tokenizer: tokenizers.Tokenizer
) -> steps.LossFn:
    empty = jnp.asarray(tokenizer.encode([""], config.data.tokens)[0])
    dropped, gamma = config.caption_dropout, config.min_snr

    def loss_fn(params: Any, still: Any, batch: Batch, key: jax.Array) -> tuple:
        for_times, for_captions, key = jax.random.split(key, 3)
        count = batch["ids"].shape[0]
        t = jax.random.randint(for_times, (count,), 0, times)
        drop = jax.random.bernoulli(for_captions, dropped, (count, 1))
        ids = jnp.where(drop, empty, batch["ids"])
        output, wanted, alpha = noised({**still, **params}, batch, ids, t, key)
        error = diffusion.denoising_error(output, wanted)
        weight = diffusion.snr_weight(alpha, gamma, _prediction(start))
        return (weight * error).mean(), (still, {"mse": error.mean()})

    return loss_fn


def _error_fn(noised: Callable, times: int) -> Callable:
    """fn(params, still, batch) -> [b], unweighted, at a time and with noise that a record keeps."""

    def fn(params: Any, still: Any, batch: Batch) -> jax.Array:
        # Multiples of the golden ratio spread the records' times evenly over the schedule.
        part = batch["index"].astype(jnp.float32) * 0.6180339887 % 1.0
        t = (part * times).astype(jnp.int32)
        args = ({**still, **params}, batch, batch["ids"], t, jax.random.key(0))
        return diffusion.denoising_error(*noised(*args)[:2])

    return fn


def _training(
    config: Any, section: Any, batch_size: int, workdir: Path, data: Data, mesh: Mesh
) -> Training:
    settings, seed = config.data, config.seed
    sources = (settings.threads, data.train, settings.weights)
    return Training(section, batch_size, seed, *sources, workdir, mesh)


def _from_nothing(config: Any, workdir: Path, data: Data, mesh: Mesh) -> Pipeline:
    """A trained autoencoder, a text encoder that knows images, and a U-Net at its random start."""
    settings = {name: config[name].to_dict() for name in pipelines.PARTS}
    vocabulary = {"vocab_size": data.tokenizer.vocab_size}
    settings["text_encoder"] |= vocabulary | {"max_position_embeddings": config.data.tokens}
    parts = {}
    for i, (name, setting) in enumerate(settings.items()):
        part = pipelines.part(name, setting, {}, f"config.{name}")
        key = jax.random.fold_in(jax.random.key(config.seed), i)
        params = jax.jit(lambda key, make=part.make: split(make(rngs=nnx.Rngs(key)))[1])(key)
        parts[name] = replace(part, params=jax.device_get(params))
    parts["vae"] = _autoencoder(config, workdir, data, mesh, parts["vae"])
    parts["text_encoder"] = _text_encoder(config, workdir, data, mesh, parts["text_encoder"])
    return Pipeline(parts, config.scheduler.to_dict(), data.tokenizer.folder)


def _autoencoder(config: Any, workdir: Path, data: Data, mesh: Mesh, part: Part) -> Part:
    """Trained, with the factor that scales its latents to unit spread in its config."""
    vae = module_of(part, config.dtype, config.remat)
    channels, kl_weight = part.config["in_channels"], config.autoencoder.kl_weight

    def loss_fn(params: Any, still: Any, batch: Batch, key: jax.Array) -> tuple:
        x, module = _pixels(batch["image"], channels), vae(params["vae"])
        mean, logvar = module.encode(x)
        drawn = jax.random.normal(key, mean.shape, mean.dtype)
        again = module.decode(mean + jnp.exp(0.5 * logvar) * drawn)
        loss, parts = diffusion.autoencoder_loss(x, again, mean, logvar, kl_weight)
        return loss, (still, parts)

    def error_fn(params: Any, still: Any, batch: Batch) -> jax.Array:
        x = _pixels(batch["image"], channels)
        return jnp.abs(vae(params["vae"])(x) - x).mean((1, 2, 3))

    log.say("autoencoder")
    section = config.autoencoder
    training = _training(config, section, section.batch_size, workdir / "autoencoder", data, mesh)
    start = {"vae": part.params}
    params, errors = fit_averaged(training, start, {}, loss_fn, error_fn, data.valid)
    log.say(f"autoencoder: mean absolute error {errors.mean() / 2:.4f} of the grey range")
    encode = jax.jit(lambda p, images: vae(p).encode(_pixels(images, channels))[0])
    images = data.train[0].take(np.arange(min(_SEEN, len(data.train[0]))))["image"]
    chunks = np.array_split(images, max(1, len(images) // 64))
    spread = np.std(np.concatenate([jax.device_get(encode(params["vae"], c)) for c in chunks]))
    scaled = dict(part.config) | {"scaling_factor": float(np.float32(1 / spread))}
    return pipelines.part("vae", scaled, params["vae"], "config.vae")


def _text_encoder(config: Any, workdir: Path, data: Data, mesh: Mesh, part: Part) -> Part:
    """Trained to tell which image a report belongs to, as CLIP's was: from the error of a U-Net
    alone it learns much more slowly what in a report can be seen."""
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
    started = jax.jit(lambda key: split(make(nnx.Rngs(key)))[1:])(jax.random.key(config.seed))
    tower, stats = jax.device_get(started)

    def both(params: Any, still: Any, batch: Batch, train: bool) -> tuple:
        model = nnx.merge(structure, params["tower"], still, copy=True)
        seen = transforms.normalize(batch["image"], **pixels)
        v = model["image_head"](model["encoder"](seen, train).pooled, train)
        states = text(params["text_encoder"])(batch["ids"])
        t = model["text_head"](towers.pool_tokens(states, batch["mask"], "mean"), train)
        return *contrastive_loss(v, t, temperature=section.temperature), statistics(model)

    def loss_fn(params: Any, still: Any, batch: Batch, key: jax.Array) -> tuple:
        del key
        loss, parts, still = both(params, still, batch, True)
        return loss, (still, parts)

    def error_fn(params: Any, still: Any, batch: Batch) -> jax.Array:
        """The loss of a batch at each of its records."""
        return jnp.broadcast_to(both(params, still, batch, False)[0], batch["index"].shape)

    log.say("text encoder")
    training = _training(config, section, section.batch_size, workdir / "text_encoder", data, mesh)
    params = {"text_encoder": part.params, "tower": tower}
    params, _ = fit_averaged(training, params, stats, loss_fn, error_fn, data.valid)
    return replace(part, params=params["text_encoder"])


def _half(params: Any) -> Any:
    """In bfloat16, as generators are handed on."""
    return jax.tree.map(lambda p: np.asarray(p).astype(jnp.bfloat16), params)


def _figure(errors: np.ndarray, source: loader.Source) -> dict[str, Any]:
    """The mean error over records with its interval over subjects."""
    return estimates.mean(errors, np.array(source.subjects()))
