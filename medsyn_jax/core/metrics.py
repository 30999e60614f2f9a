"""AUROC, accuracy and retrieval, with percentile bootstrap intervals over records or subjects.

Everything is numpy on the host and vectorised over the resamples: a resample is a row of weights
(how often each record was drawn), so that scores are sorted once and a thousand resamples cost a
few passes over [r, n].
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

RESAMPLES = 1000
_CHUNK = 2**22  # weights held at a time (16 MB), so memory does not grow with resamples * n
_QUERIES = 256  # queries ranked at a time: the temporaries stay far below the similarity matrix


class Estimate(TypedDict):
    """One entry of `results.json`. An undefined value is None (valid JSON, unlike NaN)."""

    value: float | None
    n: int  # records (or queries) that it rests on
    ci95: NotRequired[list[float]]  # absent where it is undefined
    chance: NotRequired[float]
    seeds: NotRequired[list[float | None]]
    seed_std: NotRequired[float | None]
    positives: NotRequired[int]  # of the n records, for the AUROC of a label
    labels: NotRequired[int]  # over which it is the mean


# ------------------------------------------------------------ classification


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUROC = P(score of a positive > score of a negative), ties counting one half.

    scores: float [n]; labels: [n], 1 positive, 0 negative, anything else is left out; weights: [r,
    n] >= 0, one row a resample (default: one row of ones). Returns float64 [r]; NaN where a row
    has no positive or no negative. Raises ValueError on scores that are not finite, which would
    sort to one end unnoticed.
    """
    known = (labels == 1) | (labels == 0)
    if not np.isfinite(scores[known]).all():
        raise ValueError("auroc: scores are not finite")
    weights = np.ones((1, len(scores)), np.float32) if weights is None else weights
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    if not len(positives) or not len(negatives):
        return np.full(len(weights), np.nan)
    negatives = negatives[np.argsort(scores[negatives], kind="stable")]
    first = np.searchsorted(scores[negatives], scores[positives], side="left")
    last = np.searchsorted(scores[negatives], scores[positives], side="right")
    # Weight of the negatives below each place where a positive falls: summing the runs between
    # those places first is three times faster than a cumulative sum over all. Exact: < 2**24.
    edges = np.unique(np.concatenate([[0], first, last]))
    starts = edges[edges < len(negatives)]
    runs = np.add.reduceat(np.take(weights, negatives, axis=1), starts, axis=1)
    below = np.zeros((len(weights), len(starts) + 1), np.float32)
    np.cumsum(runs, axis=1, out=below[:, 1:])
    positive_weights = np.take(weights, positives, axis=1)

    def wins_over(place: np.ndarray) -> np.ndarray:
        lower = np.take(below, np.searchsorted(edges, place), axis=1)
        return (positive_weights * lower).sum(axis=1, dtype=np.float64)

    wins = wins_over(first)
    if (first != last).any():
        wins = 0.5 * (wins + wins_over(last))
    pairs = positive_weights.sum(axis=1, dtype=np.float64) * below[:, -1]
    return np.divide(wins, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)


def accuracy(
    predicted: np.ndarray, classes: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Share of records whose predicted class is right; unknown (negative) classes are left out.

    predicted, classes: int [n]; weights: [r, n]. Returns float64 [r]; NaN where no record is left.
    """
    weights = np.ones((1, len(classes)), np.float32) if weights is None else weights
    known = classes >= 0
    right = weights @ ((predicted == classes) & known).astype(weights.dtype)
    total = weights @ known.astype(weights.dtype)
    out = np.full(len(weights), np.nan)
    return np.divide(right, total, out=out, where=total > 0, dtype=np.float64, casting="unsafe")


# ------------------------------------------------------------ intervals


def resample_weights(
    n: int, groups: np.ndarray | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap resamples of n records as weights, float32 [r, n] at a time.

    groups: [n] subject of each record (any type); given, whole subjects are drawn (cluster
    bootstrap), because images of one patient are not independent. The same arguments give the same
    rows, so figures that were computed with them are paired.
    """
    if groups is None:
        member, units = None, n
    else:
        member = np.unique(groups, return_inverse=True)[1]
        units = int(member.max()) + 1 if n else 0
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(n, 1))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = rng.integers(units, size=(r, units)) + np.arange(r)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=r * units).reshape(r, units)
        counts = counts.astype(np.float32)
        yield counts if member is None else counts[:, member]


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    n: int,
    groups: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> np.ndarray:
    """[resamples, ...] values of `statistic`, which maps weights [r, n] to values [r, ...]."""
    return np.concatenate([statistic(w) for w in resample_weights(n, groups, resamples, seed)])


