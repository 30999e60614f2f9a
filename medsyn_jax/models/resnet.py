"""Residual networks, torchvision's variant (stride in the 3 x 3 convolution of a bottleneck).

He et al., "Deep Residual Learning for Image Recognition" (2015); ResNet-50 v1.5.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.kernels import max_pool
from medsyn_jax.models.layers import BatchNorm, Conv, in_order, numbered

Block = Literal["basic", "bottleneck"]
Stem = Literal["7x7", "3x3"]
EXPANSION = {"basic": 1, "bottleneck": 4}


class ImageFeatures(NamedTuple):
    """The feature maps of layers 3 and 4, and the mean of the latter over its pixels."""

    layer3: Float[Array, "b h3 w3 f3"]
    layer4: Float[Array, "b h4 w4 f4"]
    pooled: Float[Array, "b f4"]


class ConvNorm(nnx.Module):
    """A convolution and its batch normalization, with an optional shortcut and ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        *,
        init: Callable | None = None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(inputs, outputs, size, stride, init=init, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, dtype=dtype)

    def __call__(
        self,
        x: Float[Array, "b h w i"],
        train: bool,
        *,
        shortcut: Float[Array, "b p q o"] | None = None,
        relu: bool = True,
    ) -> Float[Array, "b p q o"]:
        return self.norm(self.conv(x), train, shortcut=shortcut, relu=relu)


class ResidualBlock(nnx.Module):
    """Basic: 3x3, 3x3. Bottleneck: 1x1, 3x3, 1x1 to four times the width. Shortcut where needed."""

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        block: Block,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        outputs = width * EXPANSION[block]
        if block == "basic":
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        else:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = numbered([ConvNorm(*shape, dtype=dtype, rngs=rngs) for shape in shapes])
        fits = stride == 1 and inputs == outputs
        shortcut = None if fits else ConvNorm(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
        self.shortcut = nnx.data(shortcut)

    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> Float[Array, "b p q o"]:
        shortcut = x if self.shortcut is None else self.shortcut(x, train, relu=False)
        *convs, last = in_order(self.convs)
        for conv in convs:
            x = conv(x, train)
        return last(x, train, shortcut=shortcut)


class ResNet(nnx.Module):
    """A residual network without its classifier: ResNet((3, 4, 6, 3)) is ResNet-50.

    depths: the number of blocks of each of the four stages. width: of the first stage before
    expansion; each next stage doubles it. channels: of the image. stem: "7x7" (stride 2, then a
    stride-2 max-pool, as published) or "3x3" (stride 2, no pool, for images under 128 pixels).
    `remat` recomputes each block in the backward pass. Raises ValueError unless there are four
    depths.
    """

    def __init__(
        self,
        depths: Sequence[int],
        width: int = 64,
        block: Block = "bottleneck",
        channels: int = 3,
        stem: Stem = "7x7",
        *,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if len(depths) != 4:
            raise ValueError(f"a ResNet has four stages, not {len(depths)}")
        size = int(stem[0])
        self.pool, self.remat, self.dtype = stem == "7x7", remat, dtype
        self.stem = ConvNorm(channels, width, size, 2, dtype=dtype, rngs=rngs)
        self.features = 8 * width * EXPANSION[block]
        inputs, stages = width, []
        for stage, depth in enumerate(depths):
            blocks = []
            for index in range(depth):
                stride = 2 if stage and not index else 1
                inner = width << stage
                blocks.append(ResidualBlock(inputs, inner, stride, block, dtype=dtype, rngs=rngs))
                inputs = inner * EXPANSION[block]
            stages.append(numbered(blocks))
        self.stages = numbered(stages)

    def __call__(self, images: Float[Array, "b h w c"], train: bool) -> ImageFeatures:
        """Features of normalized images; only with `train` do the statistics move."""
        *_, layer3, layer4 = self.pyramid(images, train)
        return ImageFeatures(layer3, layer4, self._pooled(layer4))

    def pyramid(
        self, images: Float[Array, "b h w c"], train: bool
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """C1, the stem's output before any max-pool, and C2 to C5, the outputs of layers 1 to 4.

        Strides are 2, 4, 8, 16 and 32 with the stem "7x7", and 2, 2, 4, 8 and 16 with "3x3"; sides
        that a stride does not divide are rounded up. ResNet-50 at 224 pixels: 112 x 112 x 64,
        56 x 56 x 256, 28 x 28 x 512, 14 x 14 x 1024 and 7 x 7 x 2048.
        """
        maps = [self.stem(images.astype(self.dtype), train)]
        x = max_pool(maps[0]) if self.pool else maps[0]
        for stage in range(4):
            x = self._stages(x, stage, stage + 1, train)
            maps.append(x)
        return tuple(maps)

    def after_layer3(self, layer3: Float[Array, "b h w f"]) -> Float[Array, "b g"]:
        """The pooled features of a map of layer 3, in evaluation mode."""
        return self._pooled(self._stages(layer3, 3, 4, False))

    def _stages(self, x: Array, start: int, stop: int, train: bool) -> Array:
        run = ResidualBlock.__call__
        run = nnx.remat(run, static_argnums=2) if self.remat else run
        for stage in in_order(self.stages)[start:stop]:
            for block in in_order(stage):
                x = run(block, x, train)
        return x

    def _pooled(self, layer4: Array) -> Array:
        return layer4.astype(jnp.float32).mean((1, 2)).astype(self.dtype)
