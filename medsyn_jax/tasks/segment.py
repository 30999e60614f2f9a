"""Segmentation of one structure: a decoder on frozen or tuned encoders at label fractions."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import checks, log, metrics, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.data.images import decode, transforms
from medsyn_jax.data.store import schema, shards, splits
from medsyn_jax.models import layers, segmenter
from medsyn_jax.objectives import segment
from medsyn_jax.train import checkpoint, corpus, features, frozen, heads
from medsyn_jax.train import state as states
from medsyn_jax.train import step as steps
from medsyn_jax.train.fractions import label_subsets
from medsyn_jax.train.frozen import Encoder
from medsyn_jax.train.state import State

FREE = ("mesh.", "data.threads", "data.batch_size", "ingest.workers")


def run(config: Any, workdir: Path) -> None:
    """Train decoders on the pre-trained, the untrained and, if given, the ImageNet encoder.

    Writes results.json with `<encoder>/test/<fraction>/<figure>` for the figures of
    `metrics.overlaps`; `pretrained-random/...` are differences of the two encoders. Each seed has
    its own subset, decoder and order, and its own untrained encoder. Raises UserError for an
    encoder or a data set that does not fit the config.
    """
    run_folder = Path(config.encoder.workdir)
    checkpoint.check_run(run_folder)  # restored after the data are prepared
    mesh = meshes.make_mesh(**config.mesh)
    directory = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    parts = {split: shards.open_split(directory, split) for split in splits.SPLITS}
    data = {split: read(part, config, split) for split, part in parts.items()}
    check_masks(data, config)
    fractions = make_fractions(config, workdir, data["train"])
    seeds = range(config.seed, config.seed + config.seeds)
    encoders = {"pretrained": [frozen.pretrained(run_folder)]}
    if config.encoder.untrained:
        encoders["random"] = [frozen.untrained(run_folder, seed) for seed in seeds]
    if config.encoder.weights:
        file = [config.encoder[field] for field in ("weights", "layout", "mean", "std")]
        encoders["imagenet"] = [frozen.imported(run_folder, *file)]
    programs = {each[0].pixels: make_programs(config, each[0]) for each in encoders.values()}
    outputs.write_config(workdir, config)
    figures = {
        name: segment_by(config, programs[each[0].pixels], name, each, data, fractions, mesh)
        for name, each in encoders.items()
    }
    if config.encoder.untrained:
        a, b = figures["pretrained"], figures["random"]
        figures["pretrained-random"] = {key: a[key] - b[key] for key in a}
    results = {
        f"{name}/test/{key}": figure.estimate()
        for name, by_key in figures.items()
        for key, figure in by_key.items()
    }
    outputs.write_results(workdir, "segment", results)
    log.say_cost("done")


def _check_widths(config: Any) -> None:
    widths = config.decoder.widths
    if not all(isinstance(x, int) and x > 0 for x in widths):
        raise UserError(f"config.decoder.widths: {widths}: give whole numbers above 0, or ()")


CHECKS = (
    *heads.RULES,
    checks.choice("dtype", checks.DTYPES),
    checks.numbers("above 0", "", "seeds"),
    checks.numbers("from 0", "", "seed"),
    checks.numbers("count", "data", "size batch_size"),
    checks.numbers("from 0", "data", "threads memory_mib"),
    checks.numbers("share", "encoder", "mean"),
    checks.numbers("part", "encoder", "std"),
    checks.numbers("part", "", "fractions"),
    checks.numbers("share", "augment", "probability"),
    checks.numbers("above 0", "augment", "zoom"),
    checks.numbers("from 0", "augment", "rotate"),
    checks.ranges("augment", "zoom"),
    _check_widths,
    corpus.check_source,
    checks.files(
        lambda config: (
            corpus.file("data.source", config.data.source)
            | {"encoder.weights": config.encoder.weights, "fractions_from": config.fractions_from}
        )
    ),
)


@dataclass(frozen=True)
class Masked:
    """The images of one split with one of their masks, in memory."""

    images: np.ndarray  # uint8 [n, s, s]
    masks: np.ndarray  # uint8 [n, s, s], 0 to 255; edges are soft where the set's size is another
    keys: list[str]
    subjects: np.ndarray  # str [n]

    @property
    def positive(self) -> np.ndarray:
        """bool [n]: which images have a pixel of the mask."""
        return self.masks.max((1, 2)) > 127

    def of(self, rows: np.ndarray) -> "Masked":
        """The records at `rows`."""
        keys = [self.keys[row] for row in rows.tolist()]
        return Masked(self.images[rows], self.masks[rows], keys, self.subjects[rows])


def read(records: shards.Records, config: Any, split: str) -> Masked:
    """The images and masks of a split; of "train" a balanced part if `config.data.balanced`.

    That part is all records with the mask, and as many without, drawn by `config.seed`. Raises
    UserError for a set without masks of that name.
    """
    name, size = config.data.mask, config.data.size
    known = [n for n in schema.optional_fields(records.features(0)) if schema.is_mask(n)]
    if name not in known:
        raise UserError(
            f"config.data.mask: {name}: {records.directory} has "
            f"{'the masks ' + ', '.join(known) if known else 'no masks'}: name one of them, or "
            "ingest a source with masks"
        )
    images = np.empty((len(records), size, size), np.uint8)
    masks = np.empty_like(images)
    for row in range(len(records)):
        stored = records.features(row)
        images[row] = decode.square(shards.value(stored, "image"), size)
        masks[row] = decode.square(shards.value(stored, name), size)
    whole = Masked(images, masks, records.keys, np.array(records.subjects()))
    if split != "train" or not config.data.balanced:
        return whole
    positive = whole.positive
    rank = [splits.unit(config.seed, f"balance/{key}") for key in whole.keys]
    negatives = [row for row in np.argsort(rank).tolist() if not positive[row]]
    kept = np.sort([*np.flatnonzero(positive), *negatives[: positive.sum()]])
    log.say(f"training set balanced: {positive.sum()} with {name}, {len(kept)} in all")
    return whole.of(kept)


def check_masks(data: Mapping[str, Masked], config: Any) -> None:
    """Raise UserError for a split without any pixel of the mask; print the numbers of images."""
    for split, part in data.items():
        if not part.positive.any():
            raise UserError(
                f"config.data.mask: {config.data.mask}: none of the {len(part.keys)} images of the "
                f"{split} split has a pixel of it: use another mask, or more data"
            )
    counts = ", ".join(f"{s} {p.positive.sum()} of {len(p.keys)}" for s, p in data.items())
    log.say(f"images with {config.data.mask}: {counts}")


def make_fractions(config: Any, workdir: Path, train: Masked) -> dict[str, np.ndarray]:
    """Name -> rows int32 [s, k] of each seed, of the fractions with a positive for every seed."""
    fractions, positive = {}, train.positive
    for share in config.fractions:
        name, classes = f"{100 * share:g}%", positive.astype(int)
        rows = label_subsets(config, workdir, share, train.keys, classes, train.subjects)
        lacking = [config.seed + i for i, r in enumerate(rows) if not positive[r[r >= 0]].any()]
        if lacking:
            log.say(
                f"{name} of the labels: no figure: the images of seed "
                f"{', '.join(map(str, lacking))} have no pixel of {config.data.mask}"
            )
        else:
            fractions[name] = rows
    if not fractions:
        raise UserError(
            f"config.fractions: {config.fractions}: none has an image with {config.data.mask} for "
            "every seed: use larger fractions, or more data"
        )
    return fractions


class Programs(NamedTuple):
    """The compiled functions of one architecture, for all its encoders, fractions and seeds."""

    start: Callable[..., State]  # key, encoder's params and stats, whether its maps are stored
    step: Callable[[State, dict[str, jax.Array], jax.Array], tuple[State, Any]]
    judge: Callable[[Any, Any, dict[str, jax.Array]], tuple[segment.Sums, jax.Array]]


def segment_by(
    config: Any,
    programs: Programs,
    name: str,
    encoders: Sequence[Encoder],
    data: Mapping[str, Masked],
    fractions: Mapping[str, np.ndarray],
    mesh: Mesh,
) -> dict[str, Figure]:
    """Figures on the test split, `<fraction>/<figure>` -> Figure.

    encoders: one for all seeds, or one for each.
    """
    pixels: dict[str, list[np.ndarray]] = {fraction: [] for fraction in fractions}
    sources: dict[str, frozen.Arrays] = {}
    for i in range(config.seeds):
        encoder = encoders[min(i, len(encoders) - 1)]
        if i < len(encoders):
            sources.clear()  # frees the maps of the encoder before
            sources = make_sources(config, encoder, data, mesh)
        for fraction, rows in fractions.items():
            where = f"{name}, {fraction} of the labels, seed {config.seed + i}"
            subset = rows[i][rows[i] >= 0]
            counts = fit(config, programs, encoder, sources, subset, config.seed + i, where)
            pixels[fraction].append(counts)
    figures = {}
    for fraction, counts in pixels.items():
        shared, predicted, truth = np.stack(counts, 1)
        judged = metrics.Pixels(shared, predicted, truth[0])
        by_name = metrics.overlaps(judged, data["test"].subjects, config.fit.batch_size)
        figures |= {f"{fraction}/{key}": figure for key, figure in by_name.items()}
    return figures


def make_sources(
    config: Any, encoder: Encoder, data: Mapping[str, Masked], mesh: Mesh
) -> dict[str, frozen.Arrays]:
    """Of each split, the masks with the stored maps of a frozen encoder ("map0" and so on), or
    with the images if the encoder is tuned, in training mode, or its maps do not fit in memory."""
    maps = None
    if config.encoder.frozen and not config.encoder.training_mode:
        every = frozen.Arrays(image=np.concatenate([part.images for part in data.values()]))
        sizes = {k: config.data[k] for k in ("batch_size", "threads", "memory_mib")}
        maps = features.pyramids(encoder, every, mesh, **sizes, name=", ".join(data))
    sources, start = {}, 0
    for split, part in data.items():
        stop = start + len(part.keys)
        seen = {"image": part.images}
        if maps is not None:
            seen = {f"map{i}": x[start:stop] for i, x in enumerate(maps)}
        sources[split] = frozen.Arrays(mask=part.masks, **seen)
        start = stop
    return sources


def make_programs(config: Any, encoder: Encoder) -> Programs:
    """Programs for encoders of this structure and preparation; `_forward` says what a state is."""
    size, dtype = config.data.size, jnp.dtype(config.dtype)
    maps = jax.eval_shape(
        Encoder.pyramid, encoder, jax.ShapeDtypeStruct((1, size, size), jnp.uint8)
    )
    channels, sides = ([x.shape[axis] for x in maps] for axis in (-1, 1))
    widths = tuple(config.decoder.widths) or segmenter.widths(channels, sides, size)
    if len(widths) < len(channels):
        raise UserError(
            f"config.decoder.widths: {widths}: give one for each feature map of the encoder, "
            f"{len(channels)} or more"
        )

    def make(rngs: nnx.Rngs) -> segmenter.Decoder:
        return segmenter.Decoder(channels, widths, dtype=dtype, rngs=rngs)

    structure, *_ = states.shapes(make)
    tx = optax.adamw(config.fit.learning_rate, weight_decay=config.fit.weight_decay)
    forward = partial(_forward, config, encoder.structure, dict(encoder.pixels), structure)

    def start(key: jax.Array, weights: Any, running: Any, stored: bool) -> State:
        _, params, stats = layers.split(make(nnx.Rngs(key)))
        params, stats = {"decoder": params}, {"decoder": stats}
        if not stored:
            (stats if config.encoder.frozen else params)["encoder"] = weights
            stats["statistics"] = running
        return states.initial(tx, params, stats)

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        logits, truth, stats = forward(params, stats, batch, key)
        loss, parts = segment.loss(segment.sums(logits, truth))
        return loss, (stats, parts)

    def judge(params: Any, stats: Any, batch: dict[str, jax.Array]) -> tuple:
        logits, truth, _ = forward(params, stats, batch, None)
        a, b = logits > 0, truth > 0.5
        counts = jnp.stack([x.sum((1, 2)) for x in (a & b, a, b)], 1)
        return segment.sums(logits, truth), counts

    device = meshes.replicated(meshes.one_device())
    started = jax.jit(start, static_argnums=3, out_shardings=device)
    step = jax.jit(steps.make_step(loss_fn, tx), donate_argnums=0, out_shardings=device)
    return Programs(started, step, jax.jit(judge, out_shardings=device))


def _forward(
    config: Any,
    encoder: Any,
    pixels: Mapping[str, Any],
    decoder: Any,
    params: Any,
    stats: Any,
    batch: dict[str, jax.Array],
    key: jax.Array | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """Logits and truth [b, s, s] of a batch, and the statistics after it.

    encoder, decoder: structures. params: of the "decoder" and, where it is tuned, the "encoder".
    stats: of the "decoder"; without stored maps also the encoder's "statistics" and, where it is
    frozen, its parameters, "encoder". key: for augmentation in training; None in evaluation.
    """
    stats = dict(stats)
    if "map0" in batch:
        maps = [batch[f"map{i}"] for i in range(sum(name.startswith("map") for name in batch))]
        truth = batch["mask"].astype(jnp.float32) / 255
    else:
        if key is None:
            x = transforms.normalize(batch["image"], **{**pixels, "upsample": 0})
            truth = batch["mask"].astype(jnp.float32) / 255
        else:
            levels = {k: v for k, v in pixels.items() if k != "upsample"}
            pair = (batch["image"], batch["mask"])
            x, truth = transforms.augment_pair(key, *pair, **config.augment, **levels)
        tuned = "encoder" in params
        weights = params["encoder"] if tuned else stats["encoder"]
        in_training = (tuned or config.encoder.training_mode) and key is not None
        model = nnx.merge(encoder, weights, stats["statistics"], copy=True)
        maps = model.pyramid(x, train=in_training)
        stats["statistics"] = layers.statistics(model)
    model = nnx.merge(decoder, params["decoder"], stats["decoder"], copy=True)
    logits = model(maps, config.data.size, train=key is not None)
    stats["decoder"] = layers.statistics(model)
    return logits, truth, stats


def fit(
    config: Any,
    programs: Programs,
    encoder: Encoder,
    sources: Mapping[str, frozen.Arrays],
    rows: np.ndarray,
    seed: int,
    where: str,
) -> np.ndarray:
    """Pixels of each test image, int [3, n]: in both masks, predicted, true; after a fit to the
    training records at `rows`."""
    mesh = meshes.one_device()

    def judged(params: Any, stats: Any, split: str) -> tuple[segment.Sums, np.ndarray]:
        judge = partial(programs.judge, params, stats)
        return frozen.over(judge, sources[split], mesh, config.data.batch_size)

    def score(state: State) -> float:
        of_valid, _ = judged(state["params"], state["stats"], "valid")
        return float(segment.loss(jax.tree.map(jnp.asarray, of_valid))[0])

    stored = "map0" in sources["train"].arrays
    state = programs.start(jax.random.key(seed), encoder.params, encoder.stats, stored)
    settings = {k: config.fit[k] for k in ("batch_size", "epochs", "steps", "patience")}
    start = time.monotonic()
    train, whose = sources["train"], {"seed": seed, "where": f" of {where}"}
    best = heads.fit(programs.step, state, score, train, rows, mesh, **settings, **whose)
    log.say(
        f"{where} ({len(rows)} images): validation loss {best.score:.4f} at epoch "
        f"{best.best_epoch} of {best.epochs}, {time.monotonic() - start:.0f} s"
    )
    return judged(best.params, best.stats, "test")[1].T
