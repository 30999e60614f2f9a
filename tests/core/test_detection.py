"""Mean average precision against pycocotools' own, and against loops."""

import contextlib
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from medsyn_jax.core import detection
from medsyn_jax.core.detection import Boxes

CLASSES = 2


def boxes_of(images, scored):
    """Boxes from a list an image of (label, corners, score)."""
    k = max([1, *map(len, images)])
    corners = np.zeros((len(images), k, 4), np.float32)
    labels, scores = np.full((len(images), k), -1), np.zeros((len(images), k), np.float32)
    for i, image in enumerate(images):
        for j, (label, box, score) in enumerate(image):
            corners[i, j], labels[i, j], scores[i, j] = box, label, score
    return Boxes(corners, labels, scores if scored else None)


def random_set(seed, count=25, tied=True, false=6):
    """Boxes on a coarse grid and detections near some of them: equal scores and equal IoUs."""
    rng = np.random.default_rng(seed)
    truth, detections = [], []
    for _ in range(count):
        low = rng.integers(0, 20, (rng.integers(0, 4), 2))
        corners = np.concatenate([low, low + rng.integers(2, 12, low.shape)], 1)
        truth.append([(int(rng.integers(CLASSES)), box, 0) for box in corners])
        near = [
            (c, box + rng.integers(-1, 2, 4), 0) for c, box, _ in truth[-1] if rng.random() < 0.8
        ]
        for _ in range(rng.integers(0, false)):
            corner = rng.integers(0, 20, 2)
            near.append(
                (int(rng.integers(CLASSES)), [*corner, *(corner + rng.integers(1, 9, 2))], 0)
            )
        scores = rng.random(len(near)).round(1 if tied else 9)
        detections.append([(c, b, s) for (c, b, _), s in zip(near, scores, strict=True)])
    return boxes_of(detections, True), boxes_of(truth, False)


def pycocotools(detections, truth, thresholds, images=None, classes=CLASSES):
    """(precision [t, 101, c]) by pycocotools alone, from its own formats."""
    images = range(len(truth.labels)) if images is None else images

    def rows(boxes):
        for i in images:
            for k in np.flatnonzero(boxes.labels[i] >= 0):
                x0, y0, x1, y1 = boxes.corners[i, k].astype(float)
                box = [x0, y0, x1 - x0, y1 - y0]
                yield {"image_id": int(i), "category_id": int(boxes.labels[i, k]), "bbox": box} | (
                    {} if boxes.scores is None else {"score": float(boxes.scores[i, k])}
                )

    annotations = [
        row | {"id": n + 1, "iscrowd": 0, "area": row["bbox"][2] * row["bbox"][3]}
        for n, row in enumerate(rows(truth))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": int(i)} for i in images],
            "categories": [{"id": c} for c in range(classes)],
            "annotations": annotations,
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes([*rows(detections)]), "bbox")
        evaluation.params.iouThrs = thresholds
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 2]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tied", [True, False])
def test_the_mean_average_precision_is_pycocotools(seed, tied):
    detections, truth = random_set(seed, tied=tied)
    for thresholds in (detection.MGCA, detection.STANDARD, np.array([0.5])):
        precision = pycocotools(detections, truth, thresholds)
        value = detection.mean_average_precision(detections, truth, CLASSES, thresholds)
        assert value == pytest.approx(precision.mean(), abs=1e-9)
        for c, m in enumerate(detection.match(detections, truth, CLASSES, thresholds)):
            own = detection.average_precision(m, np.ones((1, len(truth.labels))))[0]
            np.testing.assert_allclose(own, precision[:, :, c].mean(1), atol=1e-9)
    assert 0.05 < value < 0.95


