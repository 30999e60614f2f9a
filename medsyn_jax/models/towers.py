"""The two towers of a vision-language model: encoders with their projection heads.

The builders take plain mappings of settings, so that pre-training and every downstream task build
the same model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.core.errors import UserError
from medsyn_jax.models.bert import Bert
from medsyn_jax.models.heads import Head
from medsyn_jax.models.layers import uniform
from medsyn_jax.models.resnet import ImageFeatures, ResNet
from medsyn_jax.models.vit import PatchFeatures, ViT

_ENCODERS = {
    "resnet": (ResNet, ("depths", "width", "block", "channels", "stem", "remat")),
    "vit": (
        ViT,
        ("size", "patch", "width", "layers", "heads", "mlp_width", "channels", "eps", "remat"),
    ),
}
IMAGE_ENCODERS = tuple(_ENCODERS)
POOLINGS = ("cls", "mean", "max")


class Local(NamedTuple):
    """Regions and words in the shared space, not normalized.

    `words` holds [CLS] at position 0 (zeros where a head maps the words, as MGCA's head does not
    see it), then the `word_count` words of the report, its [SEP] and padding. `word_attention`
    (fp32) is the last layer's attention of [CLS] to these positions, `region_attention` that to the
    regions of a ViT.
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
    """The encoder of `settings["kind"]`, one of IMAGE_ENCODERS.

    settings: depths, width, block, channels, stem, remat of a `ResNet`; size, patch, width, layers,
    heads, mlp_width, channels, eps, remat of a `ViT`. Other settings are ignored. Raises UserError
    for a missing setting.
    """
    kind = settings["kind"]
    cls, names = _ENCODERS[kind]
    for name in names:
        if name not in settings:
            raise UserError(f"image encoder: {name} is missing: kind={kind} needs it")
    return cls(**{name: settings[name] for name in names}, dtype=dtype, rngs=rngs)


def text_encoder(
    settings: Mapping[str, Any], vocab_size: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Bert:
    """settings: width, layers, heads, mlp_width, max_length, types, dropout, eps, remat."""
    names = ("width", "layers", "heads", "mlp_width", "max_length", "types")
    options = {name: settings[name] for name in (*names, "dropout", "eps", "remat")}
    return Bert(vocab_size, **options, dtype=dtype, rngs=rngs)


def pool_tokens(
    states: Float[Array, "b t w"], mask: Bool[Array, "b t"], how: str
) -> Float[Array, "b w"]:
    """One vector a report: the [CLS] state, or the mean or maximum over its tokens without padding.

    how: one of POOLINGS. Raises ValueError for another.
    """
    if how not in POOLINGS:
        raise ValueError(f"pooling {how!r}: choose from {', '.join(POOLINGS)}")
    if how == "cls":
        return states[:, 0]
    real = mask[..., None]
    if how == "max":
        return jnp.where(real, states, jnp.finfo(states.dtype).min).max(1)
    weight = real.astype(states.dtype)
    return (states * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


def sum_words(x: Float[Array, "b t *w"], words: Int[Array, "b t"]) -> Float[Array, "b t *w"]:
    """The sum over each word's tokens, at the word's number.

    words: the number of each token's word, -1 for padding.
    """
    numbers = jnp.where(words < 0, words.shape[1], words)  # the last place is cut off
    add = partial(jax.ops.segment_sum, num_segments=words.shape[1] + 1)
    return jax.vmap(add)(x, numbers)[:, :-1]


class PairEncoder(nnx.Module):
    """An image tower and a text tower that end in one space of `heads["width"]` dimensions.

    image, text: settings as above; text also has `pooling`, one of POOLINGS, of the sum of the last
    `summed` layers. heads: `kind`, `hidden` and `width` of each `Head`; `text` is False where the
    text encoder's space is the shared one; `local` adds heads for regions (layer 3 of a ResNet, the
    patches of a ViT) and words; `prototypes` is their number, 0 for none. Raises ValueError for
    settings that do not go together.
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
        if not 1 <= text["summed"] <= text["layers"]:
            raise ValueError(f"the last {text['summed']} of {text['layers']} layers to sum")

        def head(inputs: int, bias: bool = True) -> Head:
            kind, width, hidden = heads["kind"], heads["width"], heads.get("hidden", 0)
            return Head(kind, inputs, width, hidden, bias=bias, dtype=dtype, rngs=rngs)

        self.pooling, self.summed, self.local = text["pooling"], text["summed"], heads["local"]
        self.image = image_encoder(image, dtype, rngs)
        self.text = text_encoder(text, vocab_size, dtype, rngs)
        self.image_head = head(self.image.features)
        self.text_head = nnx.data(head(self.text.features) if heads["text"] else None)
        regions = words = prototypes = None
        if self.local:
            inputs = self.image.features // (2 if image["kind"] == "resnet" else 1)
            regions = head(inputs, bias=heads["kind"] != "linear")
            words = head(self.text.features) if heads["text"] else None
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
        """words: the word of each token (`Tokenizer.encode_words`), for local heads. key: for
        dropout."""
        features = self.image(images, train)
        image = self.image_head(features.pooled, train)
        states = self.text(ids, mask, key)
        last = sum(states[-self.summed :][1:], states[-self.summed])
        text = pool_tokens(last, mask, self.pooling)
        text = text if self.text_head is None else self.text_head(text, train)
        prototypes = None if self.prototypes is None else self.prototypes[...]
        if self.region_head is None or words is None:
            return Embeddings(image, text, None, prototypes)
        regions, region_attention = _regions(features)
        by_word = sum_words(last, words)
        attention = jnp.swapaxes(self.text.cls_attention(states, mask), 1, 2)
        if self.word_head is not None:  # [CLS] must not enter its batch normalisation
            by_word = jnp.pad(self.word_head(by_word[:, 1:], train), ((0, 0), (1, 0), (0, 0)))
        local = Local(
            self.region_head(regions, train),
            by_word,
            words.max(1) - 1,
            jnp.swapaxes(sum_words(attention, words), 1, 2),
            region_attention,
        )
        return Embeddings(image, text, local, prototypes)


def _regions(
    features: ImageFeatures | PatchFeatures,
) -> tuple[Float[Array, "b r f"], Float[Array, "b n r"] | None]:
    """The local features, row by row, and the attention of [CLS] to the regions of a ViT."""
    if isinstance(features, PatchFeatures):
        return features.patches, features.cls_attention
    b, _, _, f = features.layer3.shape
    return features.layer3.reshape(b, -1, f), None
