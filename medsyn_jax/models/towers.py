"""The two towers of a vision-language model: encoders with their projection heads.

`make` builds one from plain settings, so that pre-training and every downstream task agree on what
a config's fields mean without sharing a config object.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.models.bert import Bert
from medsyn_jax.models.heads import LinearHead, MlpHead, NormedHead
from medsyn_jax.models.layers import uniform
from medsyn_jax.models.resnet import ImageFeatures, ResNet
from medsyn_jax.models.vit import PatchFeatures, ViT

IMAGE_ENCODERS = ("resnet", "vit")
POOLINGS = ("cls", "mean", "max")
HEADS = ("normed", "mlp", "linear")


class Local(NamedTuple):
    """Regions and words in the shared space, not normalized.

    `words` holds at position 0 the [CLS], from 1 on the words of the report, then its [SEP] and
    zeros; `word_count` says how many the words are. `word_attention` (fp32) is the last layer's
    attention of [CLS] to these positions, `region_attention` to the regions of a ViT.
    """

    regions: Float[Array, "b r d"]
    words: Float[Array, "b t d"]
    word_count: Int[Array, " b"]
    word_attention: Float[Array, "b m t"]
    region_attention: Float[Array, "b n r"] | None


class Embeddings(NamedTuple):
    """Images and reports in the shared space, not normalized; `local` with local heads only."""

    image: Float[Array, "b d"]
    text: Float[Array, "b d"]
    local: Local | None = None
    prototypes: Float[Array, "k d"] | None = None


def image_encoder(settings: Mapping[str, Any], dtype: DTypeLike, rngs: nnx.Rngs) -> ResNet | ViT:
    """settings: kind; depths, width, block, channels, stem, remat of a `ResNet`, or size, patch,
    width, layers, heads, mlp_width, channels, eps, remat of a `ViT`."""
    of_both = ("width", "channels", "remat")
    of_vit = ("patch", "layers", "heads", "mlp_width", "eps")
    resnet = settings["kind"] == "resnet"
    known = (*of_both, *(("depths", "block", "stem") if resnet else of_vit))
    options = {name: settings[name] for name in known}
    if resnet:
        return ResNet(**options, dtype=dtype, rngs=rngs)
    return ViT(settings["size"], **options, dtype=dtype, rngs=rngs)


def text_encoder(
    settings: Mapping[str, Any], vocab_size: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Bert:
    """settings: width, layers, heads, mlp_width, max_length, types, pooler, dropout, eps, remat."""
    known = ("width", "layers", "heads", "mlp_width", "max_length", "types")
    options = {k: settings[k] for k in (*known, "pooler", "dropout", "eps", "remat")}
    return Bert(vocab_size, **options, dtype=dtype, rngs=rngs)


def head(
    settings: Mapping[str, Any],
    inputs: int,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    bias: bool = True,
) -> NormedHead | MlpHead | LinearHead:
    """settings: kind (one of HEADS), hidden, width (of the shared space). bias: of a linear one."""
    kind, width = settings["kind"], settings["width"]
    if kind == "linear":
        return LinearHead(inputs, width, bias=bias, dtype=dtype, rngs=rngs)
    maker = {"normed": NormedHead, "mlp": MlpHead}[kind]
    return maker(inputs, settings["hidden"], width, dtype=dtype, rngs=rngs)


def pool_tokens(
    states: Float[Array, "b t w"], mask: Bool[Array, "b t"], how: str
) -> Float[Array, "b w"]:
    """One vector a report: the [CLS] state, or the mean or maximum over its real tokens."""
    if how == "cls":
        return states[:, 0]
    real = mask[..., None]
    if how == "max":
        return jnp.where(real, states, jnp.finfo(states.dtype).min).max(1)
    weight = real.astype(states.dtype)
    return (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


def sum_words(x: Float[Array, "b t *w"], words: Int[Array, "b t"]) -> Float[Array, "b t *w"]:
    """What the pieces of each word have, summed, at the word's number. words: -1 for padding."""
    wider = jnp.where(words < 0, words.shape[1], words)  # a place that is cut off
    add = partial(jax.ops.segment_sum, num_segments=words.shape[1] + 1)
    return jax.vmap(add)(x, wider)[:, :-1]


class PairEncoder(nnx.Module):
    """An image tower and a text tower that end in one space of `heads["width"]` dimensions.

    image, text, heads: settings as above. text also has `pooling`, one of POOLINGS, of the sum of
    the last `summed` layers. heads: `text` is False where the text's own space is the shared one;
    `local` adds heads for regions (layer 3 of a ResNet, the patches of a ViT) and words;
    `prototypes` is the number of theirs, 0 for none.
    """

    def __init__(
        self,
        image: Mapping[str, Any],
        text: Mapping[str, Any],
        heads: Mapping[str, Any],
        vocab_size: int,
        *,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.pooling, self.summed, self.local = text["pooling"], text["summed"], heads["local"]
        self.image = image_encoder(image, dtype, rngs)
        self.text = text_encoder(text, vocab_size, dtype, rngs)
        self.image_head = head(heads, self.image.features, dtype, rngs)
        words = head(heads, self.text.features, dtype, rngs) if heads["text"] else None
        self.text_head = nnx.data(words)
        regions = words = prototypes = None
        if self.local:
            inputs = self.image.features // (2 if image["kind"] == "resnet" else 1)
            regions = head(heads, inputs, dtype, rngs, bias=False)
            words = head(heads, self.text.features, dtype, rngs) if heads["text"] else None
        if heads["prototypes"]:
            start = uniform(1.0)(rngs.params(), (heads["prototypes"], heads["width"]))
            prototypes = nnx.Param(start / jnp.sqrt(jnp.square(start).sum(-1, keepdims=True)))
        self.region_head, self.word_head = nnx.data(regions), nnx.data(words)
        self.prototypes = nnx.data(prototypes)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        words: Int[Array, "b t"] | None = None,
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> Embeddings:
        """words: of each token (`Tokenizer.encode_words`), for local heads. key: for dropout."""
        seen = self.image(images, train)
        image = self.image_head(seen.pooled, train)
        states = self.text(ids, mask, key)
        last = sum(states[-self.summed :][1:], states[-self.summed])
        text = pool_tokens(last, mask, self.pooling)
        text = text if self.text_head is None else self.text_head(text, train)
        prototypes = None if self.prototypes is None else self.prototypes[...]
        if self.region_head is None or words is None:
            return Embeddings(image, text, None, prototypes)
        regions, looks = _regions(seen)
        by_word = sum_words(last, words)
        attention = jnp.swapaxes(self.text.cls_attention(states, mask), 1, 2)
        local = Local(
            self.region_head(regions, train),
            by_word if self.word_head is None else self.word_head(by_word, train),
            words.max(1) - 1,
            jnp.swapaxes(sum_words(attention, words), 1, 2),
            looks,
        )
        return Embeddings(image, text, local, prototypes)


def _regions(
    seen: ImageFeatures | PatchFeatures,
) -> tuple[Float[Array, "b r f"], Float[Array, "b n r"] | None]:
    """The local features, row by row, and where [CLS] looks, of an encoder that has one."""
    if isinstance(seen, PatchFeatures):
        return seen.patches, seen.cls_attention
    b, _, _, f = seen.layer3.shape
    return seen.layer3.reshape(b, -1, f), None
