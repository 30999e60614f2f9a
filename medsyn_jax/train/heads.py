"""Fits of a small network on records in memory, such as a decoder on stored feature maps.

Fractions and seeds are fitted one after another by one compiled step. Records are gathered on the
host, so that the memory of the device bounds no data set.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import checks
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.train.state import State


def rules(section: str) -> tuple[checks.Rule, ...]:
    """Checks of a config's section on a fit."""
    return (
        checks.numbers("above 0", section, "learning_rate"),
        checks.numbers("from 0", section, "weight_decay"),
        checks.numbers("count", section, "batch_size epochs patience steps"),
    )


class Fit(NamedTuple):
    """The state (on the host) at the epoch of the lowest score, and the course of the fit."""

    params: Any
    stats: Any
    score: float
    best_epoch: int  # from 1
    epochs: int  # that were run


def fit(
    step: Callable,
    state: State,
    score: Callable[[State], float],
    source: loader.Readable,
    rows: np.ndarray,
    mesh: Mesh,
    *,
    batch_size: int,
    epochs: int,
    steps: int,
    patience: int,
    seed: int,
    threads: int = 0,
    where: str = "",
    section: str = "fit",
) -> Fit:
    """Train until the score has not fallen for `patience` epochs, or for `epochs`.

    Args:
        step: compiled (state, batch, key) -> (state, metrics), which donates the state.
        state: at the start.
        score: of a state after each epoch; the lowest is the best.
        source: of all training records.
        rows: int [k], those that this fit learns from; each epoch takes them in a new order, and
            fills up its last batch with its first records.
        mesh: of one device of this process.
        batch_size: records a step.
        epochs, steps: that a fit may take, whatever is less; an epoch that has begun is finished.
        seed: of the order and of the step's key.
        threads: that read the source.
        where: of the message, which fit this is.
        section: of the config that the message names.

    Raises:
        UserError: if no epoch gave a finite score.
    """
    key, rng = jax.random.key(seed), np.random.default_rng(seed)
    key = meshes.replicate_key(mesh, key)
    best = Fit(None, None, float("inf"), 0, 0)
    each = -(-len(rows) // batch_size)
    for epoch in range(1, min(epochs, -(-steps // each)) + 1):
        order = np.resize(rng.permutation(rows), each * batch_size)
        for batch in loader.in_order(source, order.reshape(-1, batch_size), threads):
            state, _ = step(state, meshes.to_devices(mesh, batch), key)
        value = score(state)
        if value < best.score:  # NaN is never lower
            params, stats = jax.device_get((state["params"], state["stats"]))
            best = Fit(params, stats, value, epoch, epoch)
        best = best._replace(epochs=epoch)
        if epoch - best.best_epoch >= patience:
            break
    if not best.best_epoch:
        field = f"config.{section}.learning_rate"
        raise UserError(f"{field}: the fit{where} diverged: use a smaller one")
    return best
