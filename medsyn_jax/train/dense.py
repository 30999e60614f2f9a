"""Heads on the feature maps of encoders: what segmentation and detection share.

A frozen encoder runs once over all records and its maps are stored; otherwise it runs in every
step. A head is fitted for each encoder, label fraction and seed by the same compiled functions.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import checks, log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.estimates import Estimate, Figure
from medsyn_jax.data.loading import loader
from medsyn_jax.models import layers
from medsyn_jax.train import corpus, frozen, heads, pyramids
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.frozen import Encoder
from medsyn_jax.train.state import State

FREE = corpus.FREE
RULES = (  # checks of the sections that segmentation and detection have in common
    *heads.rules("fit"),
    checks.choice("dtype", checks.DTYPES),
    checks.numbers("above 0", "", "seeds"),
    checks.numbers("from 0", "", "seed"),
    checks.numbers("count", "data", "size batch_size"),
    checks.numbers("from 0", "data", "threads memory_mib"),
    checks.numbers("share", "encoder", "mean"),
    checks.numbers("part", "encoder", "std"),
    checks.numbers("part", "", "fractions"),
    corpus.check_source,
    checks.files(
        lambda config: (
            corpus.file("data.source", config.data.source)
            | {"encoder.weights": config.encoder.weights, "fractions_from": config.fractions_from}
        )
    ),
)


def encoders(config: Any) -> dict[str, list[Encoder]]:
    """The encoders that a run compares: one for all seeds, or, untrained, one for each."""
    folder, seeds = Path(config.encoder.workdir), range(config.seed, config.seed + config.seeds)
    by_name = {"pretrained": [frozen.pretrained(folder)]}
    if config.encoder.untrained:
        by_name["random"] = [frozen.untrained(folder, seed) for seed in seeds]
    if config.encoder.weights:
        file = [config.encoder[field] for field in ("weights", "layout", "mean", "std")]
        by_name["imagenet"] = [frozen.imported(folder, *file)]
    return by_name


def entries(figures: Mapping[str, Mapping[str, Figure]]) -> dict[str, Estimate]:
    """Entries of results.json, `<encoder>/test/<figure>`, from the figures of each encoder; with
    `pretrained-random/...`, the paired differences, where both were fitted."""
    by_name = dict(figures)
    if "random" in by_name:
        a, b = by_name["pretrained"], by_name["random"]
        by_name["pretrained-random"] = {key: a[key] - b[key] for key in a}
    return {
        f"{name}/test/{key}": figure.estimate()
        for name, by_key in by_name.items()
        for key, figure in by_key.items()
    }


def sources(
    config: Any,
    encoder: Encoder,
    parts: Mapping[str, Mapping[str, np.ndarray]],
    mesh: Mesh,
    stored: bool,
    coarsest: int = 0,
) -> dict[str, frozen.Arrays]:
    """Of each split, its arrays; where maps are stored, with "map0" and so on for "image".

    parts: split -> arrays of all its records, with `image` uint8 [n, s, s]. stored: whether to
    store the maps; they are not if they do not fit in memory. coarsest: the number of maps that are
    kept, 0 for all.
    """
    maps = None
    if stored:
        every = frozen.Arrays(image=np.concatenate([part["image"] for part in parts.values()]))
        sizes = {k: config.data[k] for k in ("batch_size", "threads", "memory_mib")}
        sizes |= {"name": ", ".join(parts), "coarsest": coarsest}
        maps = pyramids.pyramids(encoder, every, mesh, **sizes)
    by_split, start = {}, 0
    for split, part in parts.items():
        stop = start + len(part["image"])
        arrays = dict(part)
        if maps is not None:
            arrays |= {f"map{i}": x[start:stop] for i, x in enumerate(maps)}
            del arrays["image"]
        by_split[split] = frozen.Arrays(**arrays)
        start = stop
    return by_split


def map_shapes(encoder: Encoder, size: int) -> list[tuple[int, ...]]:
    """The shapes [1, p, q, f] of the encoder's maps of an image of `size`, the finest first."""
    image = jax.ShapeDtypeStruct((1, size, size), jnp.uint8)
    return [x.shape for x in jax.eval_shape(Encoder.pyramid, encoder, image)]


def are_stored(batch: Mapping[str, Any]) -> bool:
    """Whether a batch holds maps instead of images."""
    return "map0" in batch


def stored_maps(batch: Mapping[str, jax.Array]) -> list[jax.Array]:
    """The maps of a batch, the finest first."""
    return [batch[f"map{i}"] for i in range(sum(name.startswith("map") for name in batch))]


def run_encoder(
    structure: Any, params: Any, stats: Any, images: jax.Array, train: bool
) -> tuple[tuple[jax.Array, ...], Any]:
    """(maps, statistics) of normalized images by the encoder of a state; see `Programs.start`."""
    weights = params["encoder"] if "encoder" in params else stats["encoder"]
    model = nnx.merge(structure, weights, stats["statistics"], copy=True)
    return model.pyramid(images, train=train), layers.statistics(model)


class Programs(NamedTuple):
    """The compiled functions of encoders of one architecture and preparation, for all fractions and
    seeds.

    A state has the parameters and statistics of the "head". Without stored maps it also has the
    encoder's "statistics", and its parameters, "encoder": trained ones among `params`, frozen ones
    in `stats`.
    """

    start: Callable[..., State]  # key, encoder's parameters and statistics, whether maps are stored
    step: Callable[[State, dict[str, jax.Array], jax.Array], tuple[State, Any]]
    judge: Callable[[Any, Any, dict[str, jax.Array]], Any]  # params, stats, batch


