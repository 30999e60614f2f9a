"""Scaled dot-product attention by the fastest program of each platform.

Values and gradients are the same: docs/performance.md has the measurements,
tests/models/test_attention.py the comparisons.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas.ops.tpu import flash_attention
from jaxtyping import Array, Float

from medsyn_jax.core import pallas

_QUERIES = 512  # in one block


def attention(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    causal: bool = False,
) -> Float[Array, "b t n d"]:
    """Scaled dot-product attention of n heads; if `causal`, to positions s <= t only.

    The softmax is float32. NVIDIA GPUs run cuDNN's flash attention where that exists (16-bit
    floats, at most 128 dimensions a head, a multiple of 8). From 1,024 positions on, in multiples
    of 512, TPUs run Pallas' flash attention, if `core.pallas` trusts it, and CPUs compute one head
    and 512 queries at a time, so that the weights stay in the cache. All else is XLA's attention,
    and so is a TPU program that XLA shards by itself, because XLA cannot cut a Pallas kernel into
    parts: map the program over the devices (`jax.shard_map`), as generation does.
    """
    t, s, dims = query.shape[1], key.shape[1], query.shape[-1]
    plain = functools.partial(_attention, causal=causal, implementation="xla")
    forms: dict[str, Callable[..., Array]] = {}
    if query.dtype.itemsize == 2 and dims <= 128 and dims % 8 == 0 and _cudnn_loads():
        forms["cuda"] = functools.partial(_attention_by_cudnn, causal=causal)
    if not causal and min(t, s) >= 2 * _QUERIES and t % _QUERIES == s % _QUERIES == 0:
        forms["cpu"] = _attention_by_heads
        shapes = ((1, t, 1, dims), (1, s, 1, dims), (1, s, 1, dims))
        mapped = bool(jax.sharding.get_abstract_mesh().manual_axes)
        if mapped and pallas.trusted("attention", _flash_attention, plain, shapes, query.dtype):
            forms["tpu"] = _flash_attention
    if not forms:
        return plain(query, key, value)
    return lax.platform_dependent(query, key, value, **forms, default=plain)


@functools.cache
def _cudnn_loads() -> bool:
    """Whether JAX has cuDNN, which it may have even where a GPU program is only compiled."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(functools.partial(_attention_by_cudnn, causal=False), x, x, x)
    except RuntimeError:
        return False
    return True


def _attention(query: Array, key: Array, value: Array, causal: bool, implementation: Any) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # JAX promotes 16-bit logits to float32
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation=implementation
        )


def _attention_by_cudnn(query: Array, key: Array, value: Array, causal: bool) -> Array:
    """cuDNN's attention, with XLA's gradient for odd numbers of positions, which JAX refuses."""
    cudnn = functools.partial(_attention, causal=causal, implementation="cudnn")
    plain = functools.partial(_attention, causal=causal, implementation="xla")
    if query.shape[1] % 2 or key.shape[1] % 2:
        cudnn = jax.custom_vjp(cudnn)
        cudnn.defvjp(functools.partial(jax.vjp, plain), lambda pull, dy: pull(dy))
    return jnp.asarray(cudnn(query, key, value))


def _attention_by_heads(query: Array, key: Array, value: Array) -> Array:
    b, t, n, d = query.shape
    scale = np.float32(d**-0.5)

    @jax.checkpoint
    def block(query: Array, key: Array, value: Array) -> Array:
        logits = lax.dot_general(
            query, key, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )
        logits = logits * scale
        weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        return (jnp.matmul(weights.astype(value.dtype), value) / total).astype(value.dtype)

    def head(qkv: tuple[Array, Array, Array]) -> Array:
        query, key, value = qkv
        queries = query.reshape(-1, _QUERIES, d)
        return lax.map(lambda q: block(q, key, value), queries).reshape(t, d)

    by_head = [jnp.swapaxes(x, 1, 2).reshape(b * n, -1, d) for x in (query, key, value)]
    return jnp.swapaxes(lax.map(head, tuple(by_head)).reshape(b, n, t, d), 1, 2)


def _flash_attention(query: Array, key: Array, value: Array) -> Array:
    by_head = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    names = [f.name for f in dataclasses.fields(flash_attention.BlockSizes)]
    blocks = {name: 1 if name == "block_b" else _QUERIES for name in names}
    y = flash_attention.flash_attention(
        *by_head,
        sm_scale=query.shape[-1] ** -0.5,
        block_sizes=flash_attention.BlockSizes(**blocks),
    )
    return jnp.swapaxes(y, 1, 2)
