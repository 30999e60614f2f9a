"""Decoders from an encoder's feature maps to the logits of a mask.

The U-Net's (arXiv 1505.04597) is on ResNet-50 that of MGCA's code (arXiv 2210.06044): five blocks
of nearest-neighbour enlargement, skip connection and two convolutions. SegFormer's (arXiv
2105.15203) is light: linear layers alone, at a quarter of the image's side.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.kernels import convolve, convolve_doubled
from medsyn_jax.models.layers import BatchNorm, Conv, in_order, numbered
from medsyn_jax.models.resnet import ConvNorm

_NARROWEST = 8  # channels of a block


def widths(channels: Sequence[int], sides: Sequence[int], size: int) -> tuple[int, ...]:
    """The channels of the blocks: an eighth of the coarsest map's, then halves, at least 8.

    channels, sides: of the maps, the finest first. size: side of the image in pixels. There are as
    many blocks as maps, and more where the finest map is smaller than half an image: a ResNet has
    five, the 14 x 14 patches of a ViT at 224 pixels four.
    """
    blocks = len(channels) - 1 + max(1, math.ceil(math.log2(size / sides[0])))
    return tuple(max(channels[-1] >> (3 + i), _NARROWEST) for i in range(blocks))


class Block(nnx.Module):
    """Enlargement, concatenation with the skip connection, and two 3 x 3 convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        init = jax.nn.initializers.he_uniform()
        shapes = [(inputs + skip, outputs), (outputs, outputs)]
        self.convs = numbered(
            [ConvNorm(*shape, 3, init=init, dtype=dtype, rngs=rngs) for shape in shapes]
        )

    def __call__(
        self,
        x: Float[Array, "b h h i"],
        skip: Float[Array, "b s s k"] | None,
        side: int,
        train: bool,
    ) -> Float[Array, "b s s o"]:
        """side: of the output; that of `skip`, if there is one."""
        first, second = in_order(self.convs)
        # The concatenation is not made: a frozen skip connection then needs no gradient.
        kernel, inputs = first.conv.kernel[...].astype(x.dtype), x.shape[-1]
        if side == 2 * x.shape[1] and kernel.size <= x.size:
            y = convolve_doubled(x, kernel[:, :, :inputs])
        else:
            y = convolve(enlarged(x, side), kernel[:, :, :inputs], 1)
        if skip is not None:
            y = y + convolve(skip.astype(x.dtype), kernel[:, :, inputs:], 1)
        return second(first.norm(y, train, relu=True), train)


class Decoder(nnx.Module):
    """Feature maps to logits at the size of the image.

    channels: of the maps, the finest first (ResNet-50: 64, 256, 512, 1024, 2048; a ViT: its width).
    widths: the output channels of the blocks, the coarsest first. Blocks beyond the maps have no
    skip connection. Kernels start He-uniform, that of the last layer Xavier-uniform. Raises
    ValueError for fewer blocks than maps.
    """

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int],
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(widths) < len(channels):
            raise ValueError(f"{len(widths)} blocks for {len(channels)} maps")
        self.dtype = dtype
        extra = len(widths) - len(channels) + 1
        inputs = [channels[-1], *widths]
        skips = [*reversed(channels[:-1]), *[0] * extra]
        shapes = zip(inputs, skips, widths, strict=False)
        self.blocks = numbered([Block(*shape, dtype=dtype, rngs=rngs) for shape in shapes])
        last = jax.nn.initializers.glorot_uniform()
        self.out = Conv(widths[-1], 1, 3, bias=True, init=last, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b _ _ _"]], size: int, train: bool
    ) -> Float[Array, "b size size"]:
        """Logits in fp32 at `size` pixels; only with `train` do the statistics move."""
        x = maps[-1].astype(self.dtype)
        skips = list(reversed(maps[:-1]))
        for number, block in enumerate(in_order(self.blocks)):
            skip = skips[number] if number < len(skips) else None
            last = number == len(self.blocks) - 1
            doubled = size if last else min(2 * x.shape[1], size)
            x = block(x, skip, doubled if skip is None else skip.shape[1], train)
        return self.out(x)[..., 0].astype(jnp.float32)


class MLPDecoder(nnx.Module):
    """A light decoder after SegFormer's: feature maps to logits at the size of the image.

    Each map goes through a linear layer, is enlarged to the finest map, and all are added;
    normalization, ReLU and another linear layer give logits that are enlarged bilinearly. SegFormer
    concatenates the maps for a second linear layer before the first ReLU, which is the same
    function with more parameters, and has dropout. channels: of the maps, the finest first. width:
    of the hidden layer.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = dtype
        init = jax.nn.initializers.variance_scaling(2 / len(channels), "fan_in", "uniform")
        self.each = numbered(
            [Conv(inputs, width, 1, init=init, dtype=dtype, rngs=rngs) for inputs in channels]
        )
        self.norm = BatchNorm(width, dtype=dtype)
        last = jax.nn.initializers.glorot_uniform()
        self.out = Conv(width, 1, 1, bias=True, init=last, dtype=dtype, rngs=rngs)

    def __call__(
        self, maps: Sequence[Float[Array, "b _ _ _"]], size: int, train: bool
    ) -> Float[Array, "b size size"]:
        """As of `Decoder`."""
        *finer, x = [conv(x) for conv, x in zip(in_order(self.each), maps, strict=True)]
        for y in reversed(finer):
            x = y + enlarged(x, y.shape[1])
        logits = self.out(self.norm(x, train, relu=True))[..., 0].astype(jnp.float32)
        return jax.image.resize(logits, (len(logits), size, size), "bilinear")


def enlarged(x: Float[Array, "b h h f"], side: int) -> Float[Array, "b s s f"]:
    """Nearest-neighbour enlargement to `side` pixels; twice as many as `x` has, or one fewer, are
    pairs of the pixels of `x`, the last one cut off for an odd side."""
    b, h, _, f = x.shape
    if side == h:
        return x
    if side not in (2 * h, 2 * h - 1):
        return jax.image.resize(x, (b, side, side, f), "nearest")
    pairs = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, h, 2, f))
    return pairs.reshape(b, 2 * h, 2 * h, f)[:, :side, :side]
