"""Mean average precision of detections, with matches by pycocotools (Lin et al., COCO).

pycocotools knows no resamples, so the precision over recall is computed here, for all resamples at
once; `tests/core/test_detection.py` compares it with pycocotools' own.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from medsyn_jax.core import estimates
from medsyn_jax.core.estimates import Figure

# By linspace: np.arange makes thresholds that differ from the decimal ones in the last digit.
MGCA = np.linspace(0.4, 0.75, 8)
STANDARD = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
MOST = 100  # detections of a class an image
_BLOCK = 2**23  # weights of detections held at a time: 64 MB


class Boxes(NamedTuple):
    """Boxes (left, top, right, bottom) of n images, padded to k an image with label -1.

    Detections have scores of any scale; where they are equal, the earlier image comes first, and in
    an image the earlier box.
    """

    corners: np.ndarray  # float [n, k, 4]
    labels: np.ndarray  # int [n, k]
    scores: np.ndarray | None = None  # float [n, k]


class Matches(NamedTuple):
    """The detections of one class on n images by falling score, and which of them hit a box."""

    image: np.ndarray  # int [d]
    hit: np.ndarray  # bool [t, d], by threshold of IoU
    truth: np.ndarray  # int [n]: boxes of each image


def match(
    detections: Boxes,
    truth: Boxes,
    classes: int,
    thresholds: np.ndarray,
    counted: np.ndarray | None = None,
) -> list[Matches]:
    """The matches of each class; an IoU of a threshold or more is a hit.

    counted: bool [n], the images that take part (default all). Raises ValueError for scores that
    are not finite.
    """
    n = len(truth.labels)
    images = np.arange(n)[slice(None) if counted is None else counted]
    assert detections.scores is not None
    if not np.isfinite(detections.scores[detections.labels >= 0]).all():
        raise ValueError("detection: scores are not finite")
    # In images without a box no detection is a hit, and pycocotools would take most of its time.
    boxed = (truth.labels[images] >= 0).any(axis=1)
    empty, images = images[~boxed], images[boxed].tolist()
    with contextlib.redirect_stdout(io.StringIO()):
        real, predicted = (_coco(boxes, images, classes) for boxes in (truth, detections))
        evaluation = COCOeval(real, predicted, "bbox")
        evaluation.params.iouThrs = thresholds
        evaluation.params.maxDets = [MOST]
        evaluation.params.areaRng = evaluation.params.areaRng[:1]
        evaluation.params.areaRngLbl = evaluation.params.areaRngLbl[:1]
        evaluation.evaluate()
    shape = (classes, len(images))
    results = np.array([*evaluation.evalImgs, None], object)[:-1].reshape(shape)
    matches = []
    for c, row in enumerate(results):
        missed = _missed(detections, c, empty, len(thresholds))
        every = sorted([*filter(None, row), *missed], key=itemgetter("image_id"))
        matches.append(_matches(every, n, len(thresholds)))
    return matches


def _missed(
    detections: Boxes, label: int, images: np.ndarray, thresholds: int
) -> Iterator[dict[str, Any]]:
    """pycocotools' results for the detections of a class in images without any box."""
    assert detections.scores is not None
    for image in images.tolist():
        scores = detections.scores[image][detections.labels[image] == label]
        scores = -np.sort(-scores)[:MOST]
        none = np.zeros((thresholds, len(scores)))
        own = {"dtIds": scores, "dtScores": scores, "dtMatches": none}
        yield {"image_id": image, "gtIds": [], **own}


def _coco(boxes: Boxes, images: list[int], classes: int) -> Any:
    at, place = np.nonzero(boxes.labels[images] >= 0)
    at = np.asarray(images, int)[at]
    corners = boxes.corners[at, place].astype(float)
    sides = corners[:, 2:] - corners[:, :2]
    columns = {
        "id": range(1, len(at) + 1),  # 0 would mean "unmatched"
        "image_id": at.tolist(),
        "category_id": boxes.labels[at, place].tolist(),
        "bbox": np.concatenate([corners[:, :2], sides], axis=1).tolist(),
        "area": sides.prod(axis=1).tolist(),
        "iscrowd": [0] * len(at),
    }
    if boxes.scores is not None:
        columns["score"] = boxes.scores[at, place].tolist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    # Every image, also one without boxes; equal scores are ordered by its number.
    categories, numbers = [{"id": c} for c in range(classes)], [{"id": i} for i in images]
    coco: Any = COCO()
    coco.dataset = {"images": numbers, "categories": categories, "annotations": rows}
    coco.createIndex()
    return coco


def _matches(results: list[dict], n: int, thresholds: int) -> Matches:
    truth = np.zeros(n, int)
    for result in results:
        truth[result["image_id"]] = len(result["gtIds"])
    counts = [len(result["dtIds"]) for result in results]
    image = np.repeat([result["image_id"] for result in results], counts).astype(int)
    scores = np.concatenate([np.zeros(0), *(result["dtScores"] for result in results)])
    none = np.zeros((thresholds, 0), bool)
    hit = np.concatenate([none, *(result["dtMatches"] > 0 for result in results)], axis=1)
    order = np.argsort(-scores, kind="mergesort")
    return Matches(image[order], hit[:, order], truth)


