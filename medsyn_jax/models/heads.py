"""Projection heads: from an encoder's features to the space in which images meet reports."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.layers import BatchNorm, Linear

HEADS = ("normed", "mlp", "linear")


class Head(nnx.Module):
    """A projection head; its embeddings are not normalized to unit length.

    kind: "normed" is Linear-BN-ReLU-Linear-BN, the last normalization without scale and bias
    (ConVIRT in MGCA's code); "mlp" is Linear-ReLU-Linear (the original ConVIRT, section 2.2);
    "linear" is one linear layer. hidden: the width between two layers. bias: of the last layer.
    Raises ValueError for another kind.
    """

    def __init__(
        self,
        kind: str,
        inputs: int,
        outputs: int,
        hidden: int = 0,
        *,
        bias: bool = True,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if kind not in HEADS:
            raise ValueError(f"head {kind!r}: choose from {', '.join(HEADS)}")
        first = first_norm = last_norm = None
        if kind != "linear":
            first, inputs = Linear(inputs, hidden, dtype=dtype, rngs=rngs), hidden
        if kind == "normed":
            first_norm = BatchNorm(hidden, dtype=dtype)
            last_norm = BatchNorm(outputs, affine=False, dtype=dtype)
        self.first, self.first_norm = nnx.data(first), nnx.data(first_norm)
        self.last = Linear(inputs, outputs, bias=bias, dtype=dtype, rngs=rngs)
        self.last_norm = nnx.data(last_norm)

    def __call__(self, x: Float[Array, "*n i"], train: bool) -> Float[Array, "*n o"]:
        if self.first is not None:
            x = self.first(x)
            norm = self.first_norm
            x = jax.nn.relu(x) if norm is None else norm(x, train, relu=True)
        x = self.last(x)
        return x if self.last_norm is None else self.last_norm(x, train)
