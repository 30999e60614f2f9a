"""Segmentation of one structure: a decoder on frozen or tuned encoders at label fractions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import checks, log, outputs, regions
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.data.images import decode, transforms
from medsyn_jax.data.store import schema, shards, splits
from medsyn_jax.models import layers, segmenter
from medsyn_jax.objectives import segment
from medsyn_jax.tables import examples
from medsyn_jax.train import checkpoint, corpus, dense
from medsyn_jax.train import state as states
from medsyn_jax.train.fractions import with_positives
from medsyn_jax.train.frozen import Encoder

FREE = dense.FREE
DECODERS = ("unet", "mlp")
_MLP_MAPS = 4  # SegFormer's strides 4 to 32
_MLP_NARROWEST = 32  # channels by default


def run(config: Any, workdir: Path) -> None:
    """Train decoders on the pre-trained, the untrained and, if given, the ImageNet encoder.

    Writes results.json with `<encoder>/test/<fraction>/<figure>` for the figures of
    `regions.overlaps`; `pretrained-random/...` are differences of the two encoders. Each seed has
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
    encoders = dense.encoders(config)
    programs = dense.by_preparation(encoders, partial(make_programs, config))
    outputs.write_config(workdir, config)
    figures = {
        name: segment_by(
            config, programs[each[0].pixels], name, each, data, fractions, mesh, workdir
        )
        for name, each in encoders.items()
    }
    outputs.write_results(workdir, "segment", dense.entries(figures))
    log.say_cost("done")


def _check_widths(config: Any) -> None:
    widths, kind = config.decoder.widths, config.decoder.kind
    if not all(isinstance(x, int) and x > 0 for x in widths):
        raise UserError(f"config.decoder.widths: {widths}: give whole numbers above 0, or ()")
    if kind == "mlp" and len(widths) > 1:
        raise UserError(f"config.decoder.widths: {widths}: give one for the kind mlp, or ()")


CHECKS = (
    *dense.RULES,
    checks.choice("decoder.kind", DECODERS),
    checks.numbers("share", "augment", "probability"),
    checks.numbers("above 0", "augment", "zoom"),
    checks.numbers("from 0", "augment", "rotate"),
    checks.ranges("augment", "zoom"),
    _check_widths,
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

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What a batch holds of the records."""
        return {"image": self.images, "mask": self.masks}

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
    truth = np.empty_like(images)
    for row in range(len(records)):
        stored = records.features(row)
        images[row] = decode.square(shards.value(stored, "image"), size)
        truth[row] = decode.square(shards.value(stored, name), size)
    whole = Masked(images, truth, records.keys, np.array(records.subjects()))
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
    subjects, what = train.subjects, f"pixel of {config.data.mask}"
    return with_positives(config, workdir, train.keys, subjects, train.positive, what)


def segment_by(
    config: Any,
    programs: dense.Programs,
    name: str,
    encoders: Sequence[Encoder],
    data: Mapping[str, Masked],
    fractions: Mapping[str, np.ndarray],
    mesh: Mesh,
    workdir: Path | None = None,
) -> dict[str, Figure]:
    """Figures on the test split, `<fraction>/<figure>` -> Figure.

    encoders: one for all seeds, or one for each. workdir: where the pictures of the first seed go.
    """

    def score(of_valid: tuple[segment.Sums, np.ndarray, np.ndarray]) -> float:
        return float(segment.loss(jax.tree.map(jnp.asarray, of_valid[0]))[0])

    parts = {split: part.arrays for split, part in data.items()}
    judged = dense.fit_all(
        config,
        programs,
        score,
        "validation loss {:.4f}".format,
        encoders,
        parts,
        fractions,
        mesh,
        name=name,
        stored=config.encoder.frozen and not config.encoder.training_mode,
        coarsest=_coarsest(config),
    )
    figures, test = {}, data["test"]
    rows = examples.chosen(test.keys, test.positive)
    for fraction, by_seed in judged.items():
        if workdir:
            masks = np.unpackbits(by_seed[0][2][rows], axis=-1, count=config.data.size) > 0
            path = examples.path(workdir, name, fraction)
            examples.draw_masks(path, test.images[rows], test.masks[rows] > 127, masks)
        counts = np.stack([counts.T for _, counts, _ in by_seed], 1)  # [3, s, n]
        pixels = regions.Pixels(counts[0], counts[1], counts[2, 0])
        by_name = regions.overlaps(pixels, test.subjects, config.fit.batch_size)
        figures |= {f"{fraction}/{key}": figure for key, figure in by_name.items()}
    return figures


def make_programs(config: Any, encoder: Encoder) -> dense.Programs:
    """Programs for encoders of this structure and preparation."""
    size, dtype = config.data.size, jnp.dtype(config.dtype)
    shapes = dense.map_shapes(encoder, size)[-_coarsest(config) :]
    channels, sides = ([shape[axis] for shape in shapes] for axis in (-1, 1))
    light = config.decoder.kind == "mlp"
    default = (
        (max(channels[-1] >> 3, _MLP_NARROWEST),)
        if light
        else segmenter.widths(channels, sides, size)
    )
    widths = tuple(config.decoder.widths) or default
    if not light and len(widths) < len(channels):
        raise UserError(
            f"config.decoder.widths: {widths}: give one for each feature map of the encoder, "
            f"{len(channels)} or more"
        )

    def make(rngs: nnx.Rngs) -> segmenter.Decoder | segmenter.MLPDecoder:
        if light:
            return segmenter.MLPDecoder(channels, widths[0], dtype=dtype, rngs=rngs)
        return segmenter.Decoder(channels, widths, dtype=dtype, rngs=rngs)

    structure, *_ = states.shapes(make)
    forward = partial(_forward, config, encoder.structure, dict(encoder.pixels), structure)

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        logits, truth, stats = forward(params, stats, batch, key)
        loss, parts = segment.loss(segment.sums(logits, truth))
        return loss, (stats, parts)

    def judge(params: Any, stats: Any, batch: dict[str, jax.Array]) -> tuple:
        logits, truth, _ = forward(params, stats, batch, None)
        a, b = logits > 0, truth > 0.5
        counts = jnp.stack([x.sum((1, 2)) for x in (a & b, a, b)], 1)
        return segment.sums(logits, truth), counts, jnp.packbits(a, axis=-1)

    return dense.make_programs(config.fit, config.encoder.frozen, make, loss_fn, judge)


def _coarsest(config: Any) -> int:
    """The number of the encoder's maps that the decoder sees, 0 for all."""
    return _MLP_MAPS if config.decoder.kind == "mlp" else 0


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

    encoder, decoder: structures. params, stats: of `dense.Programs`. key: for augmentation in
    training; None in evaluation.
    """
    stats, truth = dict(stats), batch["mask"].astype(jnp.float32) / 255
    if dense.are_stored(batch):
        maps = dense.stored_maps(batch)
    else:
        if key is None:
            x = transforms.normalize(batch["image"], **{**pixels, "upsample": 0})
        else:
            levels = {k: v for k, v in pixels.items() if k != "upsample"}
            pair = (batch["image"], batch["mask"])
            x, truth = transforms.augment_pair(key, *pair, **config.augment, **levels)
        moving = key is not None and (config.encoder.training_mode or not config.encoder.frozen)
        maps, stats["statistics"] = dense.run_encoder(encoder, params, stats, x, moving)
    model = nnx.merge(decoder, params["head"], stats["head"], copy=True)
    logits = model(maps[-_coarsest(config) :], config.data.size, train=key is not None)
    stats["head"] = layers.statistics(model)
    return logits, truth, stats
