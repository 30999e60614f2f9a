"""Detection: YOLOv3's head on frozen or tuned encoders at label fractions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from medsyn_jax.core import checks, detection, log, outputs
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.estimates import Figure
from medsyn_jax.data.images import decode, transforms
from medsyn_jax.data.store import schema, shards, splits
from medsyn_jax.models import detector, layers
from medsyn_jax.objectives import detect
from medsyn_jax.tables import examples
from medsyn_jax.train import checkpoint, corpus, dense, fractions
from medsyn_jax.train.frozen import Encoder

FREE = dense.FREE
PROTOCOLS = ("strict", "mgca_compat")
_MAPS = 3  # C3 to C5


def run(config: Any, workdir: Path) -> None:
    """Train detectors on the pre-trained, the untrained and, if given, the ImageNet encoder.

    Writes results.json with `<encoder>/test/<fraction>/<figure>` for the figures of
    `detection.figures`; `pretrained-random/...` are differences of the two encoders. Each seed has
    its own subset, head and order, and its own untrained encoder. Raises UserError for an encoder
    or a data set that does not fit the config.
    """
    run_folder = Path(config.encoder.workdir)
    checkpoint.check_run(run_folder)  # restored after the data are prepared
    mesh = meshes.make_mesh(**config.mesh)
    directory = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    records = {split: shards.open_split(directory, split) for split in splits.SPLITS}
    data, names = read(records, config)
    check_boxes(data, config, names)
    train = data["train"]
    rows = fractions.with_positives(
        config, workdir, train.keys, train.subjects, train.positive, "box"
    )
    encoders = dense.encoders(config)
    programs = dense.by_preparation(encoders, partial(make_programs, config, classes=len(names)))
    outputs.write_config(workdir, config)
    parts = {split: part.arrays for split, part in data.items()}
    figures: dict[str, dict[str, Figure]] = {}
    for name, each in encoders.items():
        judged = dense.fit_all(
            config,
            programs[each[0].pixels],
            partial(score, config.protocol, data["valid"].truth, len(names)),
            described,
            each,
            parts,
            rows,
            mesh,
            name=name,
            stored=config.encoder.frozen and config.protocol == "strict",
            coarsest=_MAPS,
        )
        test = data["test"]
        for fraction, by_seed in judged.items():
            path = examples.path(workdir, name, fraction)
            draw_examples(path, test, boxes_of(by_seed[0].detections))
        figures[name] = {
            f"{fraction}/{key}": figure
            for fraction, by_seed in judged.items()
            for key, figure in detection.figures(
                [boxes_of(x.detections) for x in by_seed], test.truth, names, test.subjects
            ).items()
        }
    outputs.write_results(workdir, "detect", dense.entries(figures))
    log.say_cost("done")


CHECKS = (
    *dense.RULES,
    checks.choice("protocol", PROTOCOLS),
    checks.texts("data", "labels"),
    checks.numbers("count", "detector", "width"),
    checks.numbers("share", "detector", "least overlap"),
)


@dataclass(frozen=True)
class Boxed:
    """The images of one split with their boxes, in memory."""

    images: np.ndarray  # uint8 [n, s, s]
    truth: detection.Boxes  # in pixels of these images
    keys: list[str]
    subjects: np.ndarray  # str [n]

    @property
    def positive(self) -> np.ndarray:
        """bool [n]: which images have a box."""
        return self.truth.labels.max(axis=1) >= 0

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What a batch holds of the records."""
        labels = self.truth.labels.astype(np.int32)
        return {"image": self.images, "boxes": self.truth.corners, "labels": labels}


def read(
    records: Mapping[str, shards.Records], config: Any
) -> tuple[dict[str, Boxed], tuple[str, ...]]:
    """The images and boxes of each split, and the names of the classes: `config.data.labels`, or
    all names of boxes in "train". Raises UserError for a set without boxes, or of other names."""
    stored: dict[str, list[list[dict[str, Any]]]] = {}
    images: dict[str, np.ndarray] = {}
    size, known, names, most = config.data.size, False, set(), 1
    for split, part in records.items():
        images[split], stored[split] = np.empty((len(part), size, size), np.uint8), []
        for row in range(len(part)):
            record = part.features(row)
            known |= "boxes" in schema.optional_fields(record)
            pixels, boxes = shards.value(record, "image"), shards.value(record, "boxes")
            images[split][row] = decode.square(pixels, size)
            scale = np.float32(size / len(pixels))
            stored[split].append([box | {"bbox": box["bbox"] * scale} for box in boxes])
            names |= {box["label"] for box in boxes} if split == "train" else set()
    directory = records["train"].directory
    if not known or not names:
        raise UserError(
            f"config.data.source: {directory} has no boxes{' to train on' if known else ''}: "
            "ingest a source with boxes"
        )
    if unknown := [name for name in config.data.labels if name not in names]:
        raise UserError(
            f"config.data.labels: {', '.join(unknown)}: the boxes of {directory} are of "
            f"{', '.join(sorted(names))}"
        )
    classes = tuple(config.data.labels) or tuple(sorted(names))
    for boxes in stored.values():
        boxes[:] = [[box for box in each if box["label"] in classes] for each in boxes]
        most = max(most, *map(len, boxes))  # of all splits, so that one program fits all
    data = {}
    for split, part in records.items():
        corners = np.zeros((len(part), most, 4), np.float32)
        labels = np.full((len(part), most), -1, np.int32)
        for row, boxes in enumerate(stored[split]):
            for k, box in enumerate(boxes):
                corners[row, k], labels[row, k] = box["bbox"], classes.index(box["label"])
        truth = detection.Boxes(corners, labels)
        data[split] = Boxed(images[split], truth, part.keys, np.array(part.subjects()))
    return data, classes


