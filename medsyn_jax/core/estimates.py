"""Entries of results.json with intervals: means and AUROCs by subject, rates of rare events."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import beta

from medsyn_jax.core import metrics
from medsyn_jax.core.metrics import Estimate


def mean(values: np.ndarray, groups: np.ndarray) -> Estimate:
    """Mean of values [n] with the bootstrap interval over groups [n] (subjects, prompts)."""

    def statistic(w: np.ndarray) -> np.ndarray:
        return w @ values / w.sum(axis=1)

    draws = metrics.bootstrap(statistic, len(values), groups)
    return metrics.estimate(float(np.mean(values)), len(values), draws)


def rate(flagged: np.ndarray) -> Estimate:
    """Share of True in bool [n] with its 95 % interval of Clopper and Pearson (1934).

    It holds for 0 of n, too, where a bootstrap has nothing to draw. It takes the records for
    independent: with several images a prompt it is too narrow.
    """
    n, k = len(flagged), int(flagged.sum())
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return Estimate(value=k / n, n=n, ci95=[low, high])


@dataclass(frozen=True)
class Figure:
    """A figure of merit of s fitted classifiers over n records, and the same on resamples of them.

    Figures over the same records are drawn on the same resamples: a difference of two is paired.
    """

    values: np.ndarray  # [s]
    draws: np.ndarray  # [r, s]
    n: int
    positives: int | None = None  # of the n records, where it is a label's
    labels: int | None = None  # over which it is the mean

    def __sub__(self, other: "Figure") -> "Figure":
        return replace(self, values=self.values - other.values, draws=self.draws - other.draws)

    def estimate(self) -> Estimate:
        """Mean over the classifiers, with its interval over records and classifiers together."""
        entry = metrics.estimate_over_seeds(self.values, self.draws, self.n)
        if self.positives is not None:
            entry["positives"] = self.positives
        if self.labels is not None:
            entry["labels"] = self.labels
        return entry


def figure(
    statistic: Callable[[np.ndarray], np.ndarray], counted: np.ndarray, subjects: np.ndarray
) -> Figure:
    """The figure of a `statistic` that maps weights [r, n] of the records to values [r, s].

    counted: bool [n], the records that it rests on; subjects [n], who are drawn.
    """
    values = statistic(np.ones((1, len(counted)), np.float32))[0]
    draws = metrics.bootstrap(statistic, len(counted), subjects)
    return Figure(values, draws, int(counted.sum()))


def aurocs(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], subjects: np.ndarray
) -> dict[str, Estimate]:
    """`auroc_figures` as entries of results.json."""
    found = auroc_figures(logits, labels, names, subjects)
    return {name: figure.estimate() for name, figure in found.items()}


def auroc_figures(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], subjects: np.ndarray
) -> dict[str, Figure]:
    """AUROC of each of c labels, and their `mean`, over s fitted classifiers.

    logits [s, n, c]; labels [n, c]: 1, 0, or negative = left out, both classes of each; subjects
    [n], for the bootstrap. A resample can lack a class of a rare label: its mean is of the others.
    """

    def statistic(w: np.ndarray) -> np.ndarray:
        columns = range(len(names))
        found = [[metrics.auroc(x[:, i], labels[:, i], w) for i in columns] for x in logits]
        return np.array(found).transpose(2, 0, 1)  # [r, s, c]

    whole = figure(statistic, np.ones(len(labels), bool), subjects)
    counts, positives = ((x.sum(axis=0).tolist()) for x in (labels >= 0, labels == 1))
    found = {
        name: Figure(whole.values[:, i], whole.draws[..., i], counts[i], positives[i])
        for i, name in enumerate(names)
    }
    known = np.isfinite(whole.draws)
    count, total = known.sum(axis=-1), np.where(known, whole.draws, 0).sum(axis=-1)
    means = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    mean = Figure(whole.values.mean(axis=-1), means, whole.n, labels=len(names))
    return found | {"mean": mean}
