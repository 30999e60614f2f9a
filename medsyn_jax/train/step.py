"""The training step, a pure function, and the jit of training and evaluation."""

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
    """`step(state, batch, key) -> (state, metrics)`, not yet jitted.

    accumulate: number of micro-batches, computed one after another, whose gradients and metrics are
    averaged before the update. A contrastive loss has the negatives of its micro-batch only.
    frozen: the regexes of frozen parameters that `tx` was made with. These parameters are constants
    of the loss, and their gradients cost nothing and count in no norm. Running statistics that a
    regex matches ("image/.*") do not change either. Unlike torch's `.eval()`, a frozen part in
    training still normalizes by the statistics of the batch and still drops out.
    """
    rules = (*((pattern, True) for pattern in frozen), (".*", False))

    def trained_loss(params: Any, stats: Any, batch: Any, key: jax.Array) -> tuple:
        constant = tree.map_rules(rules, params)
        params = jax.tree.map(lambda p, c: jax.lax.stop_gradient(p) if c else p, params, constant)
        return loss_fn(params, stats, batch, key)

    grad_fn = jax.value_and_grad(trained_loss, has_aux=True)

    def gradients(params: Any, stats: Any, batch: Any, key: jax.Array) -> tuple:
        if accumulate == 1:
            (loss, (stats, metrics)), grads = grad_fn(params, stats, batch, key)
            return grads, stats, {"loss": loss, **metrics}

        def micro(carry: tuple, inputs: tuple) -> tuple:
            (stats, total), (part, key) = carry, inputs
            (loss, (stats, metrics)), grads = grad_fn(params, stats, part, key)
            total = jax.tree.map(jnp.add, total, grads)
            return (stats, total), {"loss": loss, **metrics}

        # Every micro-batch takes each `accumulate`-th record of a device, so that no data move.
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
        grads, stats, metrics = gradients(state["params"], state["stats"], batch, key)
        constant = tree.map_rules(rules, stats)
        stats = jax.tree.map(lambda new, old, c: old if c else new, stats, state["stats"], constant)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes int32 counts with fp32
            updates, opt = tx.update(grads, state["opt"], state["params"])
            params = optax.apply_updates(state["params"], updates)
            metrics |= {"grad_norm": optax.tree.norm(grads)}
        return {"step": state["step"] + 1, "params": params, "stats": stats, "opt": opt}, metrics

    return step


def compile_step(step: Callable, state: State, mesh: Mesh) -> Callable:
    """Jit a step: the state keeps its sharding and is donated, the batch is sharded."""
    placed, replicated = placement(state), meshes.replicated(mesh)
    return jax.jit(
        step,
        in_shardings=(placed, meshes.batch_sharding(mesh), replicated),
        out_shardings=(placed, replicated),
        donate_argnums=0,
    )


def compile_eval(fn: Callable, state: State, mesh: Mesh) -> Callable:
    """Jit `fn(params, stats, batch)`; its outputs are replicated on every device."""
    placed = placement(state)
    return jax.jit(
        fn,
        in_shardings=(placed["params"], placed["stats"], meshes.batch_sharding(mesh)),
        out_shardings=meshes.replicated(mesh),
    )
