"""CLIP's text encoder (Radford et al., 2021), as Hugging Face's CLIPTextModel computes it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from medsyn_jax.models.bert import Embedding
from medsyn_jax.models.kernels import gelu
from medsyn_jax.models.layers import LayerNorm, PreNormLayer, in_order, numbered

_init = jax.nn.initializers.normal(0.02)


def quick_gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


class ClipText(nnx.Module):
    """CLIP's text encoder; `act` is "quick_gelu" (OpenAI, SD 1.x) or "gelu" (OpenCLIP, SD 2.x).

    `remat` recomputes each layer in the backward pass. Raises ValueError for an unknown `act` or a
    width that the heads do not divide.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        max_length: int,
        act: str,
        *,
        eps: float = 1e-5,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"the width {width} is no multiple of the {heads} heads")
        if act not in ACTIVATIONS:
            raise ValueError(f"act {act!r}: choose from {', '.join(ACTIVATIONS)}")
        self.remat, self.dtype = remat, dtype
        self.word = Embedding(vocab_size, width, rngs=rngs)
        self.position = Embedding(max_length, width, rngs=rngs)
        self.layers = numbered(
            [
                PreNormLayer(width, heads, mlp_width, ACTIVATIONS[act], eps, True, dtype, rngs)
                for _ in range(layers)
            ]
        )
        self.norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t w"]:
        """The last hidden state, normalized: what Stable Diffusion's U-Net attends to.

        ids: t <= max_length word pieces with the start and end marks, padded; padding needs no
        mask, since attention is causal and the U-Net was trained to see what stands there.
        """
        run = nnx.remat(_run) if self.remat else _run
        places = self.position.table[: ids.shape[1]]
        x = (self.word.table[...][ids] + places[None]).astype(self.dtype)
        for layer in in_order(self.layers):
            x = run(layer, x)
        return self.norm(x)


def _run(layer: PreNormLayer, x: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
    return layer(x)
