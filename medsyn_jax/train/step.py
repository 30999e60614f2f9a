"""The training step: pure, one screen long, and the only place where training is jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.train.state import State, placement

# loss_fn(params, stats, batch, key) -> (loss, (stats, metrics))
LossFn = Callable[[Any, Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, tuple[Any, Any]]]


def make_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    accumulate: int = 1,
    frozen: tuple[str, ...] = (),
) -> Callable:
    """`step(state, batch, key) -> (state, metrics)`, still to be jitted.

    accumulate: number of micro-batches whose gradients and metrics are averaged before the update,
    one after another; a contrastive loss then sees the negatives of its own micro-batch only.
    frozen: the regexes that `tx` was made with; those parameters are constants of the loss, so that
    their gradients cost nothing and count in no norm. The running statistics that they match
    ("image/.*") stay as they are, too. That is not torch's `.eval()`: a frozen part in training
    still normalizes by the statistics of the batch and still drops out.
    """
    rules = (*((pattern, True) for pattern in frozen), (".*", False))

    def of_trained(params: Any, stats: Any, batch: Any, key: jax.Array) -> tuple:
        still = tree.map_rules(rules, params)
        params = jax.tree.map(lambda p, s: jax.lax.stop_gradient(p) if s else p, params, still)
        return loss_fn(params, stats, batch, key)

    grad_fn = jax.value_and_grad(of_trained, has_aux=True)

    def gradients(params: Any, stats: Any, batch: Any, key: jax.Array) -> tuple:
        if accumulate == 1:
            (loss, (stats, metrics)), grads = grad_fn(params, stats, batch, key)
            return grads, stats, {"loss": loss, **metrics}

        def micro(carried: tuple, inputs: tuple) -> tuple:
            (stats, total), (part, key) = carried, inputs
            (loss, (stats, metrics)), grads = grad_fn(params, stats, part, key)
            total = jax.tree.map(jnp.add, total, grads)
            return (stats, total), {"loss": loss, **metrics}

        # Every micro-batch takes one record in `accumulate` from each device: nothing moves.
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch
        )
        start = (stats, jax.tree.map(jnp.zeros_like, params))
        keys = jax.random.split(key, accumulate)
        (stats, total), metrics = jax.lax.scan(micro, start, (parts, keys))
        grads = jax.tree.map(lambda x: x / accumulate, total)
        return grads, stats, jax.tree.map(lambda x: x.mean(0), metrics)

    def step(state: State, batch: dict[str, jax.Array], key: jax.Array) -> tuple[State, dict]:
        key = jax.random.fold_in(key, state["step"])
        grads, moved, metrics = gradients(state["params"], state["stats"], batch, key)
        still = tree.map_rules(rules, moved)
        stats = jax.tree.map(lambda new, old, s: old if s else new, moved, state["stats"], still)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with fp32
            updates, opt = tx.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            metrics |= {"grad_norm": optax.tree.norm(grads)}
        return {"step": state["step"] + 1, "params": params, "stats": stats, "opt": opt}, metrics

    return step


def compile_step(step: Callable, state: State, mesh: Mesh) -> Callable:
    """The jitted step: state stays where it is and is donated, the batch comes sharded."""
    where, everywhere = placement(state), meshes.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(where, meshes.batch_sharding(mesh), everywhere),
        out_shardings=(where, everywhere),
        donate_argnums=0,
    )


def compile_eval(fn: Callable, state: State, mesh: Mesh) -> Callable:
    """Jit `fn(params, stats, batch)`; its outputs come back whole on every device."""
    where = placement(state)
    return jax.jit(
        fn,
        in_shardings=(where["params"], where["stats"], meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
    )
