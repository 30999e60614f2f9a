"""Vision transformer (Dosovitskiy et al., 2021), as timm and Hugging Face's ViTModel compute it."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from medsyn_jax.models.kernels import matmul
from medsyn_jax.models.layers import (
    SMALL_NORMAL,
    Embedding,
    LayerNorm,
    TransformerLayer,
    add_bias,
    in_order,
    numbered,
    uniform,
)


class PatchFeatures(NamedTuple):
    """The features of n patches, row by row, those of [CLS], and the attention of [CLS].

    `cls_attention` is fp32: the last layer's softmax weights of the [CLS] query for the patches,
    without the weight for [CLS] itself, so that a row sums to less than 1.
    """

    patches: Float[Array, "b n w"]
    pooled: Float[Array, "b w"]
    cls_attention: Float[Array, "b heads n"]


class Patches(nnx.Module):
    """A linear layer over each square of `patch` x `patch` pixels.

    This convolution, whose stride is its size, is written as one matrix product, which is faster on
    CPU. It is initialized as `Linear`, but with a bias of zero.
    """

    def __init__(self, patch: int, channels: int, width: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(patch * patch * channels)
        self.dtype = dtype
        self.kernel = nnx.Param(uniform(bound)(rngs.params(), (patch, patch, channels, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n f"]:
        (b, h, w, c), (size, *_, width) = images.shape, self.kernel.shape
        x = images.astype(self.dtype).reshape(b, h // size, size, w // size, size, c)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, size * size * c)
        kernel = self.kernel[...].astype(self.dtype).reshape(-1, width)
        return add_bias(matmul(x, kernel), self.bias[...])


class ViT(nnx.Module):
    """A vision transformer without its classifier, for square images of `size` x `size` pixels.

    patch: the side of a patch in pixels; ViT-B/16 is ViT(224, 16, 768, 12, 12, 3072). channels: of
    the image. eps: of layer normalization, 1e-6 in timm, 1e-12 in Hugging Face's configs. `remat`
    recomputes each layer in the backward pass. Raises ValueError if the patches do not divide the
    image, or the heads the width.
    """

    def __init__(
        self,
        size: int,
        patch: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        channels: int = 3,
        *,
        eps: float = 1e-6,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if size % patch:
            raise ValueError(f"the side {size} is no multiple of the patches' {patch} pixels")
        self.size, self.features, self.remat, self.dtype = size, width, remat, dtype
        self.patches_across = size // patch
        self.patches = Patches(patch, channels, width, dtype=dtype, rngs=rngs)
        self.cls = nnx.Param(SMALL_NORMAL(rngs.params(), (width,)))
        self.position = Embedding(self.patches_across**2 + 1, width, rngs=rngs)
        self.layers = numbered(
            [
                TransformerLayer(width, heads, mlp_width, eps=eps, dtype=dtype, rngs=rngs)
                for _ in range(layers)
            ]
        )
        self.norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(self, images: Float[Array, "b h w c"], train: bool = False) -> PatchFeatures:
        """Features of normalized images. train: has no effect.

        Raises ValueError for images of another size, because positions are not
        interpolated.
        """
        del train
        (height, width), side = images.shape[1:3], self.size
        if (height, width) != (side, side):
            raise ValueError(f"this ViT is for {side} x {side} pixels, not {height} x {width}")
        run = TransformerLayer.pre_norm
        run = nnx.remat(run, static_argnums=2) if self.remat else run
        patches = self.patches(images)
        cls = jnp.broadcast_to(self.cls[...].astype(self.dtype), (len(images), 1, self.features))
        x = jnp.concatenate([cls, patches], 1) + self.position.table[None].astype(self.dtype)
        *layers, last = in_order(self.layers)
        for layer in layers:
            x = run(layer, x)
        weights = last.cls_attention(last.attention_norm(x))
        x = self.norm(run(last, x))
        return PatchFeatures(x[:, 1:], x[:, 0], weights[:, :, 1:])

    def pyramid(
        self, images: Float[Array, "b h w c"], train: bool = False
    ) -> tuple[Float[Array, "b p p f"]]:
        """One map: the features of the patches in their places; p = size / patch."""
        patches, side = self(images, train).patches, self.patches_across
        return (patches.reshape(len(patches), side, side, -1),)
