"""The objectives of MGCA on global arrays, as in its authors' code (arXiv 2210.06044).

Pairs are aligned as a whole, word by word and patch by patch, and by the prototype they fall to.
All in fp32. With sharded inputs the batch is that of all devices, in the Sinkhorn iterations too;
the authors' instance loss compares the pairs of one GPU.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from medsyn_jax.objectives.contrastive import contrastive_loss, normalize

# An accelerator left to itself would multiply in bf16 or TF32: an error of 1e-3 / temperature.
_EXACT = jax.lax.Precision.HIGHEST
# Nothing of it is left after a softmax, yet a row of nothing else has finite gradients.
_MASKED = -1e9


def cls_weights(
    attention: Float[Array, "b heads n"], mask: Bool[Array, "b n"]
) -> Float[Array, "b n"]:
    """How much each position of a report or an image counts in `token_loss`; no gradient.

    attention: from [CLS] to the n other positions in the last layer, before dropout, in [0, 1];
    that of a word is the sum over its pieces. mask: False on padding.
    Mean over the heads, clipped to the 10 % and 90 % quantiles (linear) of the row's non-zero
    entries, as in the authors' code. Rows sum to 1, or to 0 where nothing is attended to.
    """
    mean = jax.lax.stop_gradient(attention).astype(jnp.float32).mean(1)
    counted = mask & (mean != 0)
    # Row by row under vmap: over the whole array the look-up would gather it from all devices.
    low, high = jax.vmap(lambda row: jnp.nanquantile(row, jnp.array([0.1, 0.9])), out_axes=1)(
        jnp.where(counted, mean, jnp.nan)
    )
    kept = jnp.where(counted, jnp.clip(mean, low[:, None], high[:, None]), 0.0)
    total = kept.sum(-1, keepdims=True)
    return kept / jnp.where(total == 0, 1.0, total)


def token_loss(
    words: Float[Array, "b w d"],
    patches: Float[Array, "b p d"],
    word_mask: Bool[Array, "b w"],
    word_weights: Float[Array, "b w"],
    patch_weights: Float[Array, "b p"],
    *,
    temperature: float = 0.1,
    mask_padding: bool = True,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(word loss, patch loss) in nats; their sum is the token-wise alignment.

    Each word attends to the patches of its image, softmax(w_n . p / temperature), and what it
    gathers, o_n of unit norm, is to be told from the other words' by w_n . o_m / temperature:
    cross-entropies over m and over n, averaged. Patches attend to the real words likewise (the
    authors' code does not normalize what the patches of a ViT gather; here they are all alike).
    words, patches: any scale (normalized here). word_mask: False on padding.
    word_weights, patch_weights: of the positions, summing to 1 a row (`cls_weights`, or 1 / p
    for a ResNet); padded words, and patches of a report without a real word, count nothing.
    Losses are sums over positions, then means over b.
    mask_padding: False keeps padded words in the denominators, as the authors' code does.
    Raises ValueError if the temperature is not above 0.
    """
    _check_positive("temperature", temperature)
    words, patches = jax.vmap(normalize)(words), jax.vmap(normalize)(patches)
    scores = jnp.einsum("bwd,bpd->bwp", words, patches, precision=_EXACT) / temperature
    seen = jnp.where(word_mask[:, :, None], scores, _MASKED)
    of_words = jnp.einsum("bwp,bpd->bwd", jax.nn.softmax(scores, 2), patches, precision=_EXACT)
    of_patches = jnp.einsum("bwp,bwd->bpd", jax.nn.softmax(seen, 1), words, precision=_EXACT)

    told = word_mask | (not mask_padding)
    word_weights = jnp.where(word_mask, word_weights, 0.0)
    patch_weights = jnp.where(word_mask.any(1, keepdims=True), patch_weights, 0.0)
    everywhere = jnp.ones(patches.shape[:2], bool)
    return (
        _alignment(words, of_words, told, word_weights, temperature),
        _alignment(patches, of_patches, everywhere, patch_weights, temperature),
    )


