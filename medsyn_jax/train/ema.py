"""An exponential moving average of the parameters, kept in the optimizer's state.

There it is sharded, saved and restored with the rest, and the training step need not know of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int


class Average(NamedTuple):
    """`count` updates went into `params`, a tree like the model's."""

    count: Int[Array, ""]
    params: Any


def keep_average(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """`tx`, whose state becomes (its own, `Average`) of the parameters after each update.

    decay: of the average, below 1; early on (1 + n) / (10 + n) where that is less, so that the
    random start is soon forgotten (as in diffusers' EMAModel with use_ema_warmup). 0 keeps a copy.
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
    """The averaged parameters out of the optimizer state of `keep_average`."""
    return opt[1].params