def loops(detections, truth, threshold, label, strictly=False, images=None):
    """Average precision of one class at one threshold, from the definition."""
    images = range(len(truth.labels)) if images is None else images
    rows, positives = [], 0
    for i in images:
        real = truth.corners[i][truth.labels[i] == label].astype(float)
        used, positives = [False] * len(real), positives + len(real)
        mine = np.flatnonzero(detections.labels[i] == label)
        for k in sorted(mine, key=lambda k: -detections.scores[i, k])[:100]:
            a, best, at = detections.corners[i, k].astype(float), -1.0, -1
            for j, b in enumerate(real):
                w, h = np.minimum(a, b)[2:] - np.maximum(a, b)[:2]
                both = max(w, 0) * max(h, 0)
                union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
                share = both / union
                enough = share > threshold if strictly else share >= threshold
                if enough and not used[j] and share >= best:
                    best, at = share, j
            if at >= 0:
                used[at] = True
            rows.append((-detections.scores[i, k], at >= 0))
    hits = np.cumsum([hit for _, hit in sorted(rows, key=lambda row: row[0])])
    precision, recall = hits / (np.arange(len(hits)) + 1), hits / positives
    return np.mean([max(precision[recall >= r], default=0) for r in np.linspace(0, 1, 101)])


@pytest.mark.parametrize("seed", range(4))
def test_the_average_precision_is_that_of_loops(seed):
    detections, truth = random_set(seed)
    for c, m in enumerate(detection.match(detections, truth, CLASSES, detection.MGCA)):
        own = detection.average_precision(m, np.ones((1, len(truth.labels))))[0]
        np.testing.assert_allclose(
            own, [loops(detections, truth, t, c) for t in detection.MGCA], atol=1e-9
        )


def test_equal_scores_are_ordered_by_image():
    box = (0, 0, 10, 10)
    right, wrong = [(0, box, 0.5)], [(0, (20, 20, 30, 30), 0.5)]
    truth = boxes_of([[(0, box, 0)], []], False)
    first = detection.mean_average_precision(boxes_of([right, wrong], True), truth, 1)
    swapped = Boxes(truth.corners[::-1], truth.labels[::-1])
    last = detection.mean_average_precision(boxes_of([wrong, right], True), swapped, 1)
    assert (first, last) == pytest.approx((1.0, 0.5))


def test_ten_perfect_images_score_1():
    truth = boxes_of([[(0, (i, i, i + 9, i + 5), 0)] for i in range(10)], False)
    detections = Boxes(truth.corners, truth.labels, np.full(truth.labels.shape, 0.3, np.float32))
    assert detection.mean_average_precision(detections, truth, 1, detection.STANDARD) == 1.0


def test_a_detector_that_finds_nothing_scores_0_and_no_box_at_all_is_undefined():
    _, truth = random_set(0)
    nothing = boxes_of([[]] * len(truth.labels), True)
    detections, _ = random_set(0)
    subjects = np.arange(len(truth.labels))
    figures = detection.figures([nothing], truth, ("a", "b"), subjects)
    for name in ("map", "map_coco", "ap50", "map/a", "map/b"):
        assert figures[name].estimate()["value"] == 0.0
        assert figures[name].estimate()["ci95"] == [0.0, 0.0]
    assert figures["map_mgca"].estimate()["value"] is None
    assert figures["map_mgca"].n == 0
    empty = boxes_of([[]] * len(truth.labels), False)
    assert np.isnan(detection.mean_average_precision(detections, empty, CLASSES))
    figures = detection.figures([detections], empty, ("a", "b"), subjects)
    assert figures["map"].estimate()["value"] is None


def test_a_class_without_boxes_is_left_out_of_the_mean():
    detections, truth = random_set(3)
    labels = np.where(truth.labels == 1, -1, truth.labels)
    truth = Boxes(truth.corners, labels)
    value = detection.mean_average_precision(detections, truth, CLASSES)
    one = [loops(detections, truth, t, 0) for t in detection.MGCA]
    assert value == pytest.approx(np.mean(one), abs=1e-9)
    names = detection.figures([detections], truth, ("a", "b"), np.arange(len(labels)))
    assert set(names) == {"map", "map_coco", "ap50", "map_mgca", "map/a"}


