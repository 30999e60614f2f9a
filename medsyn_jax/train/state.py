"""The training state: {"step", "params", "stats", "opt"} as plain trees, sharded over the mesh."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, Sharding

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.models.layers import split

State = dict[str, Any]


def shapes(make_model: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Any, Any, Any]:
    """(structure, params, stats) of a model, with ShapeDtypeStructs for arrays."""
    return split(nnx.eval_shape(lambda: make_model(nnx.Rngs(0))))


def random(make_model: Callable[[nnx.Rngs], nnx.Module], key: jax.Array) -> tuple[Any, Any]:
    """(params, stats) of a random initialization, on one device."""
    return jax.jit(lambda key: split(make_model(nnx.Rngs(key)))[1:])(key)


def create(
    make_model: Callable[[nnx.Rngs], nnx.Module],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: tree.Rules,
    key: jax.Array,
) -> State:
    """A random initial state, sharded over `mesh` by `rules`, never whole on a host."""

    def make(key: jax.Array) -> State:
        _, params, stats = split(make_model(nnx.Rngs(key)))
        return initial(tx, params, stats)

    placed = meshes.shardings(mesh, jax.eval_shape(make, key), rules)
    return jax.jit(make, out_shardings=placed)(key)


def place(
    params: Any, stats: Any, tx: optax.GradientTransformation, mesh: Mesh, rules: tree.Rules
) -> State:
    """The initial state with these parameters and statistics, sharded over `mesh` by `rules`.

    params, stats: NumPy, the same on every process.
    """
    make = partial(initial, tx)
    arrays = tuple(
        jax.tree.map(_put, part, meshes.shardings(mesh, part, rules)) for part in (params, stats)
    )
    placed = meshes.shardings(mesh, jax.eval_shape(make, *arrays), rules)
    return jax.jit(make, out_shardings=placed)(*arrays)


def initial(tx: optax.GradientTransformation, params: Any, stats: Any) -> State:
    """The state at step 0, of arrays or inside a jitted function."""
    step = jnp.zeros((), jnp.int32)
    return {"step": step, "params": params, "stats": stats, "opt": tx.init(params)}


def _put(value: np.ndarray, sharding: Sharding) -> jax.Array:
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def replace(old: Any, new: Any) -> Any:
    """`new` with the types and shardings of `old`.

    new: NumPy leaves of the same shapes, the same on every process.
    """
    return jax.tree.map(lambda a, value: _put(np.asarray(value, a.dtype), a.sharding), old, new)


def abstract(state: Any) -> Any:
    """Shapes, types and shardings of `state`, as a checkpoint is restored into."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


def placement(state: Any) -> Any:
    """The sharding of every array of `state`."""
    return jax.tree.map(lambda a: a.sharding, state)


def summary(state: Mapping[str, Any]) -> str:
    """The sizes of params, stats and opt in millions of numbers, in one line."""
    numbers = {part: tree.size(state[part]) / 1e6 for part in ("params", "stats", "opt")}
    return ", ".join(f"{part} {count:.2f} M" for part, count in numbers.items())
