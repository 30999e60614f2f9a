"""Whether synthetic images repeat training ones, and what of de-identification texts still bear."""

import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_QUERIES, _TARGETS = 1024, 8192  # rows of a block: 32 MB of similarities at a time


class Nearest(NamedTuple):
    """The most similar target of each query."""

    similarity: np.ndarray  # float32 [n]
    index: np.ndarray  # int32 [n], row of the targets


def unit(features: np.ndarray) -> np.ndarray:
    """Rows of unit length, float32 [n, f]: their products are cosines. A zero row stays zero."""
    x = np.asarray(features, np.float32)
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return np.divide(x, length, out=np.zeros_like(x), where=length > 0)


def unit_pixels(images: np.ndarray) -> np.ndarray:
    """Images uint8 [n, h, w] as rows [n, h w] of mean 0 and length 1: products are correlations."""
    x = images.reshape(len(images), -1).astype(np.float32)
    return unit(x - x.mean(axis=1, keepdims=True))


def nearest(queries: np.ndarray, targets: np.ndarray) -> Nearest:
    """The target with the largest product for each query, in full fp32, block by block.

    queries [n, f], targets [m, f] (m >= 1): rows of `unit` or `unit_pixels`. Never more than a
    block of the n x m products exists. Of equal ones the first counts.
    """
    similarity = np.full(len(queries), -np.inf, np.float32)
    index = np.zeros(len(queries), np.int32)
    for start in range(0, len(targets), _TARGETS):
        block, real = _filled(targets[start : start + _TARGETS], min(_TARGETS, len(targets)))
        block, real = jnp.asarray(block), jnp.asarray(real)
        for first in range(0, len(queries), _QUERIES):
            rows = slice(first, first + _QUERIES)
            asked, _ = _filled(queries[rows], min(_QUERIES, len(queries)))
            values, places = jax.device_get(_best(jnp.asarray(asked), block, real))
            count = len(similarity[rows])
            better = values[:count] > similarity[rows]
            similarity[rows] = np.where(better, values[:count], similarity[rows])
            index[rows] = np.where(better, places[:count] + start, index[rows])
    return Nearest(similarity, index)


def _filled(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows filled up with zeros to `count`, and which are real: one shape, one compilation."""
    padded = np.zeros((count, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    return padded, np.arange(count) < len(rows)


@jax.jit
def _best(
    queries: Float[Array, "q f"], targets: Float[Array, "t f"], real: Bool[Array, " t"]
) -> tuple[Float[Array, " q"], Int[Array, " q"]]:
    products = jnp.matmul(queries, targets.T, precision=jax.lax.Precision.HIGHEST)
    products = jnp.where(real[None], products, -jnp.inf)
    return products.max(axis=1), products.argmax(axis=1)


class Screen(NamedTuple):
    """Synthetic images against the training images, judged by what real images do."""

    synthetic: Nearest
    threshold: float  # the quantile of the real held-out images
    maximum: float  # the most similar one of them
    flagged: np.ndarray  # bool [n]: more similar than `threshold`
    expected: float  # share of them that a set like the held-out images would have flagged


def screen(
    synthetic: np.ndarray, held_out: np.ndarray, train: np.ndarray, quantile: float
) -> Screen:
    """Flags synthetic images that are nearer to a training image than real ones ever are.

    All three: rows of `unit` or `unit_pixels`. The held-out images are real ones of other subjects
    than the training images. Their `quantile` of nearest similarities is the threshold; with h of
    them, one above 1 - 1 / h is their maximum but for interpolation. If c of them are above it, a
    further image of their kind is with probability (c + 1) / (h + 1) at the most: so many flags are
    to be expected of images that copy nothing.
    """
    real = nearest(held_out, train).similarity
    threshold = float(np.quantile(real, quantile))
    found = nearest(synthetic, train)
    expected = (int((real > threshold).sum()) + 1) / (len(real) + 1)
    flagged = found.similarity > threshold
    return Screen(found, threshold, float(real.max()), flagged, expected)


# What stands in reports where something was removed, and what may have been overlooked.
_MARKS = {
    "___": r"_{2,}",  # MIMIC-CXR
    "[** **]": r"\[\*\*.*?\*\*\]",  # older MIMIC sets
    "XXXX": r"\bX{3,}\b",  # Open-i
    "[NAME]": r"[\[<{](?:name|date|time|age|id|mrn|phone|location|hospital|redacted|removed"
    r"|deidentified|de-identified|phi)[^\]>}]{0,20}[\]>}]",
    "date": r"\b\d{1,2}[/.-]\d{1,2}[/.-](?:19|20)?\d{2}\b|\b(?:19|20)\d{2}-\d{2}-\d{2}\b",
    "time": r"\b\d{1,2}:\d{2}(?::\d{2})?\s*(?:[ap]\.?m\b)?",
    "doctor": r"\bDrs?\.?\s+(?-i:[A-Z])[a-z]+",
    "record number": r"\b(?:mrn|accession|record (?:number|no))\b\W{0,3}\d+",
}
_PATTERNS = {name: re.compile(p, re.I | re.S) for name, p in _MARKS.items()}


def leftovers(texts: Sequence[str]) -> dict[str, int]:
    """How many of the texts hold each kind of mark of de-identification, or what should be one.

    A generator learns such marks by heart before all else (Dar et al. 2025, 2502.07516).
    """
    return {name: sum(bool(p.search(t)) for t in texts) for name, p in _PATTERNS.items()}