def check_boxes(data: Mapping[str, Boxed], config: Any, names: Sequence[str]) -> None:
    """Raise UserError for a split without a box; print the numbers of images and of boxes."""
    for split, part in data.items():
        if not part.positive.any():
            raise UserError(
                f"config.data.labels: {', '.join(names)}: none of the {len(part.keys)} images of "
                f"the {split} split has such a box: use other labels, or more data"
            )
        present = [i for i in range(len(names)) if (part.truth.labels == i).any()]
        if lacking := [name for i, name in enumerate(names) if i not in present]:
            log.say(f"no box of {', '.join(lacking)} in the {split} split: left out of its mean")
    counts = ", ".join(
        f"{split} {part.positive.sum()} of {len(part.keys)} ({(part.truth.labels >= 0).sum()})"
        for split, part in data.items()
    )
    log.say(f"images with boxes of {', '.join(names)} (number of boxes): {counts}")


class Judged(NamedTuple):
    """What a detector says of b images: its detections, its loss, and whether it is finite."""

    detections: detect.Detections
    loss: jax.Array  # [b]
    finite: jax.Array  # bool [b]


def make_programs(config: Any, encoder: Encoder, classes: int) -> dense.Programs:
    """Programs for encoders of this structure and preparation. Raises UserError for a ViT, and for
    a size of images whose maps do not double from one to the next."""
    size, dtype, compat = config.data.size, jnp.dtype(config.dtype), config.protocol != "strict"
    shapes = dense.map_shapes(encoder, size)
    if len(shapes) == 1:
        raise UserError(
            "config.encoder.workdir: its encoder is a ViT, which has one map, and the detector "
            "needs those of three scales: use a ResNet"
        )
    sides = [shape[1] for shape in shapes[-_MAPS:]]
    if sides[0] != 4 * sides[-1]:
        raise UserError(
            f"config.data.size: {size}: the encoder's maps have {', '.join(map(str, sides))} rows "
            "and must double from one to the next: use a multiple of 32"
        )

    def make(rngs: nnx.Rngs) -> detector.Detector:
        channels, width = [shape[-1] for shape in shapes[-_MAPS:]], config.detector.width
        return detector.Detector(channels, classes, width, dtype=dtype, rngs=rngs)

    structure = layers.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]
    pixels, rule = dict(encoder.pixels) | {"upsample": 0}, "mgca" if compat else "mended"

    def forward(
        params: Any, stats: Any, batch: dict[str, jax.Array], train: bool
    ) -> tuple[list[jax.Array], jax.Array, Any]:
        stats = dict(stats)
        if dense.are_stored(batch):
            maps = dense.stored_maps(batch)
        else:
            # MGCA's code leaves its frozen encoder in training mode
            moving = train and (compat or not config.encoder.frozen)
            images = transforms.normalize(batch["image"], **pixels)
            maps, running = dense.run_encoder(encoder.structure, params, stats, images, moving)
            stats["statistics"] = running
        model = nnx.merge(structure, params["head"], stats["head"], copy=True)
        logits = model(maps[-_MAPS:], train)
        stats["head"] = layers.statistics(model)
        truth = (batch["boxes"], batch["labels"])
        return logits, detect.losses(logits, *truth, size=size, rule=rule), stats

    def loss_fn(params: Any, stats: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple:
        _, losses, stats = forward(params, stats, batch, True)
        return losses.mean(), (stats, {})

    def judge(params: Any, stats: Any, batch: dict[str, jax.Array]) -> Judged:
        logits, losses, _ = forward(params, stats, batch, False)
        candidates = detect.candidates(logits, size)
        least, overlap = (0.5, 0.5) if compat else (config.detector.least, config.detector.overlap)
        kept = detect.suppress(candidates, least=least, overlap=overlap, plus=float(compat))
        return Judged(kept, losses, jnp.isfinite(candidates.scores).all(1))

    return dense.make_programs(config.fit, config.encoder.frozen, make, loss_fn, judge)


def boxes_of(detections: detect.Detections) -> detection.Boxes:
    """Detections of n images, NumPy, as the metrics read them."""
    boxes, scores, labels = map(np.asarray, detections)
    return detection.Boxes(boxes, labels, scores)


def draw_examples(path: Path, test: Boxed, detections: detection.Boxes) -> None:
    """Draw some of the images that have a box, with their true and detected boxes."""
    rows = examples.chosen(test.keys, test.positive)
    truth = detection.Boxes(test.truth.corners[rows], test.truth.labels[rows])
    corners, labels, scores = (np.asarray(x)[rows] for x in detections)
    predicted = detection.Boxes(corners, labels, np.exp(scores))
    examples.draw_boxes(path, test.images[rows], truth, predicted)


def described(value: float) -> str:
    """A `score` in words."""
    if value < 0:
        return f"validation mean average precision {-value:.4f}"
    return "no box of the validation images detected"


def score(protocol: str, truth: detection.Boxes, classes: int, judged: Judged) -> float:
    """What early stopping minimizes: the negated mean average precision of the validation images.

    With "strict", states whose precision is 0 are ordered by their loss: else the first epochs, in
    which nothing is detected yet, would use up the patience. With "mgca_compat" it is that of
    MGCA's code, where -1 stands for no image that counts. NaN for a state that is not finite.
    """
    if not judged.finite.all():
        return float("nan")
    boxes = boxes_of(judged.detections)
    if protocol == "mgca_compat":
        value = detection.mgca_mean_average_precision(boxes, truth, classes)
        return 1.0 if np.isnan(value) else -value
    value = detection.mean_average_precision(boxes, truth, classes)
    loss = float(judged.loss.mean())
    return -value if value > 0 else loss / (1 + loss)
