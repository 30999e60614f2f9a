"""The two towers of a vision-language model: encoders with their projection heads.

`make` builds one from plain settings, so that pre-training and every downstream task agree on what
a config's fields mean without sharing a config object.
"""

from collections.abc import Mapping
from typing import Any, get_args

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from medsyn_jax.core.config import check_choice, check_numbers
from medsyn_jax.core.errors import UserError
from medsyn_jax.models.bert import Bert
from medsyn_jax.models.heads import LinearHead, MlpHead, NormedHead
from medsyn_jax.models.resnet import Block, ResNet, Stem

POOLINGS = ("cls", "mean", "max")
HEADS = ("normed", "mlp", "linear")


def check(image: Mapping[str, Any], text: Mapping[str, Any], heads: Mapping[str, Any]) -> None:
    """UserError if `PairEncoder` cannot be built from these settings."""
    config = {"image": image, "text": text, "heads": heads}
    sizes = ("image.width", "text.width", "text.heads", "text.max_length", "heads.width")
    check_numbers(config, above_0=sizes)
    check_choice("image.block", image["block"], get_args(Block))
    check_choice("image.stem", image["stem"], get_args(Stem))
    check_choice("text.pooling", text["pooling"], POOLINGS)
    check_choice("heads.kind", heads["kind"], HEADS)
    if len(image["depths"]) != 4 or min(image["depths"]) < 1:
        raise UserError(
            f"config.image.depths: {image['depths']}: give the number of blocks of each of the "
            "four stages, such as (3, 4, 6, 3)"
        )
    if text["width"] % text["heads"]:
        raise UserError(
            f"config.text.heads: {text['heads']} do not divide config.text.width {text['width']}: "
            "change one of the two"
        )


def image_encoder(settings: Mapping[str, Any], dtype: DTypeLike, rngs: nnx.Rngs) -> ResNet:
    """settings: depths, width, block, channels, stem, remat (see `ResNet`)."""
    known = ("depths", "width", "block", "channels", "stem", "remat")
    return ResNet(**{k: settings[k] for k in known}, dtype=dtype, rngs=rngs)


def text_encoder(
    settings: Mapping[str, Any], vocab_size: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> Bert:
    """settings: width, layers, heads, mlp_width, max_length, types, pooler, dropout, eps, remat."""
    known = ("width", "layers", "heads", "mlp_width", "max_length", "types")
    options = {k: settings[k] for k in (*known, "pooler", "dropout", "eps", "remat")}
    return Bert(vocab_size, **options, dtype=dtype, rngs=rngs)


def head(
    settings: Mapping[str, Any], inputs: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> NormedHead | MlpHead | LinearHead:
    """settings: kind (one of HEADS), hidden, width (of the shared space)."""
    kind, width = settings["kind"], settings["width"]
    if kind == "linear":
        return LinearHead(inputs, width, dtype=dtype, rngs=rngs)
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


class PairEncoder(nnx.Module):
    """An image tower and a text tower that end in one space of `heads["width"]` dimensions.

    image, text, heads: settings as above; text also has `pooling`, one of POOLINGS. Raises
    UserError for settings that do not go together (`check`).
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
        check(image, text, heads)
        self.pooling = text["pooling"]
        self.image = image_encoder(image, dtype, rngs)
        self.text = text_encoder(text, vocab_size, dtype, rngs)
        self.image_head = head(heads, self.image.features, dtype, rngs)
        self.text_head = head(heads, self.text.features, dtype, rngs)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        *,
        train: bool,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """Embeddings of the images and of the reports, not normalised. key: for dropout."""
        v = self.image_head(self.image(images, train).pooled, train)
        states = self.text(ids, mask, key)[-1]
        return v, self.text_head(pool_tokens(states, mask, self.pooling), train)