def interval95(draws: np.ndarray) -> list[float] | None:
    """Percentile interval of the defined draws [r]; None where fewer than half of them are."""
    defined = draws[np.isfinite(draws)]
    if 2 * len(defined) < len(draws) or not len(defined):
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]


def estimate(value: float, n: int, draws: np.ndarray | None = None) -> Estimate:
    """A `results.json` entry from a value, the records it rests on and its bootstrap draws [r]."""
    entry = Estimate(value=_number(value), n=int(n))
    interval = None if draws is None else interval95(draws)
    if interval is not None:
        entry["ci95"] = interval
    return entry


def estimate_over_seeds(values: np.ndarray, draws: np.ndarray, n: int, seed: int = 0) -> Estimate:
    """Mean over training seeds, their spread, and an interval for test records and seeds together.

    values: [s], one a seed; draws: [r, s], the same test resample along a row. Each row is
    averaged over s seeds drawn with replacement, so that the interval holds both sources of
    chance. (With s seeds that understates the variance between seeds by the factor (s - 1) / s.)
    seed_std is the sample standard deviation (None for 1 seed).
    """
    r, s = draws.shape
    chosen = np.random.default_rng(seed).integers(s, size=(r, s))
    entry = estimate(float(np.mean(values)), n, np.take_along_axis(draws, chosen, axis=1).mean(1))
    entry["seeds"] = [_number(v) for v in values]
    entry["seed_std"] = _number(np.std(values, ddof=1)) if s > 1 else None
    return entry


def _number(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None


# ------------------------------------------------------------ retrieval


class Ranks(NamedTuple):
    """Where each query's best positive lies among the targets, int [q] each."""

    above: np.ndarray  # negatives that score higher than the best positive
    tied: np.ndarray  # negatives that score the same
    best: np.ndarray  # positives that share the best score (>= 1)
    positives: np.ndarray  # positives in all


def retrieval_ranks(
    similarity: np.ndarray,
    query_groups: np.ndarray,
    target_groups: np.ndarray,
    queries: np.ndarray | None = None,
    targets: np.ndarray | None = None,
) -> Ranks:
    """Ranks of the best positive target of each query; positive = of the same group.

    similarity: float [q, t]; query_groups: int [q]; target_groups: int [t]; queries, targets: the
    rows and columns that take part (default all). Works through blocks of rows, so it needs little
    beyond the matrix. Raises ValueError if a similarity is not finite (it would compare as higher
    than nothing, and the query would seem to be found first) or a query has no positive.
    """
    queries = np.arange(len(query_groups)) if queries is None else queries
    targets = np.arange(len(target_groups)) if targets is None else targets
    found: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(queries), _QUERIES):
        rows = queries[start : start + _QUERIES]
        block = similarity[rows][:, targets]
        positive = query_groups[rows, None] == target_groups[None, targets]
        if not np.isfinite(block).all():
            raise ValueError("retrieval: similarities are not finite")
        if not positive.any(axis=1).all():
            raise ValueError("retrieval: a query has no positive target")
        best = np.where(positive, block, -np.inf).max(axis=1, keepdims=True)
        marks = (block > best, (block == best) & ~positive, (block == best) & positive, positive)
        found.append(tuple(mark.sum(axis=1) for mark in marks))
    return Ranks(*(np.concatenate(part) for part in zip(*found, strict=True)))


