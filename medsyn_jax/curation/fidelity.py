"""Distance between two sets of images by features, and similarity of two images."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from medsyn_jax.core.errors import UserError

# Wang, Simoncelli and Bovik 2003, from the finest scale to the coarsest.
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # of values in [0, 1]


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to two sets of features.

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) with the unbiased covariances (Heusel et al.
    2017, 1706.08500). With A = R'R and B = S'S the last trace is the sum of the singular values of
    R S', so no square root of a matrix is needed: everything is real, symmetric and float64, and
    the distance of equal sets is 0 to rounding. R is the triangle of a QR decomposition.

    a [n, f], b [m, f]: n and m may differ. With fewer than f records a covariance has rank n - 1;
    the distance is defined, but biased upwards, the more so the fewer records there are. So compare
    distances of equal n and m only.

    Raises UserError if a set has fewer than 2 records, ValueError if a feature is not finite.
    """
    (a, b), (n, m) = (np.asarray(x, np.float64) for x in (a, b)), (len(a), len(b))
    if min(n, m) < 2:
        raise UserError(f"distance: sets of {n} and {m} images: each needs 2 or more")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("frechet distance: features are not finite")
    shift = a.mean(axis=0) - b.mean(axis=0)
    r, s = (_root(x) for x in (a, b))
    cross = np.linalg.norm(r @ s.T, "nuc")
    return float(max(shift @ shift + (r * r).sum() + (s * s).sum() - 2 * cross, 0.0))


def _root(x: np.ndarray) -> np.ndarray:
    """R [min(n, f), f] with R'R the covariance of x [n, f]."""
    centered = (x - x.mean(axis=0)) / np.sqrt(len(x) - 1)
    return np.asarray(np.linalg.qr(centered, mode="r")) if len(x) > x.shape[1] else centered


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int, subset_size: int, seed: int
) -> tuple[float, float]:
    """Mean and standard deviation over random subsets of the unbiased squared MMD.

    Kernel (x.y / f + 1)^3, as the kernel inception distance (Binkowski et al. 2018, 1801.01401).
    Its expectation does not depend on the subset size and is 0 for equal distributions, so single
    values may be negative.

    a [n, f], b [m, f]: features. subset_size: records drawn from each set without replacement, at
    most the size of the smaller set. Raises UserError if a set has fewer than 2 records.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise UserError(f"distance: sets of {len(a)} and {len(b)} images: each needs 2 or more")
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x, y = (np.asarray(s[rng.choice(len(s), size, replace=False)], np.float64) for s in (a, b))
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate from x [n, f] and y [n, f]: no record is paired with itself."""
    n, f = x.shape
    xx, yy, xy = ((p @ q.T / f + 1) ** 3 for p, q in ((x, x), (y, y), (x, y)))
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (xx, yy))
    return within - 2 * xy.mean()


class Distances(NamedTuple):
    """Distances over d draws, [d] each, between samples of `n` images."""

    synthetic: np.ndarray  # synthetic images against one half of the real ones
    real: np.ndarray  # the other half against the same half
    n: int


