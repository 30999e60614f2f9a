"""The objectives of MGCA on global arrays, as in its authors' code (arXiv 2210.06044).

Pairs are aligned as a whole, word by word and patch by patch, and by their prototypes. Everything
is fp32. With sharded inputs the batch is that of all devices, also in the Sinkhorn iterations; the
authors' instance loss compares the pairs of one GPU.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from medsyn_jax.objectives.contrastive import EXACT, check_positive, contrastive_loss, normalize

_MASKED = -1e9  # 0 after a softmax, but a row that is masked throughout has finite gradients


def cls_weights(
    attention: Float[Array, "b heads n"], mask: Bool[Array, "b n"]
) -> Float[Array, "b n"]:
    """Weight of each position of a report or an image in `token_loss`; no gradient.

    attention: from [CLS] to the n other positions in the last layer, before dropout, in [0, 1];
    a word has the sum over its pieces. mask: False on padding.
    The weights are the mean over the heads, clipped to the 10 % and 90 % quantiles (linear) of the
    row's non-zero entries, as in the authors' code. Rows sum to 1, or to 0 without any attention.
    """
    mean = jax.lax.stop_gradient(attention).astype(jnp.float32).mean(1)
    counted = mask & (mean != 0)
    # Row by row under vmap: on a whole sharded array the look-up would gather all of it.
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

    Each word attends to the patches of its image, softmax(w_n . p / temperature). The context o_n
    that it gathers, of unit norm, must be closer to it than the contexts of the other words: the
    logits are w_n . o_m / temperature, the loss is the mean of the cross-entropies over m and over
    n. Patches attend to the real words likewise (the authors' code does not normalize the contexts
    of a ViT's patches; here all are normalized).
    words, patches: any scale (normalized here). word_mask: False on padding.
    word_weights, patch_weights: of the positions, summing to 1 a row (`cls_weights`, or 1 / p
    for a ResNet); padded words, and patches of a report without a real word, have weight 0.
    Losses are sums over positions, then means over b.
    mask_padding: False keeps padded words in the denominators, as the authors' code does.
    Raises ValueError if the temperature is not above 0.
    """
    check_positive(temperature=temperature)
    words, patches = jax.vmap(normalize)(words), jax.vmap(normalize)(patches)
    scores = jnp.einsum("bwd,bpd->bwp", words, patches, precision=EXACT) / temperature
    of_real = jnp.where(word_mask[:, :, None], scores, _MASKED)
    of_words = jnp.einsum("bwp,bpd->bwd", jax.nn.softmax(scores, 2), patches, precision=EXACT)
    of_patches = jnp.einsum("bwp,bwd->bpd", jax.nn.softmax(of_real, 1), words, precision=EXACT)

    compared = word_mask | (not mask_padding)
    word_weights = jnp.where(word_mask, word_weights, 0.0)
    patch_weights = jnp.where(word_mask.any(1, keepdims=True), patch_weights, 0.0)
    everywhere = jnp.ones(patches.shape[:2], bool)
    return (
        _alignment(words, of_words, compared, word_weights, temperature),
        _alignment(patches, of_patches, everywhere, patch_weights, temperature),
    )


def sinkhorn(
    scores: Float[Array, "b k"], *, epsilon: float = 0.05, iterations: int = 3
) -> Float[Array, "b k"]:
    """Soft codes of a whole batch over k prototypes that are used about equally; no gradient.

    Sinkhorn-Knopp on exp(scores / epsilon) (Caron et al., arXiv 2006.09882, section 3.1), in logs:
    no epsilon overflows. Rows sum to 1. Raises ValueError if epsilon is not above 0.
    """
    check_positive(epsilon=epsilon)
    logits = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    # The totals 1 / k of a prototype and 1 / b of a record cancel in the next softmax.
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
    """Cross-entropy in nats of each side's prototypes, predicted from the other side; mean of both.

    image, text: embeddings of the same b pairs, any scale (normalized here). prototypes: used as
    given: the caller keeps their rows at unit norm. Codes are constants from `sinkhorn`.
    Raises ValueError for fewer than 2 prototypes, or a temperature or epsilon not above 0.
    """
    check_positive(temperature=temperature)
    if prototypes.shape[0] < 2:
        raise ValueError(f"prototypes: {prototypes.shape[0]}: give 2 or more")
    of_image, of_text = (
        jnp.matmul(normalize(x), prototypes.astype(jnp.float32).T, precision=EXACT)
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

    temperature: of the instance loss (0.07 in the authors' code); the others are those of
    `token_loss` (0.1) and `prototype_loss` (0.2, epsilon 0.05, 3 iterations).
    Returns (loss, metrics): the metrics of `contrastive_loss`, and the word, patch and prototype
    losses in nats before weighting. Raises ValueError as the three losses do.
    """
    # The authors' command line sets the three weights to 1, their class to 1, 0.7 and 0.5.
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
    compared: Bool[Array, "b n"],
    weights: Float[Array, "b n"],
    temperature: float,
) -> Float[Array, ""]:
    """Weighted cross-entropies of x_n . o_m over m and over n, among the `compared` positions."""
    logits = jnp.einsum("bnd,bmd->bnm", x, jax.vmap(normalize)(gathered), precision=EXACT)
    logits = jnp.where(compared[:, :, None] & compared[:, None, :], logits / temperature, _MASKED)
    own = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
    each = optax.softmax_cross_entropy_with_integer_labels(logits, own)
    each += optax.softmax_cross_entropy_with_integer_labels(logits.mT, own)
    return (weights * each).sum() / (2 * x.shape[0])
