"""Entries of results.json with intervals: means and AUROCs by subject, rates of rare events."""

from collections.abc import Sequence

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


def aurocs(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], subjects: np.ndarray
) -> dict[str, Estimate]:
    """AUROC of each label, and their `mean`, over s fitted classifiers.

    logits [s, n, c]; labels [n, c]: 1, 0, or negative = left out, both classes of each; subjects
    [n], for the bootstrap over subjects and classifiers together.
    """

    def statistic(w: np.ndarray) -> np.ndarray:
        columns = range(len(names))
        found = [[metrics.auroc(x[:, i], labels[:, i], w) for i in columns] for x in logits]
        return np.array(found).transpose(2, 0, 1)  # [r, s, c]

    values = statistic(np.ones((1, len(labels)), np.float32))[0]
    draws = metrics.bootstrap(statistic, len(labels), subjects)
    counts = (labels >= 0).sum(axis=0).tolist()
    found = {
        name: metrics.estimate_over_seeds(values[:, i], draws[..., i], counts[i])
        for i, name in enumerate(names)
    }
    # A resample can lack a class of a rare label: its mean is that of the others.
    known = np.isfinite(draws)
    count = known.sum(axis=2)
    total = np.where(known, draws, 0).sum(axis=2)
    means = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    found["mean"] = metrics.estimate_over_seeds(values.mean(axis=1), means, len(labels))
    return found