def test_false_alarms_and_missed_images_cost_something_but_not_by_mgcas_count():
    box = (0, 0, 10, 10)
    truth = boxes_of([[(0, box, 0)], [(0, box, 0)], []], False)
    detections = boxes_of([[(0, box, 0.5)], [], [(0, box, 0.9)]], True)
    # one hit behind a false alarm, one box missed: precision 1/2 up to recall 1/2
    strict = detection.mean_average_precision(detections, truth, 1)
    assert strict == pytest.approx(0.5 * 51 / 101)
    assert detection.mgca_mean_average_precision(detections, truth, 1) == 1.0
    figures = detection.figures([detections], truth, ("a",), np.arange(3))
    assert figures["map"].estimate()["value"] == pytest.approx(strict)
    assert (figures["map"].n, figures["map"].counts) == (3, {"boxes": 2})
    assert (figures["map_mgca"].n, figures["map_mgca"].counts) == (1, {"boxes": 1})


def test_mgca_counts_an_iou_strictly_above_the_threshold():
    truth = boxes_of([[(0, (0, 0, 10, 10), 0)]], False)
    detections = boxes_of([[(0, (0, 0, 10, 5), 0.5)]], True)  # IoU 1/2 exactly
    strict = detection.mean_average_precision(detections, truth, 1)
    assert strict == pytest.approx(3 / 8)  # 0.40, 0.45, 0.50
    assert detection.mgca_mean_average_precision(detections, truth, 1) == pytest.approx(2 / 8)


@pytest.mark.parametrize("seed", range(3))
def test_mgcas_count_is_that_of_loops(seed):
    detections, truth = random_set(seed, false=2)
    images = np.flatnonzero(detection.mgca_images(detections, truth))
    assert 0 < len(images) < len(truth.labels)
    expected = [
        [loops(detections, truth, t, c, strictly=True, images=images) for t in detection.MGCA]
        for c in range(CLASSES)
    ]
    value = detection.mgca_mean_average_precision(detections, truth, CLASSES)
    assert value == pytest.approx(np.mean(expected), abs=1e-9)


def test_a_resample_is_the_set_with_its_images_repeated():
    detections, truth = random_set(5, tied=False)
    rng = np.random.default_rng(0)
    times = rng.integers(0, 3, (4, len(truth.labels)))
    matches = detection.match(detections, truth, CLASSES, detection.MGCA)
    for c in range(CLASSES):
        own = detection.average_precision(matches[c], times.astype(np.float32))
        for row, w in zip(own, times, strict=True):
            rows = np.repeat(np.arange(len(w)), w)
            again = [Boxes(*(x if x is None else x[rows] for x in b)) for b in (detections, truth)]
            precision = pycocotools(*again, detection.MGCA)[:, :, c]
            np.testing.assert_allclose(row, precision.mean(1), atol=1e-9)


def test_at_most_100_detections_an_image_count():
    truth = boxes_of([[(0, (0, 0, 10, 10), 0)]], False)
    wrong = [(0, (50, 50, 60, 60), 0.9)] * 100
    detections = boxes_of([[*wrong, (0, (0, 0, 10, 10), 0.1)]], True)
    assert detection.mean_average_precision(detections, truth, 1) == 0.0
    detections = boxes_of([[*wrong[:99], (0, (0, 0, 10, 10), 0.1)]], True)
    assert detection.mean_average_precision(detections, truth, 1) == pytest.approx(0.01)


def test_the_figures_are_those_of_each_run_and_their_interval_holds_the_value():
    runs, truth = [random_set(seed)[0] for seed in (0, 1)], random_set(0)[1]
    subjects = np.arange(len(truth.labels)) // 2
    figures = detection.figures(runs, truth, ("a", "b"), subjects)
    for name, thresholds in (("map", detection.MGCA), ("map_coco", detection.STANDARD)):
        values = [detection.mean_average_precision(run, truth, 2, thresholds) for run in runs]
        assert figures[name].values == pytest.approx(values, abs=1e-9)
        assert figures[name].draws.shape == (1000, 2)
    entry = figures["map"].estimate()
    assert entry["ci95"][0] < entry["value"] < entry["ci95"][1]
    assert entry["boxes"] == (truth.labels >= 0).sum()


def test_scores_that_are_not_finite_are_refused():
    detections, truth = random_set(0)
    detections.scores[detections.labels >= 0] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        detection.mean_average_precision(detections, truth, CLASSES)
