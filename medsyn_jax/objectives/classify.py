"""Classification losses over labels that may be unknown, and the policy for unknown labels."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Int8

UNCERTAIN, UNMENTIONED = -1, -2  # as the records store them; 1 positive, 0 negative


def apply_policy(
    labels: Int8[Array, "n l"], uncertain: Int8[Array, " l"], unmentioned: Int8[Array, " l"]
) -> Int8[Array, "n l"]:
    """Labels with every -1 replaced by `uncertain` and every -2 by `unmentioned`, label by label.

    Policy values: 1, 0, or -2 to leave the entry out. CheXpert's usual one (Irvin et al. 2019,
    U-Ones and U-Zeros) is uncertain -> 1 or 0 by label, and unmentioned -> 0.
    """
    mapped = jnp.where(labels == UNMENTIONED, unmentioned[None], labels)
    return jnp.where(labels == UNCERTAIN, uncertain[None], mapped)


def multilabel_loss(
    logits: Float[Array, "b l"], labels: Int8[Array, "b l"], weight: Float[Array, " b"]
) -> Float[Array, ""]:
    """Sigmoid cross-entropy in nats, mean over the known entries; 0 without any.

    labels: 1, 0, or negative = left out. weight: 0 leaves a record out (padding of the last batch).
    """
    known = (labels >= 0).astype(logits.dtype) * weight[:, None]
    target = jnp.maximum(labels, 0).astype(logits.dtype)
    losses = optax.losses.sigmoid_binary_cross_entropy(logits, target)
    return (losses * known).sum() / jnp.maximum(known.sum(), 1)


def multiclass_loss(
    logits: Float[Array, "b c"], classes: Int[Array, " b"], weight: Float[Array, " b"]
) -> Float[Array, ""]:
    """Softmax cross-entropy in nats, mean over the records of known class; 0 without any.

    classes: 0 ... c - 1, or negative = left out. weight: 0 leaves a record out.
    """
    known = (classes >= 0).astype(logits.dtype) * weight
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(classes, 0))
    return (losses * known).sum() / jnp.maximum(known.sum(), 1)


LOSSES = {"multilabel": multilabel_loss, "multiclass": multiclass_loss}


def mean_auroc(logits: Float[Array, "n l"], labels: Int[Array, "n l"]) -> Float[Array, ""]:
    """Mean AUROC over the labels that have both classes, ties counting one half.

    labels: 1, 0, or negative = left out. NaN if no label has both, or if a logit is not finite.
    The counterpart of `core.metrics.auroc` on the device, where a jitted fit picks its best epoch.
    """

    def one(scores: Array, label: Array) -> Array:
        negatives = jnp.sort(jnp.where(label == 0, scores, jnp.inf))
        first = jnp.searchsorted(negatives, scores, side="left")
        last = jnp.searchsorted(negatives, scores, side="right")
        positive = label == 1
        wins = jnp.where(positive, 0.5 * (first + last).astype(scores.dtype), 0).sum()
        pairs = positive.sum().astype(scores.dtype) * (label == 0).sum().astype(scores.dtype)
        return wins / pairs  # 0 / 0 = NaN without both classes

    value = jnp.nanmean(jax.vmap(one, in_axes=1)(logits, labels))
    return jnp.where(jnp.isfinite(logits).all(), value, jnp.nan)


def mean_accuracy(logits: Float[Array, "n c"], classes: Int[Array, " n"]) -> Float[Array, ""]:
    """Share of the records of known class (not negative) whose largest logit is that class.

    NaN if no class is known, or if a logit is not finite.
    """
    right = (jnp.argmax(logits, axis=-1) == classes.astype(jnp.int32)).sum().astype(logits.dtype)
    value = right / (classes >= 0).sum().astype(logits.dtype)
    return jnp.where(jnp.isfinite(logits).all(), value, jnp.nan)
