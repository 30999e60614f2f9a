"""How well an image fits its report, and which of several attempts at an image is kept.

The alignment score of a pair is the cosine of its two embeddings by a pre-trained pair of encoders.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


def alignment(image: np.ndarray, text: np.ndarray) -> np.ndarray:
    """Scores [n] of pairs from embeddings [n, d] of unit norm."""
    return np.einsum("nd,nd->n", image, text)


def shuffled_alignment(image: np.ndarray, text: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """Mean score [n] of each image with the texts of all other reports: what a wrong report scores.

    image, text: embeddings [n, d] of unit norm; reports [n]: equal where the texts are equal, as
    an image with a copy of its own report is no wrong pair. Exact, not drawn: a mean of products
    is the product with the mean. NaN for an image whose report is the only one there is.
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

    A generated image under it fits its report worse than all but the worst real images do.
    """
    return float(np.quantile(real, quantile))


def keep(scores: np.ndarray, threshold: float) -> np.ndarray:
    """bool, of the shape of `scores`: good enough. NaN (an attempt not made) is not."""
    return scores >= threshold


class Choice(NamedTuple):
    """Which attempt at each of n images is used."""

    attempt: np.ndarray  # int [n]
    kept: np.ndarray  # bool [n]: it is good enough; else it is the best of bad ones


def choose(scores: np.ndarray, threshold: float) -> Choice:
    """The first attempt that is good enough, or the best where none is.

    scores [n, k]: of attempts 0 ... k - 1, each under a seed of its own; NaN where none was made,
    as after one that was good enough. The first one and not the best of the good ones, so that the
    filter changes no image that passes it. Raises ValueError if an image has no attempt.
    """
    if np.isnan(scores).all(axis=1).any():
        raise ValueError("choose: an image without a scored attempt")
    good = keep(scores, threshold)
    kept = np.any(good, axis=1)
    return Choice(np.where(kept, good.argmax(axis=1), np.nanargmax(scores, axis=1)), kept)


def retry(
    images: Sequence[np.ndarray],
    again: Callable[[list[int], int], Sequence[np.ndarray]],
    score: Callable[[Sequence[np.ndarray], list[int]], np.ndarray],
    threshold: float,
    attempts: int,
) -> tuple[list[np.ndarray], list[int]]:
    """The images to keep, and which attempt each of them is.

    images: the first attempts. again: (rows, attempt) -> other images of these rows. score:
    (images, rows) -> their scores. attempts: at one image, the first included.
    """
    made = {(row, 0): image for row, image in enumerate(images)}
    scores = np.full((len(images), attempts), np.nan)
    scores[:, 0] = score(images, list(range(len(images))))
    for attempt in range(1, attempts):
        rows = np.flatnonzero(~keep(scores, threshold).any(axis=1)).tolist()
        if not rows:
            break
        new = again(rows, attempt)
        scores[rows, attempt] = score(new, rows)
        made |= {(row, attempt): image for row, image in zip(rows, new, strict=True)}
    chosen = choose(scores, threshold).attempt.tolist()
    return [made[row, attempt] for row, attempt in enumerate(chosen)], chosen
