"""The layers that the networks share. Parameters are float32; a layer computes in its `dtype`.

The statistics of normalization and softmax are always float32.

Normalization is not flax's: `nnx.LayerNorm` and `nnx.GroupNorm` fail under strict dtype promotion
in bfloat16, and the latter takes 1.5 times as long on CPU. Nor is the embedding, because
`nnx.Embed` would rename the table in checkpoints.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key

from medsyn_jax.models.attention import attention
from medsyn_jax.models.kernels import along_last, convolve, gelu, matmul, normalize, rescale

Tree = dict[str, Any]


def quick_gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """x sigmoid(1.702 x): the approximation that OpenAI's CLIP was trained with."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}
SMALL_NORMAL = jax.nn.initializers.normal(0.02)


def split(model: nnx.Module) -> tuple[Any, Tree, Tree]:
    """The model's structure, and its parameters and statistics as plain dicts.

    Inside a jitted function `nnx.merge(structure, params, stats, copy=True)` is the module again.
    """
    structure, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return structure, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)


def statistics(model: nnx.Module) -> Tree:
    """The statistics of a model after a call with `train=True`, as `split` returns them."""
    return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))


def numbered(modules: list) -> Mapping[str, Any]:
    """Submodules under the names "0", "1", ...: text keys survive every checkpoint format."""
    return nnx.Dict({str(index): module for index, module in enumerate(modules)})


def in_order(modules: Mapping[str, Any]) -> list:
    """The submodules of `numbered` by number; a merged module iterates by name: 0, 1, 10, 2."""
    return [modules[str(index)] for index in range(len(modules))]


class Linear(nnx.Module):
    """y = x W + b, with `kernel` [inputs, outputs]; initialized as torch.nn.Linear by default."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = True,
        init: Callable | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        bound = 1 / math.sqrt(inputs)
        self.dtype = dtype
        self.kernel = nnx.Param((init or uniform(bound))(rngs.params(), (inputs, outputs)))
        start = jnp.zeros(outputs) if init else uniform(bound)(rngs.params(), (outputs,))
        self.bias = nnx.data(nnx.Param(start) if bias else None)

    def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
        y = matmul(x.astype(self.dtype), self.kernel[...].astype(self.dtype))
        return y if self.bias is None else add_bias(y, self.bias[...])


class Embedding(nnx.Module):
    """A `table` [count, width], normally distributed with deviation 0.02."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(SMALL_NORMAL(rngs.params(), (count, width)))


def uniform(bound: float) -> Callable:
    """Initializer: uniform over [-bound, bound)."""
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def add_bias(x: Float[Array, "*n f"], bias: Float[Array, " f"]) -> Float[Array, "*n f"]:
    """x + bias over the last axis, in the dtype of x."""
    return x + along_last(bias.astype(x.dtype), x.ndim)


