"""YOLOv3's targets, loss and detections (Redmon and Farhadi, arXiv 1804.02767), as MGCA trains it.

Boxes are (left, top, right, bottom) in pixels of the image, padded to one number an image; a class
of -1 marks padding. All shapes are fixed, so boxes of any number compile once. There are three
scales; a map of n x n cells divides the image into n x n squares and has three anchors in each.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

Rule = Literal["mended", "mgca"]
RULES = ("mended", "mgca")
MOST = 100  # detections an image, as COCO and MGCA count them
# Width and height in pixels of an image of 416 x 416, for the coarse, middle and fine map.
_ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)


class Targets(NamedTuple):
    """What one map should say, for each cell (row, column) and anchor."""

    positive: Bool[Array, "b n n 3"]  # an object
    negative: Bool[Array, "b n n 3"]  # no object; what is neither teaches nothing about objects
    box: Float[Array, "b n n 3 4"]  # x, y in the cell, ln of width, height by the anchor's
    label: Int[Array, "b n n 3"]  # class of the object


class Detections(NamedTuple):
    """Boxes by falling score, padded with class -1; a score is the logarithm of a probability."""

    boxes: Float[Array, "*b k 4"]
    scores: Float[Array, "*b k"]
    labels: Int[Array, "*b k"]


def anchors(size: int) -> list[Float[np.ndarray, "3 2"]]:
    """Widths and heights in pixels of an image of `size` x `size`, from the coarse to the fine map.

    At 224, MGCA's: 62.46 x 48.46 to 17.77 x 12.38.
    """
    return list(np.array(_ANCHORS, np.float32) * np.float32(size / 416))


def targets(
    boxes: Float[Array, "b m 4"],
    labels: Int[Array, "b m"],
    shapes: Float[Array | np.ndarray, "3 2"],
    cells: int,
    size: int,
    rule: Rule = "mended",
) -> Targets:
    """The targets of a map of `cells` x `cells` with anchors of `shapes` in pixels.

    Each box has one positive in every map: in the cell of its centre, the anchor of the most
    similar shape. A later box overwrites an earlier one of the same cell and anchor. Similarity is
    the IoU of shapes in cells, each side lengthened by 1. The anchors of that cell with a
    similarity above 0.5 are no negatives.

    rule: "mgca" is its code, where a positive with a similarity of 0.5 or less is a negative as
    well and learns 1 and 0 at once; with "mended" a positive is never a negative.
    """
    one = partial(_targets, shapes=jnp.asarray(shapes), cells=cells, size=size, rule=rule)
    return jax.vmap(one)(boxes, labels)


def _targets(
    boxes: Array, labels: Array, shapes: Array, cells: int, size: int, rule: Rule
) -> Targets:
    scale, real = cells / size, labels >= 0
    anchor = shapes * scale
    centre = (boxes[:, :2] + boxes[:, 2:]) * (scale / 2)
    side = (boxes[:, 2:] - boxes[:, :2]) * scale
    column, row = jnp.clip(jnp.floor(centre).astype(jnp.int32), 0, cells - 1).T
    both = (jnp.minimum(side[:, None], anchor[None]) + 1).prod(-1)
    similar = both / ((side + 1).prod(-1)[:, None] + (anchor + 1).prod(-1)[None] - both)
    number = jnp.where(real, jnp.arange(len(labels)), -1)
    owner = jnp.full((cells, cells, 3), -1).at[row, column, similar.argmax(-1)].max(number)
    near = (similar > 0.5) & real[:, None]
    neutral = jnp.zeros((cells, cells, 3), bool).at[row, column].max(near)
    positive = owner >= 0
    if rule == "mended":
        neutral |= positive
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(cells)] * 2), -1).astype(jnp.float32)[:, :, None]
    place = centre[owner] - grid
    logs = jnp.log(side[owner] / anchor[None, None] + 1e-16)
    box = jnp.where(positive[..., None], jnp.concatenate([place, logs], -1), 0.0)
    return Targets(positive, ~neutral, box, jnp.where(positive, labels[owner], 0))


def map_losses(outputs: Float[Array, "b n n o"], target: Targets) -> Float[Array, " b"]:
    """The loss of each image from one map, in fp32; MGCA's is the mean over the batch.

    Of every positive: 2.5 times the cross-entropy of x and y, 2.5 times the squared error of the
    logarithms of width and height, the cross-entropies of object and class; of every negative, half
    the cross-entropy of no object. All are divided by the number of cells times anchors.

    outputs: channel (5 + classes) anchor + (x, y, w, h, object, classes), as logits but for w, h.
    """
    raw = _by_anchor(outputs)
    entropy = optax.losses.sigmoid_binary_cross_entropy
    classes = jax.nn.one_hot(target.label, raw.shape[-1] - 5)
    xy, wh = entropy(raw[..., :2], target.box[..., :2]), raw[..., 2:4] - target.box[..., 2:]
    presence = raw[..., 4]
    of_positive = (
        2.5 * (xy.sum(-1) + jnp.square(wh).sum(-1))
        + entropy(presence, jnp.ones_like(presence))
        + entropy(raw[..., 5:], classes).sum(-1)
    )
    of_negative = 0.5 * entropy(presence, jnp.zeros_like(presence))
    terms = jnp.where(target.positive, of_positive, 0) + jnp.where(target.negative, of_negative, 0)
    return terms.mean((1, 2, 3))


def losses(
    outputs: Sequence[Float[Array, "b _ _ o"]],
    boxes: Float[Array, "b m 4"],
    labels: Int[Array, "b m"],
    *,
    size: int,
    rule: Rule = "mended",
) -> Float[Array, " b"]:
    """The loss of each image: the sum of `map_losses` over the maps, the coarse one first."""
    total = jnp.zeros(len(boxes))
    for output, shapes in zip(outputs, anchors(size), strict=True):
        total += map_losses(output, targets(boxes, labels, shapes, output.shape[1], size, rule))
    return total


def _by_anchor(outputs: Float[Array, "b n n o"]) -> Float[Array, "b n n 3 c"]:
    return outputs.astype(jnp.float32).reshape(*outputs.shape[:3], 3, -1)


def candidates(outputs: Sequence[Float[Array, "b _ _ o"]], size: int) -> Detections:
    """A box of every cell and anchor of all maps, coarse to fine, in pixels; not sorted.

    The score is that of an object, times that of its most probable class where there are several.
    """
    parts = []
    for output, shapes in zip(outputs, anchors(size), strict=True):
        raw, cells = _by_anchor(output), output.shape[1]
        stride = size / cells
        grid = jnp.stack(jnp.meshgrid(*[jnp.arange(cells)] * 2), -1).astype(jnp.float32)
        centre = (jax.nn.sigmoid(raw[..., :2]) + grid[None, :, :, None]) * stride
        # e^10 is far beyond any image; without a limit an infinite box has an undefined IoU
        side = jnp.exp(jnp.minimum(raw[..., 2:4], 10.0)) * shapes[None, None, None]
        boxes = jnp.concatenate([centre - side / 2, centre + side / 2], -1)
        scores = jax.nn.log_sigmoid(raw[..., 4])
        if raw.shape[-1] > 6:
            scores += jax.nn.log_sigmoid(raw[..., 5:]).max(-1)
        parts.append((boxes, scores, raw[..., 5:].argmax(-1)))
    b = len(outputs[0])
    boxes, scores, labels = (
        jnp.concatenate([x.reshape(b, -1, *x.shape[4:]) for x in field], 1)
        for field in zip(*parts, strict=True)
    )
    return Detections(boxes, scores, labels)


def iou(a: Float[Array, "*b 4"], b: Float[Array, "*b 4"], plus: float = 0.0) -> Float[Array, "*b"]:
    """Intersection over union of boxes, each side lengthened by `plus`; 0 where both are empty."""

    def area(low: Array, high: Array) -> Array:
        return jnp.maximum(high - low + plus, 0).prod(-1)

    both = area(jnp.maximum(a[..., :2], b[..., :2]), jnp.minimum(a[..., 2:], b[..., 2:]))
    union = area(a[..., :2], a[..., 2:]) + area(b[..., :2], b[..., 2:]) - both
    return both / jnp.maximum(union, 1e-16)


def suppress(
    every: Detections, *, least: float, overlap: float, plus: float = 0.0, most: int = MOST
) -> Detections:
    """Greedy non-maximum suppression of each class: up to `most` boxes an image, by falling score.

    least: probability of a box that is kept. A box whose IoU (see `iou`) with a kept box of its
    class is `overlap` or more is dropped. Of equal scores the first is taken.
    """
    b, n = every.scores.shape
    steps = min(most, n)
    place = jnp.arange(b)

    def some_alive(state: tuple[Array, ...]) -> Array:
        step, alive, *_ = state
        return (step < steps) & alive.any()

    def keep(state: tuple[Array, ...]) -> tuple[Array, ...]:
        step, alive, rows, kept = state
        best = jnp.where(alive, every.scores, -jnp.inf).argmax(1)
        chosen = jnp.broadcast_to(every.boxes[place, best][:, None], every.boxes.shape)
        near = iou(chosen, every.boxes, plus) >= overlap
        gone = near & (every.labels == every.labels[place, best][:, None])
        rows, kept = rows.at[:, step].set(best), kept.at[:, step].set(alive[place, best])
        return step + 1, (alive & ~gone).at[place, best].set(False), rows, kept

    start = (jnp.zeros((), int), jnp.exp(every.scores) >= least, jnp.zeros((b, steps), int))
    *_, rows, kept = jax.lax.while_loop(some_alive, keep, (*start, jnp.zeros((b, steps), bool)))
    boxes, scores, labels = (x[place[:, None], rows] for x in every)
    boxes = jnp.where(kept[..., None], boxes, 0)
    return Detections(boxes, jnp.where(kept, scores, -jnp.inf), jnp.where(kept, labels, -1))
