"""Figures of merit of masks and heat maps: overlap, pointing, contrast."""

import functools
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from medsyn_jax.core import estimates
from medsyn_jax.core.estimates import Figure


class Pixels(NamedTuple):
    """Numbers of pixels in the masks of n images, predicted by s networks."""

    shared: np.ndarray  # [s, n] in both masks
    predicted: np.ndarray  # [s, n]
    truth: np.ndarray  # [n]


def overlaps(pixels: Pixels, subjects: np.ndarray, batch: int) -> dict[str, Figure]:
    """Dice 2 |A B| / (|A| + |B|) and IoU |A B| / |A or B| of masks, in four ways each.

    `dice/per_image/with_empty` is the mean over all images; where the true mask is empty it is 1 if
    the predicted one is empty, too, and 0 otherwise (SIIM-ACR's rule). `.../without_empty`: over
    the images with a true mask. `dice/per_set/...`: of the pixels of all images (or of those with
    a true mask) together. `iou/...` likewise. `dice/mgca_compat` is the mean of the first over
    batches of so many images in order and then over batches, so that an image of a last, smaller
    batch counts more, as in MGCA's code; it has no interval.

    subjects: [n], for the bootstrap. Figures without an image that counts are left out.
    """
    n, full = len(pixels.truth), pixels.truth > 0
    both, sizes = pixels.shared.astype(float), pixels.predicted + pixels.truth[None]
    fractions = {"dice": (2 * both, sizes), "iou": (both, sizes - both)}
    figures = {}
    for name, (above, below) in fractions.items():
        each = np.where(below > 0, above / np.maximum(below, 1), 1.0)
        for kind, counted in (("with_empty", np.ones(n, bool)), ("without_empty", full)):
            per_image = functools.partial(
                _weighted, above=each * counted, below=1.0 * counted[None]
            )
            per_set = functools.partial(_weighted, above=above * counted, below=below * counted)
            for way, statistic in (("per_image", per_image), ("per_set", per_set)):
                if counted.any():
                    figure = estimates.figure(statistic, counted, subjects)
                    counts = {"positives": int(full.sum())}
                    figures[f"{name}/{way}/{kind}"] = replace(figure, counts=counts)
        if name == "dice":
            starts = np.arange(0, n, batch)
            sums = np.add.reduceat(each, starts, axis=1)
            values = (sums / np.diff(starts, append=n)[None]).mean(axis=1)
            figures["dice/mgca_compat"] = Figure(values, np.full((1, len(values)), np.nan), n)
    return figures


def _weighted(w: np.ndarray, above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """sum(w above) / sum(w below), [r, s], of weights [r, n] and numbers [s or 1, n]."""
    total = w @ below.T
    out = np.full((len(w), len(above)), np.nan)
    total = np.broadcast_to(total, out.shape)
    return np.divide(w @ above.T, total, out=out, where=total > 0)


# ------------------------------------------------------------ heat maps


def pointing(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The pointing game (Zhang et al., arXiv 1608.00507): 1 if the hottest pixel is in the region.

    Among several equally hot pixels (at the edges of an enlarged map) it is the share of them in
    the region. heat: float [n, h, w]; region: bool [n, h, w]. Returns [n] in [0, 1].
    """
    hottest = heat == heat.max((1, 2), keepdims=True)
    return (hottest & region).sum((1, 2)) / hottest.sum((1, 2))


def contrast_to_noise(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """(mean inside - mean outside) / sqrt(variance inside + variance outside), [n].

    heat: float [n, h, w]; region: bool [n, h, w]. As in arXiv 2204.09817, 4.2.2, but with its sign,
    so that heat beside the region counts against the map.
    """
    inside, outside = (heat.mean((1, 2), where=x) for x in (region, ~region))
    variance = heat.var((1, 2), where=region) + heat.var((1, 2), where=~region)
    return (inside - outside) / np.sqrt(np.maximum(variance, 1e-12))


def dice(heat: np.ndarray, region: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Dice coefficient [n, k] of heat >= each of k thresholds with a region that is not empty."""

    def hot(inside: np.ndarray | bool) -> np.ndarray:
        return np.stack([((heat >= t) & inside).sum((1, 2)) for t in thresholds], axis=1)

    return 2 * hot(region) / (hot(True) + region.sum((1, 2))[:, None])