def average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    """Precision at 101 recalls, interpolated as COCO's, of every resample and threshold, [r, t].

    weights: [r, n] >= 0, one row a resample. 0 without detections; NaN without a box.
    """
    rows = max(1, _BLOCK // max(len(matches.image), 1))
    parts = [weights[i : i + rows] for i in range(0, len(weights), rows)]
    return np.concatenate([_average_precision(matches, part.astype(float)) for part in parts])


def _average_precision(matches: Matches, weights: np.ndarray) -> np.ndarray:
    boxes = weights @ matches.truth
    of_detection = weights[:, matches.image]
    so_far = np.cumsum(of_detection, axis=1)
    values = np.empty((len(weights), len(matches.hit)))
    for column, hit in enumerate(matches.hit):
        at = np.flatnonzero(hit)  # precision falls between hits: only there it can be highest
        hits = np.cumsum(of_detection[:, at], axis=1)
        precision = hits / np.maximum(so_far[:, at], 1)
        best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recall = hits / np.maximum(boxes, 1)[:, None]
        reached = np.searchsorted(RECALLS, recall, side="right")
        values[:, column] = (best * np.diff(reached, axis=1, prepend=0)).sum(axis=1)
    return np.where(boxes[:, None] > 0, values / len(RECALLS), np.nan)


def mean_average_precision(
    detections: Boxes, truth: Boxes, classes: int, thresholds: np.ndarray = MGCA
) -> float:
    """The mean over thresholds and the classes that have boxes, by the strict rules of `figures`.

    NaN if no class has a box.
    """
    matches = match(detections, truth, classes, thresholds)
    return float(_means(matches, np.ones((1, len(truth.labels))), [slice(None)])[0, 0])


def mgca_images(detections: Boxes, truth: Boxes) -> np.ndarray:
    """bool [n]: the images that MGCA's code counts: those with a box and with a detection, so that
    neither a miss of a whole image nor a false alarm on an image without boxes costs anything."""
    return (truth.labels.max(axis=1) >= 0) & (detections.labels.max(axis=1) >= 0)


def mgca_mean_average_precision(detections: Boxes, truth: Boxes, classes: int) -> float:
    """The mean average precision of MGCA's code; NaN, where that code says -1, without an image."""
    matches = _mgca_matches(detections, truth, classes)
    return float(_means(matches, np.ones((1, len(truth.labels))), [slice(None)])[0, 0])


def _mgca_matches(detections: Boxes, truth: Boxes, classes: int) -> list[Matches]:
    above = np.nextafter(MGCA, 1)  # strictly above the threshold
    return match(detections, truth, classes, above, mgca_images(detections, truth))


def figures(
    runs: Sequence[Boxes], truth: Boxes, names: Sequence[str], subjects: np.ndarray
) -> dict[str, Figure]:
    """Figures of the detections of s runs on n images, with intervals over subjects [n].

    `map`: mean over IoU 0.40, 0.45 ... 0.75 and over the classes that have boxes, at most 100
    detections an image, equal to pycocotools; a missed image and a false alarm count. `map_coco`:
    over 0.50 ... 0.95. `ap50`: at 0.50. `map/<class>`: of each class, where there are several.
    `map_mgca`: as MGCA's code counts (see `mgca_images`); undefined where it counts no image.
    """
    classes, n = len(names), len(truth.labels)
    thresholds = np.concatenate([MGCA, STANDARD])
    strict = [match(run, truth, classes, thresholds) for run in runs]
    loose = [_mgca_matches(run, truth, classes) for run in runs]
    whole, mgca = slice(None), round(np.mean([mgca_images(run, truth).sum() for run in runs]))
    kinds = [
        (["map", "map_coco", "ap50"], strict, [slice(0, 8), slice(8, 18), slice(8, 9)], n),
        (["map_mgca"], loose, [whole], mgca),
    ]
    if classes > 1:
        for c, name in enumerate(names):
            if strict[0][c].truth.any():
                kinds.append(([f"map/{name}"], [[run[c]] for run in strict], [slice(0, 8)], n))
    entries: dict[str, Figure] = {}
    for titles, by_run, parts, images in kinds:

        def statistic(w: np.ndarray, by_run=by_run, parts=parts) -> np.ndarray:
            return np.stack([_means(matches, w, parts) for matches in by_run], axis=1)

        every = estimates.figure(statistic, np.ones(n, bool), subjects)  # values [s, k]
        boxes = sum(int(matches.truth.sum()) for matches in by_run[0])
        for k, title in enumerate(titles):
            counts = {"boxes": boxes}
            entries[title] = Figure(every.values[:, k], every.draws[..., k], images, counts)
    return entries


def _means(matches: Sequence[Matches], weights: np.ndarray, columns: Sequence[slice]) -> np.ndarray:
    """[r, k]: the mean over each of k sets of thresholds and over the classes that have boxes."""
    values = np.stack([average_precision(m, weights) for m in matches])  # [c, r, t]
    means = np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)
    return np.stack([means[:, part].mean(axis=1) for part in columns], axis=1)
