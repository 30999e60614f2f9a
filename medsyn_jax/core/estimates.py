"""Values with 95 % intervals, by bootstrap over subjects, as entries of `results.json`.

All of it is numpy on the host, vectorised over the resamples: a resample is a row of weights, which
say how often each record was drawn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

RESAMPLES = 1000
_CHUNK = 2**22  # weights held at a time (16 MB), so memory does not grow with resamples * n

Estimate = dict[str, Any]
"""An entry of `results.json`: `value` (None where undefined: NaN is no JSON), `n` (the records or
queries that it rests on), and, where there is one, `ci95`: [low, high]. Others add `chance`, the
value of a random guess, and what `Figure` names."""


def resample_weights(
    groups: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Bootstrap resamples of n records as weights, float32 [r, n] at a time.

    groups: [n] subject of each record (any type). Whole subjects are drawn (cluster bootstrap),
    because images of one patient are not independent. The same arguments give the same rows, so
    two figures that were computed with them are paired.
    """
    subject = np.unique(groups, return_inverse=True)[1]
    count, n = int(subject.max(initial=-1)) + 1, len(subject)
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // max(n, 1))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = rng.integers(count, size=(r, count)) + np.arange(r)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=r * count).reshape(r, count)
        yield times.astype(np.float32)[:, subject]


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray],
    groups: np.ndarray,
    resamples: int = RESAMPLES,
    seed: int = 0,
    counted: np.ndarray | slice = slice(None),
) -> np.ndarray:
    """[resamples, ...] values of `statistic`, which maps weights [r, n] to values [r, ...]; NaN
    where the records `counted`, on which the values rest, are of fewer than two groups."""
    draws = np.concatenate([statistic(w) for w in resample_weights(groups, resamples, seed)])
    return draws if len(np.unique(groups[counted])) > 1 else np.full_like(draws, np.nan)


def interval95(draws: np.ndarray) -> list[float] | None:
    """Percentile interval of the defined draws [r]; None where fewer than half of them are."""
    defined = draws[np.isfinite(draws)]
    if 2 * len(defined) < len(draws) or not len(defined):
        return None
    return np.percentile(defined, [2.5, 97.5]).tolist()


def estimate(value: float | np.floating, n: int | np.integer, draws: np.ndarray) -> Estimate:
    """An entry from a value, the records it rests on and its bootstrap draws [r]."""
    entry = {"value": _number(value), "n": int(n)}
    interval = interval95(draws)
    return entry if interval is None else entry | {"ci95": interval}


def mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of values [n], with its interval over groups [n] (subjects or prompts)."""
    draws = bootstrap(lambda w: w @ values / w.sum(axis=1), groups)
    return estimate(np.mean(values), len(values), draws)


def rate(flags: np.ndarray) -> Estimate:
    """Share of True in bool [n], with the interval of Clopper and Pearson (1934).

    Unlike a bootstrap, the interval is right for 0 of n, too. It takes the records for independent,
    so with several images of one prompt it is too narrow.
    """
    from scipy import stats  # takes more than a second, and training has no rates

    n, k = len(flags), int(flags.sum())
    low = float(stats.beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(stats.beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return {"value": k / n, "n": n, "ci95": [low, high]}


@dataclass(frozen=True)
class Figure:
    """A figure of merit of s classifiers (one a training seed) on n records and on resamples.

    Figures of the same records come from the same resamples, so their difference is paired.
    """

    values: np.ndarray  # [s]
    draws: np.ndarray  # [r, s]
    n: int
    # "positives" among the n records for the AUROC of a label, "labels" for a mean over labels.
    counts: dict[str, int] = field(default_factory=dict)

    def __sub__(self, other: "Figure") -> "Figure":
        return replace(self, values=self.values - other.values, draws=self.draws - other.draws)

    def estimate(self) -> Estimate:
        """Mean over the classifiers, with an interval for test records and seeds together.

        Each resample of the records is averaged over s classifiers drawn with replacement, so the
        interval holds both sources of chance. (With s seeds it understates the variance between
        seeds by the factor (s - 1) / s.) `seed_std` is the sample standard deviation, None for one
        seed.
        """
        r, s = self.draws.shape
        chosen = np.random.default_rng(0).integers(s, size=(r, s))
        draws = np.take_along_axis(self.draws, chosen, axis=1).mean(axis=1)
        seeds = {
            "seeds": [_number(v) for v in self.values],
            "seed_std": _number(np.std(self.values, ddof=1)) if s > 1 else None,
        }
        return estimate(np.mean(self.values), self.n, draws) | seeds | self.counts


def figure(
    statistic: Callable[[np.ndarray], np.ndarray], counted: np.ndarray, subjects: np.ndarray
) -> Figure:
    """The figure of a `statistic` that maps weights [r, n] of the records to values [r, s].

    counted: bool [n], the records that the figure rests on; subjects [n]: the units drawn. Records
    of one subject give no interval.
    """
    values = statistic(np.ones((1, len(counted))))[0]  # float64, the resamples float32
    return Figure(values, bootstrap(statistic, subjects, counted=counted), int(counted.sum()))


def _number(value: float | np.floating) -> float | None:
    return float(value) if np.isfinite(value) else None
