"""The conditional U-Net of Stable Diffusion 1.x and 2.x, as diffusers' UNet2DConditionModel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from medsyn_jax.models.diffusion.blocks import ResBlock, Transformer, conv, double
from medsyn_jax.models.layers import Conv, GroupNorm, Linear, in_order, numbered


def embed_time(
    t: Int[Array, " b"] | Float[Array, " b"], width: int, cosine_first: bool, shift: float
) -> Float[Array, "b w"]:
    """Sines and cosines of t at width / 2 frequencies from 1 to about 1 / 10000, in float32."""
    half = width // 2
    powers = jnp.arange(half, dtype=jnp.float32) / (half - shift)
    angles = t.astype(jnp.float32)[:, None] * jnp.exp(-math.log(10000.0) * powers)[None]
    waves = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(waves if cosine_first else waves[::-1], -1)


class Layer(nnx.Module):
    """A residual block, and a transformer after it where the level has one."""

    def __init__(self, resnet: ResBlock, attention: Transformer | None):
        self.resnet = resnet
        self.attention = nnx.data(attention)

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        time: Float[Array, "b e"],
        context: Float[Array, "b s c"],
    ) -> Float[Array, "b h w o"]:
        x = self.resnet(x, time)
        return x if self.attention is None else self.attention(x, context)


class Level(nnx.Module):
    """The layers of one resolution on one side, and the convolution to the next resolution."""

    def __init__(self, layers: list[Layer], resample: Conv | None):
        self.layers = numbered(layers)
        self.resample = nnx.data(resample)


Skips = list[Array]


class UNet(nnx.Module):
    """Predict the noise (or v) in a latent from the latent, the time and the text.

    widths: channels of each level, the outermost first; each next level has half the rows and
        columns.
    layers: residual blocks of a level on the way down; a level on the way up has one more.
    heads: attention heads of each level, which diffusers calls `attention_head_dim`.
    down, up: the levels with transformers, down from the outermost, up from the innermost.
    depth: blocks of a transformer. context_width: of the text embeddings.
    remat: recompute each residual block with its transformer in the backward pass.
    Raises ValueError if widths do not divide into heads or groups.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        widths: tuple[int, ...],
        layers: int,
        heads: tuple[int, ...],
        down: tuple[bool, ...],
        up: tuple[bool, ...],
        context_width: int,
        depth: int = 1,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        cosine_first: bool = True,
        shift: float = 0.0,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width, self.cosine_first, self.shift = widths[0], cosine_first, shift
        self.remat, self.dtype, self.per_level = remat, dtype, layers
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        time_width, last = 4 * widths[0], len(widths) - 1

        def layer(inputs: int, level: int, attentive: bool) -> Layer:
            width = widths[level]
            resnet = ResBlock(inputs, width, time_width, groups, eps, dtype, rngs)
            if not attentive:
                return Layer(resnet, None)
            options = (width, context_width, heads[level], depth, groups)
            return Layer(resnet, Transformer(*options, dtype, rngs))

        self.time_up = Linear(widths[0], time_width, **kind)
        self.time_down = Linear(time_width, time_width, **kind)
        self.enter = conv(in_channels, widths[0], **kind)
        levels, skips, width = [], [widths[0]], widths[0]
        for i, attentive in enumerate(down):
            blocks = []
            for _ in range(layers):
                blocks.append(layer(width, i, attentive))
                skips.append(width := widths[i])
            resample = conv(width, width, 2, **kind) if i < last else None
            skips += [width] if i < last else []
            levels.append(Level(blocks, resample))
        self.down = numbered(levels)
        self.mid = numbered([layer(width, last, True), layer(width, last, False)])
        levels = []
        for i, attentive in zip(range(last, -1, -1), up, strict=True):
            blocks = []
            for _ in range(layers + 1):
                blocks.append(layer(width + skips.pop(), i, attentive))
                width = widths[i]
            levels.append(Level(blocks, conv(width, width, **kind) if i else None))
        self.up = numbered(levels)
        self.norm = GroupNorm(width, groups, eps=eps, dtype=dtype)
        self.leave = conv(width, out_channels, zero=True, **kind)

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        t: Int[Array, " b"] | Float[Array, " b"],
        context: Float[Array, "b s c"],
    ) -> Float[Array, "b h w o"]:
        """The prediction for latents x at times t, in [0, 1000), with text embeddings."""
        return self.full(x, t, context)[0]

    def full(
        self,
        x: Float[Array, "b h w i"],
        t: Int[Array, " b"] | Float[Array, " b"],
        context: Float[Array, "b s c"],
        branch: int = 0,
    ) -> tuple[Float[Array, "b h w o"], Float[Array, "b h w d"]]:
        """The prediction, and the deep feature from which `shallow` computes later predictions."""
        time, context = self._embed(t), context.astype(self.dtype)
        x, skips = self._descend(x, time, context, branch=None)
        for layer in in_order(self.mid):
            x = self._layer(layer, x, time, context)
        levels = in_order(self.up)
        for level in levels[:-1]:
            for layer in in_order(level.layers):
                x = self._layer(layer, jnp.concatenate([x, skips.pop()], -1), time, context)
            size = skips[-1].shape  # an odd side was halved with rounding up
            x = level.resample(double(x)[:, : size[1], : size[2]])
        return self._ascend(x, skips, time, context, branch)

    def shallow(
        self,
        x: Float[Array, "b h w i"],
        t: Int[Array, " b"] | Float[Array, " b"],
        context: Float[Array, "b s c"],
        deep: Float[Array, "b h w d"],
        branch: int = 0,
    ) -> Float[Array, "b h w o"]:
        """The prediction with the deep feature of an earlier, close time (DeepCache, 2312.00858).

        Only `branch` layers of the outermost level on the way down, from 0 to all of its layers,
        and one more on the way up are computed. deep: from `full` with the same branch.
        """
        time, context = self._embed(t), context.astype(self.dtype)
        _, skips = self._descend(x, time, context, branch)
        return self._ascend(deep, skips, time, context, branch)[0]

    def _embed(self, t: Array) -> Array:
        """The time embedding after the SiLU with which every residual block begins."""
        waves = embed_time(t, self.width, self.cosine_first, self.shift)
        return jax.nn.silu(self.time_down(jax.nn.silu(self.time_up(waves))))

    def _layer(self, layer: Layer, x: Array, time: Array, context: Array) -> Array:
        run = nnx.remat(Layer.__call__) if self.remat else Layer.__call__
        return run(layer, x, time, context)

    def _descend(
        self, x: Array, time: Array, context: Array, branch: int | None
    ) -> tuple[Array, Skips]:
        """The feature at the bottom and all skips, or the skips of the first `branch` layers."""
        x = self.enter(x)
        skips = [x]
        if branch is not None:
            for layer in in_order(in_order(self.down)[0].layers)[:branch]:
                x = self._layer(layer, x, time, context)
                skips.append(x)
            return x, skips
        for level in in_order(self.down):
            for layer in in_order(level.layers):
                x = self._layer(layer, x, time, context)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        return x, skips

    def _ascend(
        self, x: Array, skips: Skips, time: Array, context: Array, branch: int
    ) -> tuple[Array, Array]:
        """The prediction, and the input of the last `branch` + 1 layers of the outermost level."""
        if not 0 <= branch <= self.per_level:
            raise ValueError(f"branch {branch}: the outermost level has {self.per_level} layers")
        deep, layers = x, in_order(in_order(self.up)[-1].layers)
        for layer in layers[-len(skips) :]:
            if len(skips) == branch + 1:
                deep = x
            x = self._layer(layer, jnp.concatenate([x, skips.pop()], -1), time, context)
        return self.leave(jax.nn.silu(self.norm(x))), deep
