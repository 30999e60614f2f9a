"""Full fine-tuning for classification: an image encoder and a linear layer, trained together."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medsyn_jax.data.images import transforms
from medsyn_jax.data.store import shards
from medsyn_jax.models import layers
from medsyn_jax.objectives import classify
from medsyn_jax.train import dense, features, heads, probe
from medsyn_jax.train import state as states
from medsyn_jax.train.fractions import Fraction
from medsyn_jax.train.frozen import Encoder

SECTION = "finetune"
RULES = (*heads.rules(SECTION), *transforms.rules(f"{SECTION}.augment"))


def fit_all(
    config: Any,
    name: str,
    encoder: Encoder,
    task: probe.Task,
    drawn: Sequence[Fraction],
    targets: Mapping[str, np.ndarray],
    parts: Mapping[str, shards.Records],
    seeds: np.ndarray,
) -> list[dict[str, np.ndarray]]:
    """Of each fraction, the logits [s, n, c] of "valid" and of "test".

    The lowest validation loss decides on the epoch. Images are read from the shards in every step.

    Args:
        config: with `finetune`, `data` and `seed`.
        name: of the encoder in messages.
        encoder: at the start of every fit.
        task, drawn: the labels, and the records of each fraction.
        targets: of each split, as of `probe.Task.targets`.
        parts: the records of each split.
        seeds: int [s], the places in `Fraction.subsets` of the fits.

    Raises:
        UserError: for a fit that diverges.
    """
    settings, size, by_fraction = config.finetune, encoder.size, []
    programs = programs_of(task, encoder, settings)
    for fraction in drawn:
        # A label that the fraction cannot teach moves no encoder, and does not stop a fit.
        known = {s: task.without(targets[s], ~fraction.trained) for s in ("train", "valid")}
        sources = {split: features.Images(parts[split], size) for split in ("valid", "test")}
        sources["train"] = features.Images(parts["train"], size, target=known["train"])

        def score(logits: np.ndarray, truth: np.ndarray = known["valid"]) -> float:
            weight = jnp.ones(len(truth))
            loss = classify.LOSSES[task.kind](jnp.asarray(logits), jnp.asarray(truth), weight)
            return float(loss)

        by_seed = []
        for i in seeds.tolist():
            seed = config.seed + i
            judged = dense.fit(
                settings,
                programs,
                score,
                "validation loss {:.4f}".format,
                encoder,
                sources,
                fraction.subsets[i],
                seed=seed,
                batch_size=config.data.batch_size,
                where=f"{name}, finetuned, {fraction.name} of the labels, seed {seed}",
                threads=config.data.threads,
                section=SECTION,
            )
            by_seed.append({split: judged(split) for split in ("valid", "test")})
        by_fraction.append({s: np.stack([x[s] for x in by_seed]) for s in ("valid", "test")})
    return by_fraction


def programs_of(task: probe.Task, encoder: Encoder, settings: Any) -> dense.Programs:
    """The same for all encoders of one architecture and preparation, so that each is compiled once.

    settings: of the section `finetune`.
    """
    image = jax.ShapeDtypeStruct((1, encoder.size, encoder.size), jnp.uint8)
    width = jax.eval_shape(Encoder.pooled, encoder, image).shape[1]
    views = tuple((k, tuple(v) if np.ndim(v) else v) for k, v in settings.augment.items())
    rates = (settings.learning_rate, settings.weight_decay)
    preparation = (encoder.structure, encoder.crop, encoder.pixels)
    return _programs(task.kind, len(task.names), width, *preparation, views, *rates)


@lru_cache
def _programs(
    kind: probe.Kind,
    classes: int,
    width: int,
    structure: Any,
    crop: int,
    pixels: tuple,
    views: tuple,
    learning_rate: float,
    weight_decay: float,
) -> dense.Programs:
    def make(rngs: nnx.Rngs) -> layers.Linear:
        return layers.Linear(width, classes, rngs=rngs)

    linear, *_ = states.shapes(make)

    def forward(params: Any, stats: Any, images: jax.Array, train: bool) -> tuple[jax.Array, Any]:
        """Logits [b, c] of normalized images, and the statistics after them."""
        model = nnx.merge(structure, params["encoder"], stats["statistics"], copy=True)
        pooled = model(images, train=train).pooled.astype(jnp.float32)
        logits = nnx.merge(linear, params["head"], stats["head"], copy=True)(pooled)
        return logits, {**stats, "statistics": layers.statistics(model)}

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        settings = {"size": crop, **dict(views), **dict(pixels)}
        images = transforms.augment(key, batch["image"], **settings)
        logits, stats = forward(params, stats, images, train=True)
        weight = jnp.ones(len(images))
        return classify.LOSSES[kind](logits, batch["target"], weight), (stats, {})

    def judge(params: Any, stats: Any, batch: dict[str, jax.Array]) -> jax.Array:
        images = transforms.center_crop(batch["image"], crop)
        images = transforms.normalize(images, **dict(pixels))
        return forward(params, stats, images, train=False)[0]

    rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
    return dense.make_programs(rates, False, make, loss_fn, judge)
