"""Projection heads: from an encoder's features to the space in which images meet reports.

All are called `(features, train)` and return unnormalized embeddings.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.layers import BatchNorm, Linear


class NormedHead(nnx.Module):
    """Linear-BN-ReLU-Linear-BN, the last without scale and bias (ConVIRT as MGCA's code has it)."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.first = Linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.first_norm = BatchNorm(hidden, dtype=dtype)
        self.last = Linear(hidden, outputs, dtype=dtype, rngs=rngs)
        self.last_norm = BatchNorm(outputs, affine=False, dtype=dtype)

    def __call__(self, x: Float[Array, "*n i"], train: bool) -> Float[Array, "*n o"]:
        x = self.first_norm(self.first(x), train, relu=True)
        return self.last_norm(self.last(x), train)


class MlpHead(nnx.Module):
    """Linear-ReLU-Linear (the original ConVIRT, section 2.2)."""

    def __init__(
        self,
        inputs: int,
        hidden: int,
        outputs: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.first = Linear(inputs, hidden, dtype=dtype, rngs=rngs)
        self.last = Linear(hidden, outputs, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n i"], train: bool) -> Float[Array, "*n o"]:
        del train
        return self.last(jax.nn.relu(self.first(x)))


class LinearHead(nnx.Module):
    """One linear layer."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.last = Linear(inputs, outputs, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*n i"], train: bool) -> Float[Array, "*n o"]:
        del train
        return self.last(x)
