"""BERT encoder (Devlin et al., 2019), as Hugging Face's BertModel without its pooler."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.models.layers import (
    Embedding,
    LayerNorm,
    TransformerLayer,
    dropout,
    in_order,
    numbered,
)


class Embeddings(nnx.Module):
    """The sum of word, position and type-0 embeddings, normalized."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        max_length: int,
        types: int,
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.word = Embedding(vocab_size, width, rngs=rngs)
        self.position = Embedding(max_length, width, rngs=rngs)
        self.type = Embedding(types, width, rngs=rngs)
        self.norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(self, ids: Int[Array, "b t"]) -> Float[Array, "b t w"]:
        fixed = self.position.table[: ids.shape[1]] + self.type.table[:1]
        return self.norm(self.word.table[...][ids] + fixed[None])


class Bert(nnx.Module):
    """BERT encoder.

    `dropout` is the rate on embeddings, attention weights and both residual branches, and is active
    only in a call with a key. `remat` recomputes each layer in the backward pass. Raises ValueError
    if the heads do not divide the width.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        max_length: int,
        types: int = 2,
        *,
        dropout: float = 0.1,
        eps: float = 1e-12,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.rate, self.remat, self.features = dropout, remat, width
        self.embeddings = Embeddings(vocab_size, width, max_length, types, eps, dtype, rngs)
        self.layers = numbered(
            [
                TransformerLayer(width, heads, mlp_width, eps=eps, dtype=dtype, rngs=rngs)
                for _ in range(layers)
            ]
        )

    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "b t w"]]:
        """Hidden states: the embeddings, then each layer's output. `mask` is True on tokens."""
        run = TransformerLayer.post_norm
        run = nnx.remat(run, static_argnums=3) if self.remat else run
        count = len(self.layers) + 1
        rngs = [None] * count if key is None else list(jax.random.split(key, count))
        states = [dropout(self.embeddings(ids), self.rate, rngs[0])]
        for layer, rng in zip(in_order(self.layers), rngs[1:], strict=True):
            states.append(run(layer, states[-1], mask, self.rate, rng))
        return states

    def cls_attention(
        self, states: list[Float[Array, "b t w"]], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b n t"]:
        """The last layer's attention of [CLS] to each position, by head, fp32; 0 to padding.

        states: the result of a call with this mask. The dropout of the weights is left out.
        """
        return in_order(self.layers)[-1].cls_attention(states[-2], mask)
