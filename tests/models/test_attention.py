"""Attention of every platform equals the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from medsyn_jax.core.mesh import make_mesh
from medsyn_jax.models import attention
from tests.models.test_kernels import assert_same_gradients, normal


def test_attention():
    """Softmax over all positions or over the earlier ones, also where exp would overflow."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 5, 3, 4)).astype("f") for _ in range(3))
    q = 40 * q
    for causal in (False, True):
        logits = np.einsum("btnd,bsnd->bnts", q, k).astype("d") / 2
        if causal:
            logits = np.where(np.tri(5, dtype=bool), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("bnts,bsnd->btnd", weights, v)
        found = attention.attention(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), causal)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_attention_of_many_positions():
    """By heads and queries on CPU, by Pallas' kernel on TPU: as XLA's, where logits are large."""
    q, k, v = (normal(i, 1, 1024, 2, 8) for i in range(3))
    plain = functools.partial(attention._attention, causal=False, implementation="xla")
    assert_same_gradients(attention.attention, plain, 20 * q, k, v)
    assert "while" in jax.jit(attention.attention).lower(q, k, v).as_text()
    with pltpu.force_tpu_interpret_mode():
        found = jax.jit(attention._flash_attention)(20 * q, k, v)
    np.testing.assert_allclose(found, plain(20 * q, k, v), atol=2e-5)


@pytest.mark.parametrize("sound", [True, False])
def test_a_tpu_gets_the_flash_kernel_only_where_it_computes_the_same(sound, monkeypatch):
    """A program mapped over devices, as generation's; the kernel runs in interpreter mode."""
    lines, flash = [], attention._flash_attention
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(attention.pallas, "_verdicts", {})
    monkeypatch.setattr(attention.pallas, "_reported", set())
    monkeypatch.setattr(attention.pallas.log, "say", lines.append)
    if not sound:
        monkeypatch.setattr(attention, "_flash_attention", lambda q, k, v: flash(1.5 * q, k, v))
    q = jax.ShapeDtypeStruct((8, 1024, 2, 8), jnp.float32)
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    step = jax.shard_map(
        attention.attention, mesh=make_mesh(), in_specs=spec, out_specs=spec, check_vma=False
    )
    pltpu.set_tpu_interpret_mode()
    try:
        traced = jax.jit(step).trace(q, q, q)
    finally:
        pltpu.set_tpu_interpret_mode(None)
    assert ("flash_attention" in str(traced.jaxpr)) == sound
    assert len(lines) == (not sound)


@pytest.mark.parametrize("dims", [40, 160])
def test_a_gpu_gets_cudnn_attention_wherever_its_program_is_made(dims, monkeypatch):
    """Also on a machine without one, if cuDNN can be called there; never a CPU."""
    called = jax.nn.dot_product_attention

    def stand_in(*args, implementation, **options):
        y = called(*args, implementation="xla", **options)
        return jax.lax.optimization_barrier(y) if implementation == "cudnn" else y

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    attention._cudnn_loads.cache_clear()
    x = jax.ShapeDtypeStruct((1, 64, 2, dims), jnp.bfloat16)
    traced = jax.jit(lambda q: attention.attention(q, q, q)).trace(x)
    for platform in ("cuda", "cpu", "tpu"):
        found = "optimization_barrier" in traced.lower(lowering_platforms=(platform,)).as_text()
        assert found == (platform == "cuda" and dims == 40)
    attention._cudnn_loads.cache_clear()
