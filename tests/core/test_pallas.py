"""Kernels are compared with XLA's path on a TPU, which a CPU stands in for here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medsyn_jax.core import pallas
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.mesh import make_mesh

SHAPES = ((4, 3), (4, 3))


def plain(x, y):
    return jnp.sin(x) * y


@jax.custom_vjp
def wrong_slope(x, y):
    return plain(x, y)


wrong_slope.defvjp(lambda x, y: (plain(x, y), (x, y)), lambda saved, dy: (dy, dy))


def raising(x, y):
    raise ValueError("Mosaic failed: unsupported operand\nwith a long explanation")


@pytest.fixture
def asked(monkeypatch):
    """trusted(name, kernel) as on a TPU, and the lines that are said."""
    lines = []
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(pallas, "_verdicts", {})
    monkeypatch.setattr(pallas, "_reported", set())
    monkeypatch.setattr(pallas.log, "say", lines.append)

    def ask(kernel, dtype=jnp.float32, **options):
        return pallas.trusted("the kernel", kernel, plain, SHAPES, dtype, **options)

    return ask, lines


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_kernel_that_computes_the_same_is_used_and_nothing_is_said(asked, dtype):
    ask, lines = asked
    assert ask(lambda x, y: y * jnp.sin(x), dtype)
    assert not lines


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (lambda x, y: 1.1 * plain(x, y), "differs from XLA's operations by 0.1 of their size"),
        (lambda x, y: plain(x, y).at[0, 0].set(jnp.nan), "differs from XLA's operations by nan"),
        (wrong_slope, "differs from XLA's operations by"),
        (raising, "fails (Mosaic failed: unsupported operand)"),
    ],
)
def test_one_that_does_not_is_left_out_with_one_line(asked, kernel, fault):
    ask, lines = asked
    assert not ask(kernel)
    assert not ask(kernel)
    assert not ask(kernel, jnp.bfloat16)
    (line,) = lines
    assert line.startswith(f"the kernel: Pallas' kernel {fault}")
    assert "\n" not in line
    assert "MEDSYN_KERNELS=pallas" in line


def test_the_comparison_runs_on_the_device_while_a_program_is_traced(asked):
    """Also inside shard_map, with arrays that are none of the program's."""
    _, lines = asked
    mesh, spec = make_mesh(), jax.sharding.PartitionSpec("data")
    kernels = {"good": plain, "bad": lambda x, y: 2 * plain(x, y)}
    found = {}

    def step(x):
        for name, kernel in kernels.items():
            found[name] = pallas.trusted(name, kernel, plain, SHAPES, x.dtype)
        return x

    jax.jit(jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec))(jnp.ones(8))
    assert found == {"good": True, "bad": False}
    assert len(lines) == 1


def test_the_environment_forces_either_without_a_comparison(asked, monkeypatch):
    ask, lines = asked
    monkeypatch.setenv("MEDSYN_KERNELS", "pallas")
    assert ask(raising)
    monkeypatch.setenv("MEDSYN_KERNELS", "xla")
    assert not ask(plain)
    monkeypatch.setenv("MEDSYN_KERNELS", "mosaic")
    with pytest.raises(UserError, match="MEDSYN_KERNELS: 'mosaic' is unknown: choose from auto, x"):
        ask(plain)
    assert not lines


def test_the_first_process_decides_for_all(asked, monkeypatch):
    ask, lines = asked
    monkeypatch.setattr(pallas.meshes, "from_first", lambda fault, name: "fails (elsewhere)")
    assert not ask(plain, together=True)
    assert len(lines) == 1


def test_without_a_tpu_nothing_is_compared():
    assert pallas.trusted("the kernel", raising, plain, SHAPES, np.float32)
