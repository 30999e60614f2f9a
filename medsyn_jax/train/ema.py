"""An exponential moving average of the parameters, as a part of the optimizer's state.

It is sharded, saved and restored with that state, and the training step does not handle it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class Average(NamedTuple):
    """The average over `count` updates, a tree like the model's parameters."""

    count: Int[Array, ""]
    params: Any


def keep_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx` with the state (state of `tx`, `Average` of the parameters after each update).

    decay: of the average, below 1. In update n it is at most (1 + n) / (10 + n), so that the random
    start is soon forgotten (as in diffusers' EMAModel with use_ema_warmup). 0 keeps a copy.
    """

    def init(params: Any) -> tuple[Any, Average]:
        return tx.init(params), Average(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        inner, average = state
        updates, inner = tx.update(updates, inner, params)
        n = average.count.astype(jnp.float32)
        keep = jnp.minimum(decay, (1 + n) / (10 + n))
        new = optax.apply_updates(params, updates)
        mixed = jax.tree.map(lambda a, p: keep * a + (1 - keep) * p, average.params, new)
        return updates, (inner, Average(average.count + 1, mixed))

    return optax.GradientTransformation(init, update)


def averaged(opt: Any) -> Any:
    """The averaged parameters of an optimizer state of `keep_average`."""
    return opt[1].params