def compare(
    synthetic: np.ndarray,
    real: np.ndarray,
    subjects: np.ndarray,
    *,
    draws: int,
    subsets: int,
    subset_size: int,
    seed: int,
) -> tuple[Distances, Distances]:
    """Frechet and kernel distances of synthetic and of real images to the same real images.

    Each draw splits the subjects of the real images [m, f] into two halves. One half is the
    reference. The other half and a sample of the synthetic images [n, f], all of one size, are
    compared with it. The distances of the real half say how far apart two samples of one
    distribution are at this size.

    Raises UserError if there are too few images or real subjects for two halves of 2.
    """
    names, of = np.unique(subjects, return_inverse=True)
    rng, chooser = (np.random.default_rng([seed, i]) for i in (0, 1))
    splits = []
    for _ in range(draws):
        first = rng.permutation(len(names)) < len(names) // 2
        halves = [rng.permutation(np.flatnonzero(side)) for side in (first[of], ~first[of])]
        splits.append((*halves, chooser.permutation(len(synthetic))))
    size = min(len(rows) for split in splits for rows in split)
    if size < 2:
        raise UserError(
            f"distance: {len(synthetic)} synthetic images and {len(real)} real held-out images of "
            f"{len(names)} subjects: 2 synthetic images, and 2 of each half of the real subjects, "
            "are needed: use more data"
        )
    frechet, kernel = np.empty((2, draws)), np.empty((2, draws))
    for i, (ours, others, rows) in enumerate(splits):
        reference = real[others[:size]]
        for row, images in enumerate((synthetic[rows[:size]], real[ours[:size]])):
            frechet[row, i] = frechet_distance(images, reference)
            mean, _ = kernel_distance(images, reference, subsets, subset_size, seed + i)
            kernel[row, i] = mean
    return Distances(*frechet, n=size), Distances(*kernel, n=size)


@jax.jit
def ms_ssim(a: Float[Array, "b h w"], b: Float[Array, "b h w"]) -> Float[Array, " b"]:
    """Multi-scale structural similarity of pairs of images in [0, 1]; 1 where they are equal.

    Wang, Simoncelli and Bovik 2003: window 11 x 11 (Gaussian, sigma 1.5), K1 0.01, K2 0.03, five
    scales, each half the size of the one before (means of 2 x 2 pixels). A smaller image has as
    many scales as hold a whole window, 3 at 64 pixels and 2 at 32; their weights are the first of
    the five, scaled to the sum of 1. Negative contrast-structure terms count as 0.

    Raises ValueError if an image is smaller than the window.
    """
    if min(a.shape[1:]) < _WINDOW:
        raise ValueError(
            f"ms_ssim: {a.shape[1:]} pixels, at least {_WINDOW} x {_WINDOW} are needed"
        )
    weights = np.array(_WEIGHTS[: scales(min(a.shape[1:]))])
    result = jnp.ones(len(a), jnp.float32)
    last = len(weights) - 1
    for scale, weight in enumerate((weights / weights.sum()).tolist()):
        luminance, structure = _similarity(a, b)
        term = luminance * structure if scale == last else structure
        result *= jnp.maximum(term.mean((1, 2)), 0.0) ** weight
        a, b = (_halved(x) for x in (a, b))
    return result


def scales(side: int) -> int:
    """The number of scales of `ms_ssim` for images whose smaller side has `side` pixels."""
    return max(1, sum(side >> i >= _WINDOW for i in range(len(_WEIGHTS))))


def _similarity(a: Array, b: Array) -> tuple[Array, Array]:
    """Maps [b, h - 10, w - 10] of the luminance term and of the contrast-structure term."""
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a = _windowed(a * a) - mean_a * mean_a
    var_b = _windowed(b * b) - mean_b * mean_b
    covariance = _windowed(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a * mean_a + mean_b * mean_b + _C1)
    return luminance, (2 * covariance + _C2) / (var_a + var_b + _C2)


def _windowed(x: Array) -> Array:
    """Gaussian means over every whole window, by two products with banded matrices."""
    exact = jax.lax.Precision.HIGHEST  # the variances are small differences of these
    rows, columns = (jnp.asarray(_band(n)) for n in x.shape[1:])
    return jnp.einsum("ih,bhw,jw->bij", rows, x, columns, precision=exact)


def _band(n: int) -> np.ndarray:
    """float32 [n - 10, n]: row i holds the window that starts at i."""
    at = np.arange(_WINDOW) - _WINDOW // 2
    window = np.exp(-0.5 * (at / _SIGMA) ** 2)
    band = np.zeros((n - _WINDOW + 1, n), np.float32)
    for i, row in enumerate(band):
        row[i : i + _WINDOW] = window / window.sum()
    return band


def _halved(x: Array) -> Array:
    """Means of 2 x 2 pixels; an odd last row or column is dropped."""
    b, h, w = x.shape[0], x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2).mean((2, 4))
