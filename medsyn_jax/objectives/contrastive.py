"""The image-text contrastive objective of ConVIRT, on global arrays.

ConVIRT (arXiv 2010.00747, eqs. 2 to 4) weighs the two directions 0.75 and 0.25 at temperature 0.1;
MGCA's re-implementation adds them (1 and 1) at temperature 0.07. Both are arguments here.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

# By default an accelerator multiplies in bf16 or TF32: an error of 1e-3 / temperature.
EXACT = jax.lax.Precision.HIGHEST


def normalize(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    """Rows of unit L2 norm in fp32; a zero row stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jnp.reciprocal(jnp.sqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12)))


def contrastive_loss(
    image: Float[Array, "b d"],
    text: Float[Array, "b d"],
    *,
    temperature: float,
    image_to_text: float = 1.0,
    text_to_image: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Weighted sum of the two cross-entropies against the diagonal of cos / temperature.

    image, text: embeddings of the same b pairs, any scale (normalised here, in fp32).
    Returns (loss, metrics): both directions in nats and the share of images whose own report
    scores highest within the batch. Raises ValueError if the temperature is not above 0.
    """
    check_positive(temperature=temperature)
    logits = jnp.matmul(normalize(image), normalize(text).T, precision=EXACT) / temperature
    metrics = directions(logits)
    hits = (logits.argmax(-1) == jnp.arange(len(logits))).astype(jnp.float32).mean()
    loss = image_to_text * metrics["image_to_text"] + text_to_image * metrics["text_to_image"]
    return loss, metrics | {"batch_recall@1": hits}


def directions(logits: Float[Array, "b b"]) -> dict[str, Float[Array, ""]]:
    """Mean cross-entropy in nats against the diagonal, of the rows (images) and of the columns."""
    own = jnp.arange(len(logits))
    to_text = optax.softmax_cross_entropy_with_integer_labels(logits, own).mean()
    to_image = optax.softmax_cross_entropy_with_integer_labels(logits.T, own).mean()
    return {"image_to_text": to_text, "text_to_image": to_image}


def check_positive(**values: float) -> None:
    """Raise ValueError for a value that is not above 0, NaN included."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}: {value}: give a number above 0")
