"""BERT encoder (Devlin et al., 2019), as Hugging Face's BertModel computes it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.models.kernels import gelu
from medsyn_jax.models.layers import (
    LayerNorm,
    Linear,
    attend,
    attention_weights,
    dropout,
    in_order,
    numbered,
)

_init = jax.nn.initializers.normal(0.02)


class Embedding(nnx.Module):
    """A table [count, width]."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(_init(rngs.params(), (count, width)))


class Embeddings(nnx.Module):
    """Sum of word, position and type-0 embeddings, normalized."""

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


class Layer(nnx.Module):
    """Self-attention and MLP, each with dropout, residual and layer normalization after it."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        rate: float,
        eps: float,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        def linear(inputs, outputs):
            return Linear(inputs, outputs, init=_init, dtype=dtype, rngs=rngs)

        self.heads, self.rate = heads, rate
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out = linear(width, width)
        self.attention_norm = LayerNorm(width, eps=eps, dtype=dtype)
        self.up = linear(width, mlp_width)
        self.down = linear(mlp_width, width)
        self.mlp_norm = LayerNorm(width, eps=eps, dtype=dtype)

    def __call__(
        self, x: Float[Array, "b t w"], mask: Bool[Array, "b t"], key: Key[Array, ""] | None
    ) -> Float[Array, "b t w"]:
        rngs = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        query, keys, value = (self._heads(f(x)) for f in (self.query, self.key, self.value))
        y = attend(query, keys, value, mask, self.rate, rngs[0]).reshape(x.shape)
        x = self.attention_norm(x + dropout(self.out(y), self.rate, rngs[1]))
        y = self.down(gelu(self.up(x)))
        return self.mlp_norm(x + dropout(y, self.rate, rngs[2]))

    def cls_attention(
        self, x: Float[Array, "b t w"], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b n t"]:
        """The softmax weights of the [CLS] query in each head, fp32, without dropout."""
        query, key = self._heads(self.query(x[:, :1])), self._heads(self.key(x))
        return attention_weights(query, key, mask)[:, :, 0]

    def _heads(self, x: Float[Array, "b t w"]) -> Float[Array, "b t n d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class Bert(nnx.Module):
    """BERT encoder; `pooler` adds the tanh layer over [CLS] that some checkpoints have.

    `dropout` is the rate on embeddings, attention weights and both residual branches, and is active
    only in a call with a key. `remat` recomputes each layer in the backward pass.
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
        pooler: bool = False,
        dropout: float = 0.1,
        eps: float = 1e-12,
        remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"the width {width} is no multiple of the {heads} heads")
        self.rate, self.remat, self.features = dropout, remat, width
        self.embeddings = Embeddings(vocab_size, width, max_length, types, eps, dtype, rngs)
        self.layers = numbered(
            [Layer(width, heads, mlp_width, dropout, eps, dtype, rngs) for _ in range(layers)]
        )
        dense = Linear(width, width, init=_init, dtype=dtype, rngs=rngs) if pooler else None
        self.pooler = nnx.data(dense)

    def __call__(
        self,
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        key: Key[Array, ""] | None = None,
    ) -> list[Float[Array, "b t w"]]:
        """Hidden states: the embeddings, then each layer's output. `mask` is True on tokens."""
        run = nnx.remat(_run) if self.remat else _run
        count = len(self.layers) + 1
        rngs = [None] * count if key is None else list(jax.random.split(key, count))
        states = [dropout(self.embeddings(ids), self.rate, rngs[0])]
        for layer, rng in zip(in_order(self.layers), rngs[1:], strict=True):
            states.append(run(layer, states[-1], mask, rng))
        return states

    def pool(self, states: list[Float[Array, "b t w"]]) -> Float[Array, "b w"]:
        """tanh of a linear layer over the last state of [CLS]; only for a model with a pooler."""
        if self.pooler is None:
            raise ValueError("this BERT was made without a pooler")
        return jnp.tanh(self.pooler(states[-1][:, 0]))

    def cls_attention(
        self, states: list[Float[Array, "b t w"]], mask: Bool[Array, "b t"]
    ) -> Float[Array, "b n t"]:
        """The last layer's attention of [CLS] to each position, by head, fp32; 0 to padding.

        states, mask: what a call returned for this mask. Without dropout of the weights.
        """
        return in_order(self.layers)[-1].cls_attention(states[-2], mask)


def _run(
    layer: Layer,
    x: Float[Array, "b t w"],
    mask: Bool[Array, "b t"],
    key: Key[Array, ""] | None,
) -> Float[Array, "b t w"]:
    return layer(x, mask, key)
