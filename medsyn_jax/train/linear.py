"""The linear protocols of classification: a layer on stored features, at each label fraction."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from medsyn_jax.core import log
from medsyn_jax.train import features, fractions, logistic, probe


def fit_convex(
    config: Any,
    name: str,
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    targets: Mapping[str, np.ndarray],
    tables: Mapping[str, features.Table],
    seeds: np.ndarray,
) -> list[logistic.Fit]:
    """Layers of each fraction; seeds: int [s], the places in `Fraction.subsets` that are kept."""
    # All seeds are solved, whichever are judged: other shapes would be compiled anew.
    fits = logistic.fit_seeds(
        task,
        (tables["train"].features, targets["train"]),
        (tables["valid"].features, targets["valid"]),
        [fraction.subsets for fraction in drawn],
        inverse_penalties=config.inverse_penalties,
        where=f" on {name} features",
    )
    fits = [logistic.Fit(*(x[seeds] for x in fitted)) for fitted in fits]
    for fraction, fitted in zip(drawn, fits, strict=True):
        loss, c = fitted.loss[:, fraction.trained], fitted.inverse_penalty[:, fraction.trained]
        log.say(
            f"{name}, linear-convex, {_size(fraction)}: validation loss "
            f"{', '.join(f'{x:.3f}' for x in loss.mean(axis=1))} nats, C {float(c.min()):.0e} to "
            f"{float(c.max()):.0e}"
        )
    return fits


def fit_adamw(
    config: Any,
    name: str,
    task: probe.Task,
    drawn: Sequence[fractions.Fraction],
    targets: Mapping[str, np.ndarray],
    tables: Mapping[str, features.Table],
    seeds: np.ndarray,
) -> list[probe.Probe]:
    """As `fit_convex`."""
    train, valid = (jnp.asarray(tables[split].features) for split in ("train", "valid"))
    fits = []
    for fraction in drawn:
        # Early stopping must not depend on labels that the probe cannot learn.
        known = task.without(targets["valid"], ~fraction.trained)
        fitted = probe.fit_seeds(
            task,
            (train, targets["train"]),
            (valid, known),
            fraction.subsets[seeds],
            seed=config.seed,
            settings=config.probe,
            where=f" at {fraction.name} of the labels on {name} features",
        )
        log.say(
            f"{name}, linear-adamw, {_size(fraction)}: best validation "
            f"{', '.join(f'{x:.3f}' for x in fitted.score.tolist())} at epoch "
            f"{', '.join(map(str, fitted.best_epoch.tolist()))} of {config.probe.epochs}"
        )
        fits.append(fitted)
    return fits


def _size(fraction: fractions.Fraction) -> str:
    return f"{fraction.name} of the labels ({fraction.subsets.shape[1]} records)"


def logits(layers: Any, tables: Mapping[str, features.Table]) -> dict[str, np.ndarray]:
    """Logits [s, n, c] of "valid" and of "test" by the layers of one fraction."""
    read = {split: jnp.asarray(tables[split].features) for split in ("valid", "test")}
    return {split: np.asarray(probe.logits(layers, x)) for split, x in read.items()}


PROTOCOLS = {"linear-convex": fit_convex, "linear-adamw": fit_adamw}
