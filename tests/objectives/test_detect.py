"""Targets, loss and detections against loops over boxes, and the check values of MGCA's code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.objectives import detect

SIZE, MAPS = 224, (7, 14, 28)
# One compilation each: operation by operation these tests take ten times as long.
TARGETS = jax.jit(detect.targets, static_argnames=("cells", "size", "rule"))
LOSSES = jax.jit(detect.losses, static_argnames=("size", "rule"))
MAP_LOSSES, CANDIDATES = jax.jit(detect.map_losses), jax.jit(detect.candidates, static_argnums=1)
SUPPRESS = jax.jit(detect.suppress, static_argnames=("least", "overlap", "plus", "most"))


def corners(centred):
    """(left, top, right, bottom) in pixels of (cx, cy, w, h) as shares of the image."""
    x, y, w, h = np.asarray(centred, np.float32).T * SIZE
    return np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1)


def padded(images, count=4):
    """boxes [b, count, 4] and labels [b, count] of lists of (cx, cy, w, h)."""
    boxes = np.zeros((len(images), count, 4), np.float32)
    labels = np.full((len(images), count), -1, np.int32)
    for i, image in enumerate(images):
        if image:
            boxes[i, : len(image)], labels[i, : len(image)] = corners(image), 0
    return jnp.asarray(boxes), jnp.asarray(labels)


def random_images(rng, count=6, most=4):
    """Lists of boxes, some small, some in the same cell."""
    images = []
    for _ in range(count):
        wh = rng.choice([0.03, 0.1, 0.3, 0.8], (rng.integers(0, most + 1), 2))
        wh = (wh * rng.uniform(0.8, 1.2, wh.shape)).round(4)
        images.append(
            np.concatenate([rng.choice([0.3, 0.31, 0.6, 0.99], wh.shape), wh], 1).tolist()
        )
    return images


def random_outputs(rng, batch, classes=1):
    return [rng.normal(size=(batch, n, n, 3 * (5 + classes))).astype(np.float32) for n in MAPS]


def literal(output, images, anchors, mended=False):
    """The loss of one map by loops, with probabilities instead of logits, in float64."""
    b, n = output.shape[:2]
    positive, negative = np.zeros((b, n, n, 3)), np.ones((b, n, n, 3))
    target = np.zeros((b, n, n, 3, 4))
    for i, image in enumerate(images):
        for cx, cy, w, h in image:
            gx, gy, gw, gh = cx * n, cy * n, w * n, h * n
            column, row, likeness = int(gx), int(gy), []
            for aw, ah in anchors * (n / SIZE):
                both = (min(gw, aw) + 1) * (min(gh, ah) + 1)
                likeness.append(both / ((gw + 1) * (gh + 1) + (aw + 1) * (ah + 1) - both))
            best = int(np.argmax(likeness))
            aw, ah = anchors[best] * (n / SIZE)
            for k in range(3):
                if likeness[k] > 0.5 or (mended and k == best):
                    negative[i, row, column, k] = 0
            positive[i, row, column, best] = 1
            target[i, row, column, best] = gx - column, gy - row, np.log(gw / aw), np.log(gh / ah)
    raw = output.reshape(b, n, n, 3, 6).astype(float)
    p = 1 / (1 + np.exp(-raw))

    def entropy(p, t):
        return -(t * np.log(p) + (1 - t) * np.log(1 - p))

    xy = sum((entropy(p[..., k], target[..., k]) * positive).mean() for k in (0, 1))
    wh = sum((np.square(raw[..., k] - target[..., k]) * positive).mean() for k in (2, 3))
    some = (entropy(p[..., 4], 1) * positive).mean()
    none = (entropy(p[..., 4], 0) * negative).mean()
    return 2.5 * (xy + wh) + some + 0.5 * none + (entropy(p[..., 5], 1) * positive).mean()


@pytest.mark.parametrize(
    ("scale", "expected"), [(0, 0.397027), (1, 0.354970), (2, 0.350953)], ids=["7", "14", "28"]
)
def test_the_loss_has_the_check_values_of_mgcas_code(scale, expected):
    images = [[(0.30, 0.55, 0.22, 0.35), (0.70, 0.52, 0.10, 0.08)], []]
    boxes, labels = padded(images)
    n, anchors = MAPS[scale], detect.anchors(SIZE)[scale]
    target = TARGETS(boxes, labels, anchors, n, SIZE, "mgca")
    value = MAP_LOSSES(jnp.zeros((2, n, n, 18)), target)
    assert float(value.mean()) == pytest.approx(expected, abs=1e-5)
    assert literal(np.zeros((2, n, n, 18)), images, anchors) == pytest.approx(expected, abs=1e-5)


def test_the_anchors_are_mgcas_at_224():
    expected = [
        [(62.46, 48.46), (84.00, 106.62), (200.85, 175.54)],
        [(16.15, 32.85), (33.38, 24.23), (31.77, 64.08)],
        [(5.38, 7.00), (8.62, 16.15), (17.77, 12.38)],
    ]
    np.testing.assert_allclose(detect.anchors(224), expected, atol=0.005)
    np.testing.assert_allclose(detect.anchors(64), np.array(expected) * 64 / 224, atol=0.002)


@pytest.mark.parametrize("rule", detect.RULES)
def test_the_loss_is_that_of_loops_over_boxes(rule):
    rng = np.random.default_rng(0)
    images, outputs = random_images(rng), random_outputs(rng, 6)
    boxes, labels = padded(images)
    parts = [
        literal(output, images, anchors, rule == "mended")
        for output, anchors in zip(outputs, detect.anchors(SIZE), strict=True)
    ]
    values = LOSSES([jnp.asarray(x) for x in outputs], boxes, labels, size=SIZE, rule=rule)
    assert float(values.mean()) == pytest.approx(sum(parts), rel=1e-5)
    assert len(set(map(len, images))) > 2  # images of several numbers of boxes, one program


def test_a_positive_is_no_negative_unless_by_mgcas_rule():
    boxes, labels = padded([[(0.5, 0.5, 0.9, 0.9)]])  # far larger than all anchors of the fine map
    anchors = detect.anchors(SIZE)[2]
    ours, theirs = (TARGETS(boxes, labels, anchors, 28, SIZE, rule) for rule in ("mended", "mgca"))
    assert np.argwhere(ours.positive).tolist() == [[0, 14, 14, 2]]
    np.testing.assert_array_equal(ours.positive, theirs.positive)
    assert not (ours.positive & ours.negative).any()
    assert np.argwhere(theirs.positive & theirs.negative).tolist() == [[0, 14, 14, 2]]
    assert int(theirs.negative.sum()) == 28 * 28 * 3
    assert int(ours.negative.sum()) == 28 * 28 * 3 - 1


def test_a_later_box_overwrites_an_earlier_one_and_keeps_its_class():
    a, b = (0.51, 0.51, 0.30, 0.22), (0.52, 0.53, 0.28, 0.20)
    for images in ([[a, b]], [[b, a]]):
        boxes, labels = padded(images)
        labels = labels.at[0, :2].set(jnp.array([2, 1]))
        target = TARGETS(boxes, labels, detect.anchors(SIZE)[0], 7, SIZE)
        assert np.argwhere(target.positive).tolist() == [[0, 3, 3, 0]]
        x, y, w, _ = images[0][1]
        got = np.asarray(target.box)[0, 3, 3, 0]
        anchor = detect.anchors(SIZE)[0][0][0] / SIZE
        np.testing.assert_allclose(got[:3], [7 * x - 3, 7 * y - 3, np.log(w / anchor)], atol=1e-5)
        assert int(target.label[0, 3, 3, 0]) == 1


def test_padding_of_boxes_changes_nothing_and_each_image_has_its_own_loss():
    rng = np.random.default_rng(1)
    images, outputs = random_images(rng, 3), [jnp.asarray(x) for x in random_outputs(rng, 3)]
    few, many = padded(images, 4), padded(images, 9)
    values = LOSSES(outputs, *few, size=SIZE, rule="mgca")
    np.testing.assert_array_equal(LOSSES(outputs, *many, size=SIZE, rule="mgca"), values)
    turned = [x[::-1] for x in outputs]
    again = LOSSES(turned, *(x[::-1] for x in few), size=SIZE, rule="mgca")
    np.testing.assert_allclose(again[::-1], values, rtol=1e-6)


def test_outputs_equal_to_the_targets_decode_to_the_boxes():
    boxes, labels = padded([[(0.31, 0.42, 0.25, 0.4), (0.7, 0.2, 0.08, 0.05)], []])
    outputs = []
    for n, anchors in zip(MAPS, detect.anchors(SIZE), strict=True):
        t = jax.tree.map(np.asarray, TARGETS(boxes, labels, anchors, n, SIZE))
        raw = np.full((2, n, n, 3, 6), -9, np.float32)
        raw[..., :2] = np.log(t.box[..., :2] / (1 - t.box[..., :2]) + 1e-9)
        raw[..., 2:4], raw[..., 4] = t.box[..., 2:], np.where(t.positive, 3, -9)
        outputs.append(jnp.asarray(raw.reshape(2, n, n, 18)))
    every = CANDIDATES(outputs, SIZE)
    assert every.boxes.shape == (2, 3 * (49 + 196 + 784), 4)
    kept = SUPPRESS(every, least=0.5, overlap=0.5, plus=1.0)
    assert kept.labels.shape == (2, 100)
    assert np.asarray(kept.labels >= 0).sum(1).tolist() == [2, 0]
    order = np.argsort(kept.boxes[0, :2, 0])
    np.testing.assert_allclose(kept.boxes[0, :2][order], boxes[0, :2], atol=1e-3)
    np.testing.assert_allclose(np.exp(kept.scores[0, :2]), 1 / (1 + np.exp(-3)), rtol=1e-5)


def test_the_score_of_several_classes_is_that_of_the_best_one():
    raw = np.full((1, 1, 1, 3, 7), -5, np.float32)
    raw[0, 0, 0, 1] = 0, 0, 0, 0, 2.0, -1.0, 0.5
    maps = [jnp.asarray(raw.reshape(1, 1, 1, 21))] * 3
    every = CANDIDATES(maps, 32)
    assert int(every.labels[0, 1]) == 1
    expected = 1 / (1 + np.exp(-2.0)) / (1 + np.exp(-0.5))
    assert float(jnp.exp(every.scores[0, 1])) == pytest.approx(expected, rel=1e-6)


def greedy(boxes, scores, labels, least, overlap, plus, most):
    """Rows that non-maximum suppression keeps, by loops."""

    def area(box):
        return max(box[2] - box[0] + plus, 0) * max(box[3] - box[1] + plus, 0)

    rows = [i for i in np.argsort(-scores, kind="stable") if np.exp(scores[i]) >= least]
    kept = []
    for i in rows:
        for j in kept:
            low, high = np.maximum(boxes[i, :2], boxes[j, :2]), np.minimum(boxes[i], boxes[j])[2:]
            both = area([*low, *high])
            share = both / (area(boxes[i]) + area(boxes[j]) - both)
            if labels[i] == labels[j] and share >= overlap:
                break
        else:
            kept.append(i)
    return kept[:most]


@pytest.mark.parametrize("plus", [0.0, 1.0])
@pytest.mark.parametrize("most", [5, 100])
def test_suppression_is_that_of_loops(plus, most):
    rng = np.random.default_rng(2)
    low = rng.integers(0, 12, (4, 60, 2))
    boxes = np.concatenate([low, low + rng.integers(1, 8, low.shape)], -1).astype(np.float32)
    scores = np.log(rng.integers(1, 10, (4, 60)) / 10).astype(np.float32)  # with many ties
    labels = rng.integers(0, 2, (4, 60)).astype(np.int32)
    arrays = detect.Detections(*map(jnp.asarray, (boxes, scores, labels)))
    settings = {"least": 0.35, "overlap": 0.5, "plus": plus, "most": most}
    kept = SUPPRESS(arrays, **settings)
    assert kept.labels.shape == (4, min(most, 60))
    for i in range(4):
        rows = greedy(boxes[i], scores[i], labels[i], **settings)
        count = len(rows)
        np.testing.assert_array_equal(kept.boxes[i, :count], boxes[i, rows])
        np.testing.assert_array_equal(
            kept.labels[i], [*labels[i, rows], *[-1] * (min(most, 60) - count)]
        )
        np.testing.assert_array_equal(kept.scores[i, count:], -np.inf)


def test_an_extreme_output_gives_finite_boxes():
    maps = [jnp.full((1, n, n, 18), 500.0) for n in (1, 2, 4)]
    kept = SUPPRESS(CANDIDATES(maps, 32), least=0.05, overlap=0.5)
    assert np.isfinite(kept.boxes).all()
    assert (kept.labels >= 0).any()