def _miss(slots: np.ndarray, negatives: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """P(no positive in the first `slots` of a random order) = C(neg, slots) / C(all, slots)."""
    miss = np.ones(len(negatives))
    for i in range(int(slots.max(initial=0))):
        step = np.maximum(negatives - i, 0) / np.maximum(negatives + positives - i, 1)
        miss = np.where(i < slots, miss * step, miss)
    return miss


def recall_at(ranks: Ranks, k: int) -> np.ndarray:
    """Probability [q], in [0, 1], that a positive is among the first k, ties broken at random.

    Without ties it is 0 or 1; with a constant similarity it is what guessing gives, not 1.
    """
    return 1.0 - _miss(np.maximum(k - ranks.above, 0), ranks.tied, ranks.best)


def expected_rank(ranks: Ranks) -> np.ndarray:
    """Expected rank [q] (1 = first) of the first positive, ties broken at random (the mid-rank)."""
    return ranks.above + (ranks.tied + ranks.best + 1) / (ranks.best + 1)


def weighted_median(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Median [r] of values [n] repeated as the whole-number rows of weights [r, n] say."""
    weights = np.ones((1, len(values)), np.float32) if weights is None else weights
    order = np.argsort(values, kind="stable")
    below = np.cumsum(weights[:, order], axis=1)
    half = below[:, -1:] / 2
    middle = np.stack([(below < half).sum(axis=1), (below <= half).sum(axis=1)])
    return values[order][np.minimum(middle, len(values) - 1)].mean(axis=0)


def retrieval(
    similarity: np.ndarray,
    reports: np.ndarray,
    subjects: np.ndarray | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Recall@k and median rank of n image-report pairs, both ways; identical reports count as one.

    similarity: float [n, n], image i against the report of pair j; reports: [n], equal where the
    text is equal (the text itself, a hash or a number); subjects: [n] for the cluster bootstrap
    over queries. image_to_text: each image ranks the distinct reports. text_to_image: each
    distinct report ranks all images and is found with the best of those that carry it (it is
    resampled with the subject of its first image). Keys: `image_to_text/recall@1`, ...,
    `text_to_image/median_rank`. Recall in [0, 1], rank from 1; `chance` is the expected recall of
    a random order.
    """
    _, first, group = np.unique(reports, return_index=True, return_inverse=True)
    everything = np.arange(len(group))
    subjects = everything if subjects is None else np.asarray(subjects)
    directions = {
        "image_to_text": (similarity, everything, first),
        "text_to_image": (similarity.T, first, everything),
    }
    out = {}
    for direction, (matrix, queries, targets) in directions.items():
        ranks = retrieval_ranks(matrix, group, group, queries, targets)
        negatives = len(targets) - ranks.positives
        hits = np.stack([recall_at(ranks, k) for k in ks], axis=1)
        rank = expected_rank(ranks)

        def statistic(w: np.ndarray, hits: np.ndarray = hits, rank: np.ndarray = rank):
            means = w @ hits / w.sum(axis=1, keepdims=True)
            return np.concatenate([means, weighted_median(rank, w)[:, None]], axis=1)

        values = statistic(np.ones((1, len(queries)), np.float32))[0]
        draws = bootstrap(statistic, len(queries), subjects[queries], resamples, seed)
        for i, k in enumerate(ks):
            entry = estimate(values[i], len(queries), draws[:, i])
            slots = np.full(len(queries), k)
            entry["chance"] = float(np.mean(1.0 - _miss(slots, negatives, ranks.positives)))
            out[f"{direction}/recall@{k}"] = entry
        out[f"{direction}/median_rank"] = estimate(values[-1], len(queries), draws[:, -1])
    return out


def pointing(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """The pointing game (Zhang et al., arXiv 1608.00507): whether the hottest pixel is in the
    region; of several equally hot ones, which an enlarged map has at its edges, the share that is.
    heat: float [n, h, w]; region: bool [n, h, w]. Returns [n] in [0, 1]."""
    hottest = heat == heat.max((1, 2), keepdims=True)
    return (hottest & region).sum((1, 2)) / hottest.sum((1, 2))


def contrast_to_noise(heat: np.ndarray, region: np.ndarray) -> np.ndarray:
    """(mean inside - mean outside) / sqrt(variance inside + variance outside), [n], of float and
    bool [n, h, w]. As in arXiv 2204.09817, 4.2.2, but with its sign, so that heat beside the region
    counts against it."""

    def moments(where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mean = heat.mean((1, 2), where=where)
        return mean, heat.var((1, 2), where=where)

    (inside, a), (outside, b) = moments(region), moments(~region)
    return (inside - outside) / np.sqrt(np.maximum(a + b, 1e-12))


def dice(heat: np.ndarray, region: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Dice coefficient [n, k] of heat >= each of k thresholds with a region that is not empty."""
    found = [heat >= t for t in thresholds]
    both = np.stack([(f & region).sum((1, 2)) for f in found], 1)
    return 2 * both / (np.stack([f.sum((1, 2)) for f in found], 1) + region.sum((1, 2))[:, None])
