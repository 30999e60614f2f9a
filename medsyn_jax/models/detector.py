"""YOLOv3's head (Redmon and Farhadi, arXiv 1804.02767) on a ResNet, as in MGCA's code."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.layers import BatchNorm, Conv, in_order, numbered

_ANCHORS = 3  # of each map
# torch's initialization of a convolution: uniform within 1 / sqrt(fan in)
_INIT = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class LeakyConv(nnx.Module):
    """A convolution of stride 1 without bias, batch normalization and LeakyReLU of slope 0.1."""

    def __init__(self, inputs: int, outputs: int, size: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv(inputs, outputs, size, init=_INIT, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs, dtype=dtype)

    def __call__(self, x: Float[Array, "b h w i"], train: bool) -> Float[Array, "b h w o"]:
        return jax.nn.leaky_relu(self.norm(self.conv(x), train), 0.1)


class Branch(nnx.Module):
    """Five convolutions, 1x1 and 3x3 in turns, whose output goes on to the next finer map, and two
    more to `outputs` channels."""

    def __init__(self, inputs: int, width: int, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        shapes = [(inputs, width, 1), *[(width, 2 * width, 3), (2 * width, width, 1)] * 2]
        shapes.append((width, 2 * width, 3))
        self.convs = numbered([LeakyConv(*shape, dtype=dtype, rngs=rngs) for shape in shapes])
        self.last = Conv(2 * width, outputs, 1, bias=True, init=_INIT, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b h w i"], train: bool
    ) -> tuple[Float[Array, "b h w o"], Float[Array, "b h w f"]]:
        """(logits, features for the next branch)."""
        *convs, wide = in_order(self.convs)
        for conv in convs:
            x = conv(x, train)
        return self.last(wide(x, train)), x


class Detector(nnx.Module):
    """Three branches on the maps of the last three stages of a ResNet.

    inputs: channels of these maps, from the fine one (stage 2) to the coarse one (stage 4).
    classes: number of kinds of objects. width: channels of the coarse branch, 512 as published; the
    finer ones have a half and a quarter. With ResNet-50, one class and width 512 it has 21,626,934
    parameters.
    """

    def __init__(
        self,
        inputs: Sequence[int],
        classes: int = 1,
        width: int = 512,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        outputs, branches, links, beside = _ANCHORS * (5 + classes), [], [], 0
        for scale, channels in enumerate(reversed(inputs)):
            own = width >> scale
            if scale:
                beside = own
                links.append(LeakyConv(2 * own, own, 1, dtype=dtype, rngs=rngs))
            branches.append(Branch(channels + beside, own, outputs, dtype=dtype, rngs=rngs))
        self.branches, self.links = numbered(branches), numbered(links)

    def __call__(
        self, maps: Sequence[Float[Array, "b _ _ _"]], train: bool
    ) -> list[Float[Array, "b _ _ o"]]:
        """Logits of each map, from the coarse to the fine one; `objectives.detect` reads them.

        maps: from fine to coarse, each with twice the rows and columns of the next.
        """
        outputs, branches, links = [], in_order(self.branches), in_order(self.links)
        *finer, x = maps
        for scale, branch in enumerate(branches):
            if scale:
                y = links[scale - 1](x, train)
                y = jnp.repeat(jnp.repeat(y, 2, 1), 2, 2)
                x = jnp.concatenate([y, finer[-scale].astype(y.dtype)], -1)
            output, x = branch(x, train)
            outputs.append(output)
        return outputs