def sinkhorn(
    scores: Float[Array, "b k"], *, epsilon: float = 0.05, iterations: int = 3
) -> Float[Array, "b k"]:
    """Soft codes of a whole batch over k prototypes that are used about equally; no gradient.

    Sinkhorn-Knopp on exp(scores / epsilon) (Caron et al., arXiv 2006.09882, section 3.1), in logs,
    so that no epsilon overflows. Rows sum to 1. Raises ValueError if epsilon is not above 0.
    """
    _check_positive("epsilon", epsilon)
    logits = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    # Totals of 1 / k a prototype and 1 / b a record: either constant cancels in the next softmax.
    for _ in range(iterations):
        logits = jax.nn.log_softmax(jax.nn.log_softmax(logits, 0), 1)
    return jax.nn.softmax(logits, 1)


def prototype_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    prototypes: Float[Array, "k d"],
    *,
    temperature: float = 0.2,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Float[Array, ""]:
    """Either side's prototype predicted from the other side, in nats, mean of both.

    image, text: embeddings of the same b pairs, any scale (normalized here). prototypes: used as
    given; rows of unit norm are the caller's to keep. Codes are constants from `sinkhorn`.
    Raises ValueError for fewer than 2 prototypes, or a temperature or epsilon not above 0.
    """
    _check_positive("temperature", temperature)
    if prototypes.shape[0] < 2:
        raise ValueError(f"prototypes: {prototypes.shape[0]}, but there must be 2 or more")
    of_image, of_text = (
        jnp.matmul(normalize(x), prototypes.astype(jnp.float32).T, precision=_EXACT)
        for x in (image, text)
    )

    def predicted(scores: Array, other: Array) -> Array:
        codes = sinkhorn(other, epsilon=epsilon, iterations=iterations)
        return optax.softmax_cross_entropy(scores / temperature, codes).mean()

    return (predicted(of_text, of_image) + predicted(of_image, of_text)) / 2


def mgca_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    words: Float[Array, "b w e"],
    patches: Float[Array, "b p e"],
    word_mask: Bool[Array, "b w"],
    word_weights: Float[Array, "b w"],
    patch_weights: Float[Array, "b p"],
    prototypes: Float[Array, "k d"],
    *,
    temperature: float,
    token_temperature: float,
    prototype_temperature: float,
    epsilon: float,
    iterations: int,
    mask_padding: bool,
    instance_weight: float = 1.0,
    token_weight: float = 1.0,
    prototype_weight: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the instance, token and prototype losses; arrays as in those.

    temperature: of the instance loss (.07 in the authors' code); the others are those of
    `token_loss` (.1) and `prototype_loss` (.2, epsilon .05, 3 iterations).
    Returns (loss, metrics): the metrics of `contrastive_loss`, and the word, patch and prototype
    losses in nats before weighting. Raises ValueError as they do.
    """
    # The authors' command line sets the three weights to 1; their class alone to 1, .7 and .5.
    _check_positive("temperature", temperature)
    instance, metrics = contrastive_loss(image, text, temperature=temperature)
    word, patch = token_loss(
        words,
        patches,
        word_mask,
        word_weights,
        patch_weights,
        temperature=token_temperature,
        mask_padding=mask_padding,
    )
    prototype = prototype_loss(
        image,
        text,
        prototypes,
        temperature=prototype_temperature,
        epsilon=epsilon,
        iterations=iterations,
    )
    loss = instance_weight * instance + token_weight * (word + patch) + prototype_weight * prototype
    return loss, metrics | {"word": word, "patch": patch, "prototype": prototype}


def _alignment(
    x: Float[Array, "b n d"],
    gathered: Float[Array, "b n d"],
    told: Bool[Array, "b n"],
    weights: Float[Array, "b n"],
    temperature: float,
) -> Float[Array, ""]:
    """Weighted cross-entropies of x_n . o_m over m and over n, among the positions `told` apart."""
    logits = jnp.einsum("bnd,bmd->bnm", x, jax.vmap(normalize)(gathered), precision=_EXACT)
    logits = jnp.where(told[:, :, None] & told[:, None, :], logits / temperature, _MASKED)
    own = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    each += optax.softmax_cross_entropy_with_integer_labels(logits.mT, own)
    return (weights * each).sum() / (2 * x.shape[0])


def _check_positive(name: str, value: float) -> None:
    if not value > 0:  # NaN as well
        raise ValueError(f"{name}: {value}, but it must be above 0")