def make_programs(
    settings: Any,
    is_frozen: bool,
    make_head: Callable[[nnx.Rngs], nnx.Module],
    loss_fn: steps.LossFn,
    judge: Callable[[Any, Any, dict[str, jax.Array]], Any],
) -> Programs:
    """Programs on one device.

    Args:
        settings: learning_rate and weight_decay of AdamW.
        is_frozen: whether the encoder is not trained.
        judge: outputs [b, ...] in evaluation mode.
    """
    tx = optax.adamw(settings["learning_rate"], weight_decay=settings["weight_decay"])

    def start(key: jax.Array, weights: Any, running: Any, stored: bool) -> State:
        _, params, stats = layers.split(make_head(nnx.Rngs(key)))
        params, stats = {"head": params}, {"head": stats}
        if not stored:
            (stats if is_frozen else params)["encoder"] = weights
            stats["statistics"] = running
        return states.initial(tx, params, stats)

    device = meshes.replicated(meshes.one_device())
    return Programs(
        jax.jit(start, static_argnums=3, out_shardings=device),
        jax.jit(steps.make_step(loss_fn, tx), donate_argnums=0, out_shardings=device),
        jax.jit(judge, out_shardings=device),
    )


def by_preparation(
    encoders: Mapping[str, Sequence[Encoder]], make: Callable[[Encoder], Programs]
) -> dict[Any, Programs]:
    """`Encoder.pixels` -> programs; encoders of one run differ in nothing else that is compiled."""
    first = {each[0].pixels: each[0] for each in encoders.values()}
    return {pixels: make(encoder) for pixels, encoder in first.items()}


def fit_all(
    config: Any,
    programs: Programs,
    score: Callable[[Any], float],
    described: Callable[[float], str],
    encoders: Sequence[Encoder],
    parts: Mapping[str, Mapping[str, np.ndarray]],
    fractions: Mapping[str, np.ndarray],
    mesh: Mesh,
    *,
    name: str,
    stored: bool,
    coarsest: int = 0,
) -> dict[str, list[Any]]:
    """Fraction -> outputs of `programs.judge` for the test records, one of each seed.

    Args:
        config: with `fit`, `data`, `seed` and `seeds`.
        programs: of the architecture.
        score: of the outputs for the validation records; the epoch of the lowest one is kept.
        described: the best score in messages, such as "validation loss 0.1234".
        encoders: one for all seeds, or one for each.
        parts, mesh, stored, coarsest: as of `sources`.
        fractions: name -> rows int [s, k] of the training records, padded with -1.
        name: of the encoder in messages.

    Raises:
        UserError: for a fit without any finite score.
    """
    by_fraction: dict[str, list[Any]] = {fraction: [] for fraction in fractions}
    by_split: dict[str, frozen.Arrays] = {}
    for i in range(config.seeds):
        encoder, seed = encoders[min(i, len(encoders) - 1)], config.seed + i
        if i < len(encoders):
            by_split.clear()  # frees the maps of the encoder before
            by_split = sources(config, encoder, parts, mesh, stored, coarsest)
        for fraction, rows in fractions.items():
            judged = fit(
                config.fit,
                programs,
                score,
                described,
                encoder,
                by_split,
                rows[i],
                seed=seed,
                batch_size=config.data.batch_size,
                where=f"{name}, {fraction} of the labels, seed {seed}",
            )
            by_fraction[fraction].append(judged("test"))
    return by_fraction


def fit(
    settings: Any,
    programs: Programs,
    score: Callable[[Any], float],
    described: Callable[[float], str],
    encoder: Encoder,
    by_split: Mapping[str, loader.Readable],
    rows: np.ndarray,
    *,
    seed: int,
    batch_size: int,
    where: str,
    threads: int = 0,
    section: str = "fit",
) -> Callable[[str], Any]:
    """Fit to the training records at `rows`, and print the course.

    Args:
        settings: batch_size, epochs, steps and patience of `heads.fit`.
        programs, score, described, encoder: as of `fit_all`.
        by_split: sources of the records.
        rows: int [k], padded with -1.
        seed, threads, section: as of `heads.fit`.
        batch_size: of the evaluation.
        where: of messages, which fit this is.

    Returns:
        Split -> outputs of `programs.judge` for its records, at the best epoch.
    """
    mesh, begun, rows = meshes.one_device(), time.monotonic(), rows[rows >= 0]

    def judged(params: Any, stats: Any, split: str) -> Any:
        judge = partial(programs.judge, params, stats)
        return frozen.over(judge, by_split[split], mesh, batch_size, threads)

    stored = are_stored(by_split["train"].take(rows[:1]))
    state = programs.start(jax.random.key(seed), encoder.params, encoder.stats, stored)
    best = heads.fit(
        programs.step,
        state,
        lambda state: score(judged(state["params"], state["stats"], "valid")),
        by_split["train"],
        rows,
        mesh,
        **{k: settings[k] for k in ("batch_size", "epochs", "steps", "patience")},
        seed=seed,
        threads=threads,
        where=f" of {where}",
        section=section,
    )
    log.say(
        f"{where} ({len(rows)} images): {described(best.score)} at epoch {best.best_epoch} of "
        f"{best.epochs}, {time.monotonic() - begun:.0f} s"
    )
    # As the state of a step is placed: arrays of the host would compile `judge` anew.
    return partial(judged, *jax.device_put((best.params, best.stats), meshes.replicated(mesh)))
