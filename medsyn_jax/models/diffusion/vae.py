"""The autoencoder of latent diffusion (Rombach et al., 2022), as diffusers' AutoencoderKL."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.diffusion.blocks import PixelAttention, ResBlock, conv, double
from medsyn_jax.models.layers import Conv, GroupNorm, Linear, in_order, numbered

_EPS = 1e-6


class Middle(nnx.Module):
    """Two residual blocks with attention between them."""

    def __init__(self, width: int, groups: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.first = ResBlock(width, width, 0, groups, _EPS, dtype, rngs)
        self.attention = PixelAttention(width, groups, dtype, rngs)
        self.second = ResBlock(width, width, 0, groups, _EPS, dtype, rngs)

    def __call__(self, x: Float[Array, "b h w f"]) -> Float[Array, "b h w f"]:
        return self.second(self.attention(self.first(x)))


class Level(nnx.Module):
    """The residual blocks of one resolution, and the convolution to the next one.

    In the encoder the convolution has stride 2, with zeros after the last row and column only; in
    the decoder it follows the doubling of each pixel.
    """

    def __init__(self, blocks: list[ResBlock], resample: Conv | None):
        self.blocks = numbered(blocks)
        self.resample = nnx.data(resample)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        for block in in_order(self.blocks):
            x = block(x)
        if self.resample is None:
            return x
        return self.resample(double(x) if self.resample.stride == 1 else x)


class Coder(nnx.Module):
    """Encoder (`down`: levels, then the middle) or decoder (the middle, then levels)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        widths: tuple[int, ...],
        layers: int,
        groups: int,
        down: bool,
        remat: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        self.down, self.remat = down, remat
        self.enter = conv(inputs, widths[0], **kind)
        levels, width = [], widths[0]
        for i, channels in enumerate(widths):
            blocks, resample = [], None
            for _ in range(layers):
                blocks.append(ResBlock(width, channels, 0, groups, _EPS, dtype, rngs))
                width = channels
            if i < len(widths) - 1:
                options = {"stride": 2, "edges": (0, 1)} if down else {}
                resample = conv(width, width, **options, **kind)
            levels.append(Level(blocks, resample))
        self.levels = numbered(levels)
        self.mid = Middle(widths[-1] if down else widths[0], groups, **kind)
        self.norm = GroupNorm(widths[-1], groups, eps=_EPS, dtype=dtype)
        self.leave = conv(widths[-1], outputs, **kind)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        levels = in_order(self.levels)
        x = self.enter(x)
        for part in [*levels, self.mid] if self.down else [self.mid, *levels]:
            run = nnx.remat(type(part).__call__) if self.remat else type(part).__call__
            x = run(part, x)
        return self.leave(jax.nn.silu(self.norm(x)))


class Autoencoder(nnx.Module):
    """Encode images as the mean and log-variance of Gaussian latents, and decode latents.

    widths: channels of each level, the outermost first; a latent has 2 ** (len(widths) - 1) times
    fewer rows and columns than its image. layers: residual blocks of a level of the encoder; the
    decoder has one more. quant, post_quant: the linear maps after the encoder and before the
    decoder. remat: recompute each level in the backward pass. Raises ValueError if `groups` do not
    divide a width.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        latent_channels: int,
        widths: tuple[int, ...],
        layers: int,
        *,
        groups: int = 32,
        quant: bool = True,
        post_quant: bool = True,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kind: dict[str, Any] = {"dtype": dtype, "rngs": rngs}
        z = latent_channels
        self.encoder = Coder(in_channels, 2 * z, widths, layers, groups, True, remat, **kind)
        self.quant = nnx.data(Linear(2 * z, 2 * z, **kind) if quant else None)
        self.post_quant = nnx.data(Linear(z, z, **kind) if post_quant else None)
        back = widths[::-1]
        self.decoder = Coder(z, out_channels, back, layers + 1, groups, False, remat, **kind)

    def encode(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b p q z"], Float[Array, "b p q z"]]:
        """Mean and log-variance (clipped to [-30, 20]) of the latents of images x in [-1, 1]."""
        y = self.encoder(x)
        y = y if self.quant is None else self.quant(y)
        mean, logvar = jnp.split(y, 2, -1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, z: Float[Array, "b p q z"]) -> Float[Array, "b h w c"]:
        """Images, about in [-1, 1], of latents in the encoder's scale."""
        return self.decoder(z if self.post_quant is None else self.post_quant(z))

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h w o"]:
        """The image of the mean latent."""
        return self.decode(self.encode(x)[0])
