"""Whether a program for TPUs uses a Pallas kernel or XLA's own operations.

Most kernels here were compiled for chips on which nobody could run them. So a process with a TPU
compares value and gradient of a kernel with those of XLA's operations before its first use. The
environment variable MEDSYN_KERNELS overrides this: "xla" uses no kernel, "pallas" uses all without
a comparison.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from medsyn_jax.core import log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError

CHOICES = ("auto", "xla", "pallas")
_BOUND = 0.05  # of |a - b| / |b|; bf16 on both sides differs by up to 0.01
_verdicts: dict[tuple, bool] = {}
_reported: set[str] = set()


def trusted(
    name: str,
    kernel: Callable[..., jax.Array],
    plain: Callable[..., jax.Array],
    shapes: Sequence[tuple[int, ...]],
    dtype: DTypeLike,
    *,
    scale: float = 1.0,
    together: bool = False,
) -> bool:
    """Whether `kernel` is to be used; may be called while JAX traces a program.

    kernel, plain: functions of arrays of these shapes and dtype to one array. A process with a TPU
    compares them on normal numbers times `scale`, once for each name, shapes and dtype; a program
    that is only planned for a TPU gets the kernel. If they differ, or the kernel raises, one line
    says so. together: the first process decides for all, and all must call with the same arguments.
    Raises UserError for an unknown MEDSYN_KERNELS.
    """
    choice = os.environ.get("MEDSYN_KERNELS", "auto")
    if choice not in CHOICES:
        raise UserError(f"MEDSYN_KERNELS: {choice!r} is unknown: choose from {', '.join(CHOICES)}")
    if choice != "auto" or jax.default_backend() != "tpu":
        return choice != "xla"
    key = (name, tuple(shapes), jnp.dtype(dtype).name)
    if key not in _verdicts:
        # The trace in progress is state of its thread: compute in another one.
        with ThreadPoolExecutor(1) as pool:
            fault = pool.submit(_fault, kernel, plain, shapes, dtype, scale).result()
        if together:
            fault = meshes.from_first(fault, f"kernel {key}")
        _verdicts[key] = not fault
        if fault and name not in _reported:
            _reported.add(name)
            log.say(
                f"{name}: Pallas' kernel {fault} on this {jax.local_devices()[0].device_kind}: "
                "XLA's own operations take its place (MEDSYN_KERNELS=pallas forces the kernel)"
            )
    return _verdicts[key]


def _fault(
    kernel: Callable, plain: Callable, shapes: Sequence[tuple[int, ...]], dtype: Any, scale: float
) -> str:
    """The fault of the kernel, "" if there is none."""
    rng = np.random.default_rng(0)
    args = tuple((scale * rng.standard_normal(shape)).astype(dtype) for shape in shapes)
    weight = rng.standard_normal(jax.eval_shape(plain, *args).shape).astype(np.float32)

    def computed(f: Callable) -> list[np.ndarray]:
        """The value of f and its gradient by each argument."""

        def total(*args: jax.Array) -> tuple[jax.Array, jax.Array]:
            value = f(*args)
            return (value.astype(jnp.float32) * weight).sum(), value

        (_, value), grads = jax.jit(jax.value_and_grad(total, range(len(args)), has_aux=True))(
            *args
        )
        return [np.asarray(x, np.float64) for x in (value, *grads)]

    with jax.default_device(jax.local_devices()[0]):
        expected = computed(plain)
        try:
            actual = computed(kernel)
        except Exception as error:  # of the compiler or the chip, by whatever class
            return f"fails ({(str(error).strip() or repr(error)).splitlines()[0][:150]})"
    pairs = zip(actual, expected, strict=True)
    worst = max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)
    return "" if worst < _BOUND else f"differs from XLA's operations by {worst:.2g} of their size"
