"""Building blocks of the U-Net and the autoencoder of latent diffusion (Rombach et al., 2022).

Images are NHWC. 1 x 1 convolutions are `Linear`. The last layer of a residual branch starts at zero
in the U-Net, as in the authors' code.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.attention import attention
from medsyn_jax.models.kernels import gelu
from medsyn_jax.models.layers import (
    Conv,
    GroupNorm,
    LayerNorm,
    Linear,
    in_order,
    numbered,
    uniform,
)

zeros = jax.nn.initializers.zeros


def conv(
    inputs: int,
    outputs: int,
    stride: int = 1,
    *,
    edges: tuple[int, int] | None = None,
    zero: bool = False,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Conv:
    """A 3 x 3 convolution with bias, initialized as torch's, or at zero."""
    init = zeros if zero else uniform(1 / math.sqrt(9 * inputs))
    return Conv(
        inputs, outputs, 3, stride, bias=True, edges=edges, init=init, dtype=dtype, rngs=rngs
    )


class ResBlock(nnx.Module):
    """Two convolutions, each after group normalization and SiLU, and a shortcut.

    time_width: of the time embedding that is added between the convolutions; 0 for none (the
    autoencoder).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time_width: int,
        groups: int,
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm1 = GroupNorm(inputs, groups, eps=eps, dtype=dtype)
        self.conv1 = conv(inputs, outputs, dtype=dtype, rngs=rngs)
        time = Linear(time_width, outputs, dtype=dtype, rngs=rngs) if time_width else None
        self.time = nnx.data(time)
        self.norm2 = GroupNorm(outputs, groups, eps=eps, dtype=dtype)
        self.conv2 = conv(outputs, outputs, zero=time_width > 0, dtype=dtype, rngs=rngs)
        shortcut = None if inputs == outputs else Linear(inputs, outputs, dtype=dtype, rngs=rngs)
        self.shortcut = nnx.data(shortcut)

    def __call__(
        self, x: Float[Array, "b h w i"], time: Float[Array, "b e"] | None = None
    ) -> Float[Array, "b h w o"]:
        """time: the time embedding after its SiLU."""
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if time is not None and self.time is not None:
            y = y + self.time(time)[:, None, None, :]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class Attention(nnx.Module):
    """Multi-head attention from x to itself or to a context of another width.

    bias: of query, key and value; the output always has one. Raises ValueError if the heads do not
    divide the width.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        bias: bool = False,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"the width {width} is no multiple of the {heads} heads")
        self.heads = heads
        self.query = Linear(width, width, bias=bias, dtype=dtype, rngs=rngs)
        self.key = Linear(context_width, width, bias=bias, dtype=dtype, rngs=rngs)
        self.value = Linear(context_width, width, bias=bias, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t w"], context: Float[Array, "b s c"]
    ) -> Float[Array, "b t w"]:
        def by_head(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        query, key, value = self.query(x), self.key(context), self.value(context)
        y = attention(by_head(query), by_head(key), by_head(value))
        return self.out(y.reshape(x.shape))


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the context and a GEGLU MLP, each on the normalized residual."""

    def __init__(
        self, width: int, context_width: int, heads: int, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.norm1 = LayerNorm(width, eps=1e-5, dtype=dtype)
        self.self_attention = Attention(width, width, heads, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(width, eps=1e-5, dtype=dtype)
        self.cross_attention = Attention(width, context_width, heads, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(width, eps=1e-5, dtype=dtype)
        self.up = Linear(width, 8 * width, dtype=dtype, rngs=rngs)
        self.down = Linear(4 * width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b t w"], context: Float[Array, "b s c"]
    ) -> Float[Array, "b t w"]:
        y = self.norm1(x)
        x = x + self.self_attention(y, y)
        x = x + self.cross_attention(self.norm2(x), context)
        value, gate = jnp.split(self.up(self.norm3(x)), 2, -1)
        return x + self.down(value * gelu(gate))


class Transformer(nnx.Module):
    """`depth` transformer blocks over the pixels, between two projections, with a residual."""

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        depth: int,
        groups: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(width, groups, eps=1e-6, dtype=dtype)
        self.enter = Linear(width, width, dtype=dtype, rngs=rngs)
        self.blocks = numbered(
            [TransformerBlock(width, context_width, heads, dtype, rngs) for _ in range(depth)]
        )
        self.leave = Linear(width, width, init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w f"], context: Float[Array, "b s c"]
    ) -> Float[Array, "b h w f"]:
        y = self.enter(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        for block in in_order(self.blocks):
            y = block(y, context)
        return x + self.leave(y).reshape(x.shape)


class PixelAttention(nnx.Module):
    """Single-head self-attention over the pixels, with a residual: the autoencoder's middle."""

    def __init__(self, width: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = GroupNorm(width, groups, eps=1e-6, dtype=dtype)
        self.attention = Attention(width, width, 1, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
        y = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attention(y, y).reshape(x.shape)


def double(x: Float[Array, "b h w f"]) -> Float[Array, "b p q f"]:
    """Each pixel twice in both directions."""
    b, h, w, f = x.shape
    wide = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, f))
    return wide.reshape(b, 2 * h, 2 * w, f)
