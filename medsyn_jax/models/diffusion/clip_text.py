"""CLIP's text encoder (Radford et al., 2021), as Hugging Face's CLIPTextModel computes it."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from medsyn_jax.models.layers import Embedding, LayerNorm, TransformerLayer, in_order, numbered


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
        self.remat, self.dtype = remat, dtype
        self.word = Embedding(vocab_size, width, rngs=rngs)
        self.position = Embedding(max_length, width, rngs=rngs)
        self.layers = numbered(
            [
                TransformerLayer(width, heads, mlp_width, eps=eps, act=act, dtype=dtype, rngs=rngs)
                for _ in range(layers)
            ]
        )
        self.norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t w"]:
        """The last hidden state, normalized, to which Stable Diffusion's U-Net attends.

        ids: t <= max_length word pieces with the start and end marks, padded. Padding needs no
        mask, because attention is causal and the U-Net was trained with the padding's states.
        """
        run = TransformerLayer.pre_norm
        run = nnx.remat(run, static_argnums=2) if self.remat else run
        positions = self.position.table[: ids.shape[1]]
        x = (self.word.table[...][ids] + positions[None]).astype(self.dtype)
        for layer in in_order(self.layers):
            x = run(layer, x, True)
        return self.norm(x)
