"""Whether synthetic images repeat training images, and marks of de-identification in texts."""

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

    queries [n, f], targets [m, f] (m >= 1): rows of `unit` or `unit_pixels`. No more than a block
    of the n x m products exists at a time. The first of several equal products counts.
    """
    similarity = np.full(len(queries), -np.inf, np.float32)
    index = np.zeros(len(queries), np.int32)
    for start in range(0, len(targets), _TARGETS):
        targets_here = _filled(targets[start : start + _TARGETS], min(_TARGETS, len(targets)))
        for first in range(0, len(queries), _QUERIES):
            rows = slice(first, first + _QUERIES)
            queries_here, _ = _filled(queries[rows], min(_QUERIES, len(queries)))
            values, places = jax.device_get(_best(queries_here, *targets_here))
            count = len(similarity[rows])
            better = values[:count] > similarity[rows]
            similarity[rows] = np.where(better, values[:count], similarity[rows])
            index[rows] = np.where(better, places[:count] + start, index[rows])
    return Nearest(similarity, index)


def _filled(rows: np.ndarray, count: int) -> tuple[jax.Array, jax.Array]:
    """Rows padded with zeros to `count`, and which are real: one shape, one compilation."""
    padded = np.zeros((count, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    return jnp.asarray(padded), jnp.arange(count) < len(rows)


@jax.jit
def _best(
    queries: Float[Array, "q f"], targets: Float[Array, "t f"], real: Bool[Array, " t"]
) -> tuple[Float[Array, " q"], Int[Array, " q"]]:
    products = jnp.matmul(queries, targets.T, precision=jax.lax.Precision.HIGHEST)
    products = jnp.where(real[None], products, -jnp.inf)
    return products.max(axis=1), products.argmax(axis=1)


class Screen(NamedTuple):
    """Synthetic images against the training images, with real held-out images as the measure."""

    synthetic: Nearest
    threshold: float  # the quantile of the real held-out images
    maximum: float  # of the real held-out images
    flagged: np.ndarray  # bool [n]: more similar than `threshold`
    expected: float  # share of flags in a set like the held-out images


def screen(
    synthetic: np.ndarray, held_out: np.ndarray, train: np.ndarray, quantile: float
) -> Screen:
    """Flag synthetic images that are nearer to a training image than real held-out images are.

    synthetic, held_out, train: rows of `unit` or `unit_pixels`. The held-out images are real and of
    other subjects than the training images. The threshold is the `quantile` of their nearest
    similarities; of h images, a quantile above 1 - 1 / h is the maximum but for interpolation. If c
    of them are above it, a further image of their kind is above it with a probability of at most
    (c + 1) / (h + 1): the share of flags to expect of images that copy nothing.
    """
    real = nearest(held_out, train).similarity
    threshold = float(np.quantile(real, quantile))
    closest = nearest(synthetic, train)
    expected = (int((real > threshold).sum()) + 1) / (len(real) + 1)
    flagged = closest.similarity > threshold
    return Screen(closest, threshold, float(real.max()), flagged, expected)


# Marks in reports where something was removed, and identifiers that may have been overlooked.
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
    """How many of the texts hold each kind of mark of de-identification, or an identifier.

    A generator memorises such marks first of all (Dar et al. 2025, 2502.07516).
    """
    return {name: sum(bool(p.search(t)) for t in texts) for name, p in _PATTERNS.items()}
