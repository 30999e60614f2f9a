"""The training state: {"step", "params", "stats", "opt"} as plain trees, born where it lives."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.models.layers import split

State = dict[str, Any]


def shapes(make_model: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any, Any]:
    """(structure, params, stats) of a model with ShapeDtypeStructs for leaves; computes nothing."""
    return split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))


def create(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: tree.Rules,
    key: jax.Array,
) -> State:
    """A freshly initialised state, sharded over `mesh` by `rules`; no host ever holds all of it."""

    def make(key: jax.Array) -> State:
        _, params, stats = split(make_model(nnx.Rngs(key)))
        step = jnp.zeros((), jnp.int32)
        return {"step": step, "params": params, "stats": stats, "opt": tx.init(params)}

    placed = meshes.shardings(mesh, jax.eval_shape(make, key), rules)
    return jax.jit(make, out_shardings=placed)(key)


def place(
    params: Any, stats: Any, tx: optax.GradientTransformation, mesh: Mesh, rules: tree.Rules
) -> State:
    """The state of step 0 with these parameters and statistics (NumPy, the same on every process),
    sharded over `mesh` by `rules`."""

    def put(leaf: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
        return jax.make_array_from_callback(leaf.shape, where, lambda index: leaf[index])

    def make(params: Any, stats: Any) -> State:
        step = jnp.zeros((), jnp.int32)
        return {"step": step, "params": params, "stats": stats, "opt": tx.init(params)}

    given = tuple(
        jax.tree.map(put, part, meshes.shardings(mesh, part, rules)) for part in (params, stats)
    )
    placed = meshes.shardings(mesh, jax.eval_shape(make, *given), rules)
    return jax.jit(make, out_shardings=placed)(*given)


def replace(old: Any, new: Any) -> Any:
    """`new` (NumPy leaves of the same shapes on every process) placed as `old` is."""

    def place(a: jax.Array, value: np.ndarray) -> jax.Array:
        value = np.asarray(value, a.dtype)
        return jax.make_array_from_callback(a.shape, a.sharding, lambda index: value[index])

    return jax.tree.map(place, old, new)


def abstract(state: Any) -> Any:
    """Shapes, types and shardings of `state`: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def placement(state: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, state)


def summary(state: Mapping[str, Any]) -> str:
    """How large the state is, for the log."""
    numbers = {part: tree.size(state[part]) / 1e6 for part in ("params", "stats", "opt")}
    return ", ".join(f"{part} {count:.2f} M" for part, count in numbers.items())