class Conv(nnx.Module):
    """A square convolution with `kernel` [k, k, inputs, outputs], and `bias` if that is True.

    edges: the numbers of zeros before and after each row and column; by default (k - 1) // 2 on
    every side as in torch, whatever the stride. The kernel is initialized as torchvision's ResNet
    by default: normal, variance 2 / (k k outputs). The bias starts at zero.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        stride: int = 1,
        *,
        bias: bool = False,
        edges: tuple[int, int] | None = None,
        init: Callable | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        init = init or jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        self.stride, self.edges, self.dtype = stride, edges, dtype
        self.kernel = nnx.Param(init(rngs.params(), (size, size, inputs, outputs)))
        self.bias = nnx.data(nnx.Param(jnp.zeros(outputs)) if bias else None)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        if self.edges is None:
            y = convolve(x, kernel, self.stride)
        else:
            strides, edges = (self.stride,) * 2, (self.edges,) * 2
            axes = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x, kernel, strides, edges, dimension_numbers=axes)
        return y if self.bias is None else add_bias(y, self.bias[...])


class BatchNorm(nnx.Module):
    """Batch normalization over all axes but the last, as torch.nn.BatchNorm1d and 2d.

    With `train=True` it normalizes by the batch and moves the running statistics by a tenth towards
    the batch's (the variance towards the unbiased one, as torch). Under `jax.jit` over a sharded
    batch the batch is the global one, as in torch's SyncBatchNorm.
    """

    def __init__(
        self,
        features: int,
        *,
        affine: bool = True,
        momentum: float = 0.9,
        eps: float = 1e-5,
        dtype: DTypeLike = jnp.float32,
    ):
        self.momentum, self.eps, self.dtype = momentum, eps, dtype
        self.scale = nnx.data(nnx.Param(jnp.ones(features)) if affine else None)
        self.bias = nnx.data(nnx.Param(jnp.zeros(features)) if affine else None)
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))

    def __call__(
        self,
        x: Float[Array, "*n f"],
        train: bool,
        *,
        shortcut: Float[Array, "*n f"] | None = None,
        relu: bool = False,
    ) -> Float[Array, "*n f"]:
        """The normalized x, plus `shortcut`, rectified if `relu`."""
        x, size = x.astype(self.dtype), x.shape[-1:]
        scale = jnp.ones(size) if self.scale is None else self.scale[...]
        bias = jnp.zeros(size) if self.bias is None else self.bias[...]
        if not train:
            factor = jax.lax.rsqrt(self.var[...] + self.eps) * scale
            return rescale(x, factor, bias - self.mean[...] * factor, shortcut, relu)
        outputs = normalize(x, scale, bias, shortcut, self.eps, relu)
        y, mean, var = outputs  # pyright: ignore[reportGeneralTypeIssues] (partial hides the type)
        count = x.size // x.shape[-1]
        keep, move = self.momentum, 1 - self.momentum
        unbiased = jax.lax.stop_gradient(var) * (count / max(count - 1, 1))
        self.mean[...] = keep * self.mean[...] + move * jax.lax.stop_gradient(mean)
        self.var[...] = keep * self.var[...] + move * unbiased
        return y


class LayerNorm(nnx.Module):
    """Layer normalization over the last axis."""

    def __init__(self, features: int, *, eps: float = 1e-12, dtype: DTypeLike = jnp.float32):
        self.eps, self.dtype = eps, dtype
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "*n f"]) -> Float[Array, "*n f"]:
        wide = x.astype(jnp.float32)
        centered = wide - wide.mean(-1, keepdims=True)
        var = jnp.square(centered).mean(-1, keepdims=True)
        y = centered * jax.lax.rsqrt(var + self.eps) * along_last(self.scale[...], x.ndim)
        return (y + along_last(self.bias[...], x.ndim)).astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalization (Wu and He, 2018) of NHWC images or [b, n, f] arrays.

    Raises ValueError if the features do not divide into the groups.
    """

    def __init__(
        self, features: int, groups: int, *, eps: float = 1e-5, dtype: DTypeLike = jnp.float32
    ):
        if features % groups:
            raise ValueError(f"{features} features do not divide into {groups} groups")
        self.groups, self.eps, self.dtype = groups, eps, dtype
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))

    def __call__(self, x: Float[Array, "b *n f"]) -> Float[Array, "b *n f"]:
        # Sums go over positions first, then over a group's channels, because channels are last.
        wide = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
        centered = wide - self._per_group(wide)
        factor = jax.lax.rsqrt(self._per_group(jnp.square(centered)) + self.eps)
        y = centered * (factor * along_last(self.scale[...], 3)) + along_last(self.bias[...], 3)
        return y.astype(self.dtype).reshape(x.shape)

    def _per_group(self, x: Float[Array, "b n f"]) -> Float[Array, "b 1 f"]:
        """The mean over positions and a group's channels, repeated for each of its channels."""
        b, _, f = x.shape
        mean = x.mean(1).reshape(b, self.groups, -1).mean(-1, keepdims=True)
        return jnp.broadcast_to(mean, (b, self.groups, f // self.groups)).reshape(b, 1, f)


def dropout(x: Float[Array, "*n"], rate: float, key: Key[Array, ""] | None) -> Float[Array, "*n"]:
    """x with a share `rate` of its elements zeroed and the rest scaled up; x itself without a key.

    The rate is rounded to 16 bits, so that every random word decides for two elements, because the
    random bits are the cost of dropout on CPU.
    """
    if key is None or rate == 0.0:
        return x
    *lead, last = x.shape
    words = jax.random.bits(key, (*lead, (last + 1) // 2), jnp.uint32)
    bound = round(rate * 2**16)
    halves = [words >> 16, words & 0xFFFF]
    keep = jnp.concatenate([half >= bound for half in halves], -1)[..., :last]
    return jnp.where(keep, x * (2**16 / (2**16 - bound)), 0)


def attention_weights(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    mask: Bool[Array, "b s"] | None = None,
) -> Float[Array, "b n t s"]:
    """The softmax weights of each query over the positions s where `mask` is True, fp32."""
    logits = jnp.einsum("btnd,bsnd->bnts", query, key, preferred_element_type=jnp.float32)
    logits = logits / math.sqrt(query.shape[-1])
    if mask is not None:
        logits = jnp.where(mask[:, None, None, :], logits, -1e30)
    return jax.nn.softmax(logits, axis=-1)


class TransformerLayer(nnx.Module):
    """Self-attention and an MLP, each with a residual and a layer normalization.

    `pre_norm` normalizes the inputs of attention and MLP (ViT, CLIP), `post_norm` the sums with the
    residual (BERT). act: the activation of the MLP, a name of ACTIVATIONS. Raises ValueError for
    another name, or if the heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        eps: float,
        act: str = "gelu",
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        if width % heads:
            raise ValueError(f"the width {width} is no multiple of the {heads} heads")
        if act not in ACTIVATIONS:
            raise ValueError(f"act {act!r}: choose from {', '.join(ACTIVATIONS)}")

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, init=SMALL_NORMAL, dtype=dtype, rngs=rngs)

        self.heads, self.act = heads, act
        self.attention_norm = LayerNorm(width, eps=eps, dtype=dtype)
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out = linear(width, width)
        self.mlp_norm = LayerNorm(width, eps=eps, dtype=dtype)
        self.up = linear(width, mlp_width)
        self.down = linear(mlp_width, width)

    def pre_norm(self, x: Float[Array, "b t w"], causal: bool = False) -> Float[Array, "b t w"]:
        """causal: each position attends to itself and to earlier positions only."""
        y = self.attention_norm(x)
        query, key, value = (self._heads(f(y)) for f in (self.query, self.key, self.value))
        x = x + self.out(attention(query, key, value, causal).reshape(x.shape))
        return x + self._mlp(self.mlp_norm(x))

    def post_norm(
        self,
        x: Float[Array, "b t w"],
        mask: Bool[Array, "b t"],
        rate: float = 0.0,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "b t w"]:
        """mask: True on tokens. rate: of the dropout of attention weights and both branches."""
        rngs = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        query, keys, value = (self._heads(f(x)) for f in (self.query, self.key, self.value))
        weights = attention_weights(query, keys, mask).astype(value.dtype)
        y = jnp.einsum("bnts,bsnd->btnd", dropout(weights, rate, rngs[0]), value)
        x = self.attention_norm(x + dropout(self.out(y.reshape(x.shape)), rate, rngs[1]))
        return self.mlp_norm(x + dropout(self._mlp(x), rate, rngs[2]))

    def cls_attention(
        self, x: Float[Array, "b t w"], mask: Bool[Array, "b t"] | None = None
    ) -> Float[Array, "b n t"]:
        """The softmax weights of the [CLS] query in each head, fp32, without dropout.

        x: what the attention reads, for a layer with pre-norm after its `attention_norm`.
        """
        query, key = self._heads(self.query(x[:, :1])), self._heads(self.key(x))
        return attention_weights(query, key, mask)[:, :, 0]

    def _heads(self, x: Float[Array, "b t w"]) -> Float[Array, "b t n d"]:
        return x.reshape(*x.shape[:2], self.heads, -1)

    def _mlp(self, x: Float[Array, "b t w"]) -> Float[Array, "b t w"]:
        return self.down(ACTIVATIONS[self.act](self.up(x)))
