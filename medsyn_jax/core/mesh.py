"""The device mesh (`data` x `fsdp`), the placement of arrays on it, and its processes."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError

# Rule values: "fsdp" shards the largest axis that the fsdp mesh axis divides, "" replicates.
FSDP_RULES: tree.Rules = ((r".*", "fsdp"),)
_PATIENCE_MS = 7 * 24 * 3600 * 1000
_meetings: Counter[str] = Counter()
_MIN_SHARDED = 2**14  # smaller leaves cost more in messages than they save in memory


def initialize() -> None:
    """Join the other processes of this run, if the environment names any.

    `tpu/run_on_pod.sh` sets MEDSYN_DISTRIBUTED=1 on every host of a TPU pod, and srun describes its
    step; `jax.distributed` finds the rest itself. Any other launcher sets
    MEDSYN_COORDINATOR=host:port, MEDSYN_PROCESSES and MEDSYN_PROCESS. Call before any computation.
    """
    coordinator = os.environ.get("MEDSYN_COORDINATOR")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator:
        try:
            processes, process = (
                int(os.environ[n]) for n in ("MEDSYN_PROCESSES", "MEDSYN_PROCESS")
            )
        except (KeyError, ValueError) as e:
            raise UserError(
                f"MEDSYN_COORDINATOR is set, so MEDSYN_PROCESSES and MEDSYN_PROCESS must be "
                f"whole numbers: {e}"
            ) from None
        jax.distributed.initialize(coordinator, processes, process)
    elif _has_peers():
        jax.distributed.initialize()


def wait_for_all(what: str) -> None:
    """Wait until every process has done `what`, however long that takes.

    A collective would give up after 30 s on CPU, and training a tokenizer may take longer.
    """
    if jax.process_count() > 1:
        _client().wait_at_barrier(_unique(what), timeout_in_ms=_PATIENCE_MS)


def from_first(text: str, name: str) -> str:
    """The first process's `text` on every process, however long the first one takes.

    If the first process ends instead, the others end as well.
    """
    if jax.process_count() == 1:
        return text
    name = _unique(name)
    if jax.process_index() == 0:
        _client().key_value_set(name, text)
        return text
    return _client().blocking_key_value_get(name, _PATIENCE_MS)


def _unique(name: str) -> str:
    """The name of a meeting of the processes: with the number of meetings of that name so far,
    which is the same on each process, since the coordinator accepts a name only once."""
    _meetings[name] += 1
    return f"{name}/{_meetings[name]}"


def _client() -> Any:
    from jax._src import distributed  # there is no public way to it

    if distributed.global_state.client is None:
        raise UserError(
            f"{jax.process_count()} processes see each other's devices but have not met: set "
            "MEDSYN_DISTRIBUTED=1 on each, or MEDSYN_COORDINATOR and its numbers"
        )
    return distributed.global_state.client


def leave_at_once(status: int, said: str = "") -> None:
    """Print `said` on stderr and end this process if it is one of several: at a regular exit it
    would wait for the others, which wait for it. They notice its end and end as well."""
    if jax.distributed.is_initialized():
        print(said, end="", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _has_peers() -> bool:
    pod = any(name in os.environ for name in ("MEDSYN_DISTRIBUTED", "TPU_WORKER_HOSTNAMES"))
    return pod or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A `data` x `fsdp` mesh over all devices; -1 for one of the two stands for the rest."""
    count = jax.device_count()
    shape = [data, fsdp]
    if shape.count(-1) == 1:
        other = -int(np.prod(shape))
        shape[shape.index(-1)] = count // other if other > 0 else 0
    if min(shape) < 1 or int(np.prod(shape)) != count:
        raise UserError(
            f"config.mesh: data={data} x fsdp={fsdp} does not fit the {count} devices of this run: "
            f"their product must be {count} (-1 stands for the rest)"
        )
    return jax.make_mesh(tuple(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def one_device() -> Mesh:
    """A mesh of the first device of this process alone."""
    return Mesh(np.array(jax.local_devices()[:1]).reshape(1, 1), ("data", "fsdp"))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 over all devices: FSDP shards parameters, never records."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def shardings(mesh: Mesh, shapes: Any, rules: tree.Rules = FSDP_RULES) -> Any:
    """The sharding of each leaf of `shapes` (arrays or ShapeDtypeStructs), by rules over names."""

    def place(path: tuple, leaf: Any) -> NamedSharding:
        value = tree.match(rules, tree.name_of(path))
        fsdp = mesh.shape["fsdp"]
        fits = [i for i, n in enumerate(leaf.shape) if n % fsdp == 0]
        if value != "fsdp" or fsdp == 1 or not fits or leaf.size < _MIN_SHARDED:
            return NamedSharding(mesh, P())
        axis = max(fits, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, P(*(None,) * axis, "fsdp"))

    return jax.tree_util.tree_map_with_path(place, shapes)


def per_process(global_batch: int, mesh: Mesh, accumulate: int = 1) -> int:
    """Records of one global batch that this process loads; UserError if they do not divide."""
    parts = mesh.size * accumulate
    if global_batch % parts:
        by = f"{mesh.size} devices" + (f" x {accumulate} micro-batches" if accumulate > 1 else "")
        raise UserError(
            f"config.data.batch_size: {global_batch} does not divide over {by}: "
            f"use a multiple of {parts}"
        )
    return global_batch // len(processes(mesh))


def processes(mesh: Mesh) -> list[int]:
    """The processes whose devices make up the mesh."""
    return sorted({device.process_index for device in mesh.devices.flat})


def replicate_key(mesh: Mesh, key: jax.Array) -> jax.Array:
    """A key, equal on every process, on all devices; device_put reaches only local ones."""
    data = np.asarray(jax.random.key_data(key))
    whole = jax.make_array_from_callback(data.shape, replicated(mesh), lambda index: data[index])
    return jax.random.wrap_key_data(whole, impl=jax.random.key_impl(key))


def to_devices(mesh: Mesh, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Global arrays, sharded along axis 0, from the part of the batch of each process."""
    sharding = batch_sharding(mesh)
    if sharding.is_fully_addressable:  # the same arrays in less than half of the time
        return jax.device_put(dict(local), sharding)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}


def to_host(arrays: Any) -> Any:
    """Whole arrays as NumPy on every process."""
    if jax.process_count() == 1:
        return jax.device_get(arrays)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(arrays, tiled=True)
