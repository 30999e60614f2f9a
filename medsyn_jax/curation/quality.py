"""How well an image fits its report, and which of several attempts at an image is kept.

The alignment score of a pair is the cosine of its two embeddings by a pre-trained pair of encoders.
"""

from collections.abc import Callable, Sequence

import numpy as np


def alignment(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Scores [n] of pairs from embeddings [n, d] of unit norm."""
    return np.einsum("nd,nd->n", image, text)


def shuffled_alignment(image: np.ndarray, text: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """Mean score [n] of each image with the texts of all other reports: the score of a wrong one.

    image, text: embeddings [n, d] of unit norm; reports [n]: equal where the texts are equal,
    because a copy of an image's own report is no wrong pair. The mean is exact, not drawn: a mean
    of products is the product with the mean. NaN for an image if no other report differs from its
    own.
    """
    _, group, size = np.unique(reports, return_inverse=True, return_counts=True)
    exact = text.astype(np.float64)
    own = np.zeros((len(size), text.shape[1]))
    np.add.at(own, group, exact)
    others = (len(text) - size)[group]
    total = np.einsum("nd,nd->n", image, exact.sum(axis=0)[None] - own[group])
    return np.divide(total, others, out=np.full(len(text), np.nan), where=others > 0)


def alignment_threshold(real: np.ndarray, quantile: float) -> float:
    """The score that a share of `quantile` of the real pairs [n] stays below.

    A generated image below it fits its report worse than all but the worst real images.
    """
    return float(np.quantile(real, quantile))


def keep(scores: np.ndarray, threshold: float) -> np.ndarray:
    """bool, of the shape of `scores`: good enough. NaN (no such attempt) is not."""
    return scores >= threshold


def choose(scores: np.ndarray, threshold: float) -> np.ndarray:
    """The attempt int [n] at each image: the first that is good enough, or the best if none is.

    scores [n, k]: of attempts 0 ... k - 1, each with a seed of its own; NaN for an attempt that was
    not made, as after a good one. The first good attempt counts, not the best one, so the filter
    changes no image that passes it. Raises ValueError if an image has no attempt.
    """
    if np.isnan(scores).all(axis=1).any():
        raise ValueError("choose: an image without a scored attempt")
    good = keep(scores, threshold)
    return np.where(good.any(axis=1), good.argmax(axis=1), np.nanargmax(scores, axis=1))


def retry(
    images: Sequence[np.ndarray],
    again: Callable[[list[int], int], Sequence[np.ndarray]],
    score: Callable[[Sequence[np.ndarray], list[int]], np.ndarray],
    threshold: float,
    attempts: int,
) -> tuple[list[np.ndarray], list[int]]:
    """The images to keep, and the attempt that each of them is.

    images: the first attempts. again: (rows, attempt) -> new images of these rows. score:
    (images, rows) -> their scores. attempts: at one image, the first included.
    """
    candidates = {(row, 0): image for row, image in enumerate(images)}
    scores = np.full((len(images), attempts), np.nan)
    scores[:, 0] = score(images, list(range(len(images))))
    for attempt in range(1, attempts):
        rows = np.flatnonzero(~keep(scores, threshold).any(axis=1)).tolist()
        if not rows:
            break
        new = again(rows, attempt)
        scores[rows, attempt] = score(new, rows)
        candidates |= {(row, attempt): image for row, image in zip(rows, new, strict=True)}
    chosen = choose(scores, threshold).tolist()
    return [candidates[row, attempt] for row, attempt in enumerate(chosen)], chosen
