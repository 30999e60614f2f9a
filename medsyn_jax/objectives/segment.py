"""Segmentation of one structure: focal loss and soft Dice, as in MGCA's code (2210.06044).

The loss needs four sums of each image, so that a batch and a whole split are judged alike.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

FOCAL_WEIGHT = 10.0
_GAMMA = 2


class Sums(NamedTuple):
    """Of each image, fp32; p is the probability and t the truth of a pixel, both in [0, 1]."""

    focal: Float[Array, " b"]  # mean over the pixels
    shared: Float[Array, " b"]  # sum of p t
    predicted: Float[Array, " b"]  # sum of p
    truth: Float[Array, " b"]  # sum of t


def sums(logits: Float[Array, "b h w"], truth: Float[Array, "b h w"]) -> Sums:
    """What `loss` needs of each image.

    truth: 0 to 1; resized masks have soft edges. The focal term of a pixel with logit x is
    sigmoid(-x (2 t - 1))^2 times its cross-entropy in nats (Lin et al., arXiv 1708.02002, for
    t = 0 or 1; optax's focal loss differs at soft edges).
    """
    x, t = logits.astype(jnp.float32), truth.astype(jnp.float32)
    entropy = optax.losses.sigmoid_binary_cross_entropy(x, t)
    focal = jax.nn.sigmoid(-x * (2 * t - 1)) ** _GAMMA * entropy
    p = jax.nn.sigmoid(x)
    pixels = (1, 2)
    return Sums(focal.mean(pixels), (p * t).sum(pixels), p.sum(pixels), t.sum(pixels))


def loss(of: Sums) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """10 focal - log((2 sum p t + 1) / (sum p + sum t + 1)) over all images together.

    The focal term has a gradient on a batch without any mask, where Dice alone would have next to
    none. Returns the loss and both terms.
    """
    focal = of.focal.mean()
    overlap = (2 * of.shared.sum() + 1) / (of.predicted.sum() + of.truth.sum() + 1)
    return FOCAL_WEIGHT * focal - jnp.log(overlap), {"focal": focal, "soft_dice": overlap}
