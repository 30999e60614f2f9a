"""Figures of merit: AUROC, AUPRC, F1 and calibration, and retrieval.

Everything is numpy on the host. Scores are sorted once for all bootstrap resamples, so a thousand
of them cost a few passes over the weights [r, n].
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from medsyn_jax.core import estimates
from medsyn_jax.core.estimates import Estimate, Figure

BINS = 15  # of probabilities, in the calibration error
ROC_GRID = np.linspace(0.0, 1.0, 51)  # false positive rates
_QUERIES = 256  # queries ranked at a time: the temporaries stay far below the similarity matrix


# ------------------------------------------------------------ classification


def auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUROC = P(score of a positive > score of a negative), ties counting one half.

    scores: float [n]; labels: [n], 1 positive, 0 negative, anything else is left out; weights: [r,
    n] >= 0, one row a resample (default: one row of ones). Returns float64 [r]; NaN where a row
    has no positive or no negative. Raises ValueError on scores that are not finite, which would
    sort to one end unnoticed.
    """
    if not np.isfinite(scores[(labels == 1) | (labels == 0)]).all():
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


def roc_curve(scores: np.ndarray, labels: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The ROC curve: true positive rates [g] at the false positive rates `grid` [g].

    scores, labels: [n], as of `auroc`, with a positive and a negative. Straight between thresholds,
    and the highest rate where the curve is vertical.
    """
    thresholds = np.unique(scores[(labels == 1) | (labels == 0)])[::-1]
    rates = []
    for y in (0, 1):
        of = np.sort(scores[labels == y])
        above = len(of) - np.searchsorted(of, thresholds, side="left")
        rates.append(np.concatenate([[0], above]) / len(of))
    return np.interp(grid, *rates)


def accuracy(
    predicted: np.ndarray, classes: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Share of records whose predicted class is right; unknown (negative) classes are left out.

    predicted, classes: int [n]; weights: [r, n]. Returns float64 [r]; NaN where no record is left.
    """
    weights = np.ones((1, len(classes)), np.float32) if weights is None else weights
    labelled = classes >= 0
    right = weights @ ((predicted == classes) & labelled).astype(weights.dtype)
    total = weights @ labelled.astype(weights.dtype)
    out = np.full(len(weights), np.nan)
    return np.divide(right, total, out=out, where=total > 0, dtype=np.float64, casting="unsafe")


def average_precision(
    scores: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUPRC as scikit-learn's average precision: sum of (recall gained) x precision.

    Over the distinct scores, highest first, so that ties have no order. Arguments, left-out
    records and NaN as in `auroc`, but computed in the precision of `weights` (default float64).
    The value of a random score is the share of positives.
    """
    if not np.isfinite(scores[(labels == 1) | (labels == 0)]).all():
        raise ValueError("average precision: scores are not finite")
    weights = np.ones((1, len(scores))) if weights is None else weights
    known = np.flatnonzero((labels == 1) | (labels == 0))
    order = known[np.argsort(-scores[known], kind="stable")]
    positive = labels[order] == 1
    if not positive.any() or positive.all():
        return np.full(len(weights), np.nan)
    # Only scores that positives have matter: sums of the records from one such score to the next.
    last = np.searchsorted(-scores[order], -scores[order][positive], side="right")
    ends, group = np.unique(last, return_inverse=True)
    starts = np.concatenate([[0], ends[:-1]])
    sums = np.add.reduceat(np.take(weights, order[: ends[-1]], axis=1), starts, axis=1)
    firsts = np.searchsorted(group, np.arange(len(ends)))
    gained = np.add.reduceat(np.take(weights, order[positive], axis=1), firsts, axis=1)
    selected, right = np.cumsum(sums, axis=1), np.cumsum(gained, axis=1)
    total = right[:, -1].copy()
    right *= gained
    right /= np.where(selected > 0, selected, 1)
    out = np.full(len(weights), np.nan)
    return np.divide(right.sum(axis=1), total, out=out, where=total > 0)


def best_threshold(scores: np.ndarray, labels: np.ndarray) -> float:
    """The score from which records count as positive with the highest F1; 0 without a positive.

    scores: float [n]; labels: [n], 1, 0, or negative = left out. Of several, the highest.
    """
    order = np.argsort(-scores, kind="stable")
    order = order[labels[order] >= 0]
    right = np.cumsum(labels[order] == 1)
    if not len(order) or not right[-1]:
        return 0.0
    f1 = 2 * right / (np.arange(1, len(order) + 1) + right[-1])
    ties = np.append(scores[order][1:] == scores[order][:-1], False)  # selected together
    return float(scores[order][np.where(ties, -1, f1).argmax()])


def calibration_columns(
    probability: np.ndarray, right: np.ndarray, known: np.ndarray
) -> np.ndarray:
    """Columns [n, BINS] whose weighted sums are those of (right - probability) in each bin.

    The expected calibration error is the sum of their absolute values over the weight of the known
    records (Guo et al., arXiv 1706.04599, equation 3, with bins of equal width).
    """
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    gap = np.where(known, right - probability, 0)
    return ((bins[:, None] == np.arange(BINS)) * gap[:, None]).astype(np.float32)


def aurocs(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], subjects: np.ndarray
) -> dict[str, Figure]:
    """AUROC of each of c labels, and their `mean`, of s classifiers; see `label_figures`."""
    figures = label_figures(logits, labels, names, subjects)
    return {name.removeprefix("auroc/"): figure for name, figure in figures.items()}


def label_figures(
    logits: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    subjects: np.ndarray,
    thresholds: np.ndarray | None = None,
) -> dict[str, Figure]:
    """Figures of each of c labels, `<figure>/<label>`, and their means, `<figure>/mean`.

    `auroc`; with thresholds [s, c] of the logits also `auprc`, `ece` (expected calibration error of
    the probability of the label, in 15 bins), and `accuracy` and `f1` of the records whose logit is
    at least the threshold.

    logits: [s, n, c] of s classifiers; labels: [n, c], 1, 0, or negative = left out, with both
    classes in each column; subjects: [n], for the bootstrap. The mean over a resample that lacks a
    class of a rare label is that of the other labels. The bootstrap of `ece` is biased upwards: a
    resample has more noise in its bins than the records.
    """
    kinds = ["auroc"] if thresholds is None else ["auroc", "auprc", "accuracy", "f1", "ece"]
    distinct, place = np.unique(logits, axis=0, return_inverse=True)  # equal fits: judged once
    first = [int(np.flatnonzero(place.reshape(-1) == i)[0]) for i in range(len(distinct))]

    def one(s: int, i: int, w: np.ndarray) -> list[np.ndarray]:
        scores, label = logits[s, :, i], labels[:, i]
        value = auroc(scores, label, w)
        if thresholds is None:
            return [value]
        chosen = scores >= thresholds[s, i]
        return [
            value,
            average_precision(scores, label, w),
            *_at_threshold(scores, label, chosen, w),
        ]

    def statistic(w: np.ndarray) -> np.ndarray:
        columns = [(s, i, w) for s in first for i in range(len(names))]
        values = np.array(list(pool.map(one, *zip(*columns, strict=True))))
        values = values.reshape(len(first), len(names), len(kinds), len(w))
        return values[place.reshape(-1)].transpose(3, 0, 1, 2)  # [r, s, c, kinds]

    with ThreadPoolExecutor() as pool:  # numpy works on large arrays without the interpreter's lock
        every = estimates.figure(statistic, np.ones(len(labels), bool), subjects)
    figures = {}
    for k, kind in enumerate(kinds):
        values, draws = every.values[..., k], every.draws[..., k]
        for i, name in enumerate(names):
            n, positives = int((labels[:, i] >= 0).sum()), int((labels[:, i] == 1).sum())
            counts = {"positives": positives}
            figures[f"{kind}/{name}"] = Figure(values[:, i], draws[..., i], n, counts)
        means = np.ma.masked_invalid(draws).mean(axis=-1).filled(np.nan)
        counts = {"labels": len(names)}
        figures[f"{kind}/mean"] = Figure(values.mean(axis=-1), means, every.n, counts)
    return figures


def _at_threshold(
    scores: np.ndarray, label: np.ndarray, chosen: np.ndarray, w: np.ndarray
) -> list[np.ndarray]:
    """Accuracy, F1 and calibration error, [r] each, of records `chosen`, bool [n], as positive."""
    known, positive = label >= 0, label == 1
    probability = 1 / (1 + np.exp(-scores.astype(np.float64)))
    counts = np.stack([known, positive, known & chosen, positive & chosen], axis=1)
    bins = calibration_columns(probability, positive, known)
    sums = (w @ np.concatenate([counts.astype(np.float32), bins], axis=1)).astype(np.float64)
    total, positives, selected, right = sums[:, :4].T
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 = NaN: undefined
        accuracy = (total - positives - selected + 2 * right) / total
        f1 = 2 * right / (positives + selected)
        return [accuracy, f1, np.abs(sums[:, 4:]).sum(axis=1) / total]


# ------------------------------------------------------------ retrieval


class Ranks(NamedTuple):
    """Place of each query's best positive among the targets, int [q] each."""

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
    memory beyond the matrix. Raises ValueError if a similarity is not finite (nothing compares as
    higher than NaN, so the query would rank first) or a query has no positive.
    """
    queries = np.arange(len(query_groups)) if queries is None else queries
    targets = np.arange(len(target_groups)) if targets is None else targets
    counts: list[tuple[np.ndarray, ...]] = []
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
        counts.append(tuple(mark.sum(axis=1) for mark in marks))
    return Ranks(*(np.concatenate(part) for part in zip(*counts, strict=True)))


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
    """Median [r] of values [n], each repeated by its whole-number weight in [r, n]."""
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
    resamples: int = estimates.RESAMPLES,
) -> dict[str, Estimate]:
    """Recall@k and median rank of n image-report pairs, both ways; identical reports count as one.

    similarity: float [n, n], image i against the report of pair j; reports: [n], equal where the
    text is equal (the text itself, a hash or a number); subjects: [n] for the cluster bootstrap
    over queries. image_to_text: each image ranks the distinct reports. text_to_image: each
    distinct report ranks all images, and the best of its own images counts (it is resampled with
    the subject of its first image). Keys: `image_to_text/recall@1`, `text_to_image/median_rank` and
    so on. Recall in [0, 1], rank from 1; `chance` is the expected recall of a random order.
    """
    _, first, group = np.unique(reports, return_index=True, return_inverse=True)
    images = np.arange(len(group))
    subjects = images if subjects is None else np.asarray(subjects)
    directions = {
        "image_to_text": (similarity, images, first),
        "text_to_image": (similarity.T, first, images),
    }
    entries = {}
    for direction, (matrix, queries, targets) in directions.items():
        ranks = retrieval_ranks(matrix, group, group, queries, targets)
        negatives, count = len(targets) - ranks.positives, len(queries)
        hits = np.stack([recall_at(ranks, k) for k in ks], axis=1)
        rank = expected_rank(ranks)

        def statistic(w: np.ndarray, hits: np.ndarray = hits, rank: np.ndarray = rank):
            means = w @ hits / w.sum(axis=1, keepdims=True)
            return np.concatenate([means, weighted_median(rank, w)[:, None]], axis=1)

        values = statistic(np.ones((1, count), np.float32))[0]
        draws = estimates.bootstrap(statistic, subjects[queries], resamples)
        names = [*(f"{direction}/recall@{k}" for k in ks), f"{direction}/median_rank"]
        for i, name in enumerate(names):
            entries[name] = estimates.estimate(values[i], count, draws[:, i])
        for k in ks:
            chance = 1.0 - _miss(np.full(count, k), negatives, ranks.positives)
            entries[f"{direction}/recall@{k}"]["chance"] = float(chance.mean())
    return entries


# ------------------------------------------------------------ masks
