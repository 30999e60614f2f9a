"""Training of latent diffusion models: noised latents, their targets, and weights.

x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e (Ho et al., arXiv 2006.11239, eq. 4) with a_t the cumulative
product of the schedule; the network predicts e ("epsilon") or sqrt(a_t) e - sqrt(1 - a_t) x_0
("v_prediction", arXiv 2202.00512). Everything is fp32.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

Prediction = Literal["epsilon", "v_prediction"]


def add_noise(
    x0: Float[Array, "b h w c"], noise: Float[Array, "b h w c"], alpha: Float[Array, " b"]
) -> Float[Array, "b h w c"]:
    """x_t. alpha: the schedule's cumulative product at each record's time, in [0, 1]."""
    keep, add = _factors(alpha)
    return keep * x0 + add * noise


def target(
    x0: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    alpha: Float[Array, " b"],
    prediction: Prediction,
) -> Float[Array, "b h w c"]:
    """The output of the network that is right for x_t."""
    keep, add = _factors(alpha)
    return noise if prediction == "epsilon" else keep * noise - add * x0


def snr_weight(
    alpha: Float[Array, " b"], gamma: float, prediction: Prediction
) -> Float[Array, " b"]:
    """min-SNR-gamma weights of the squared error (Hang et al., arXiv 2303.09556, eq. 8).

    gamma: 5 in the paper; 0 for no weighting. SNR = a / (1 - a); the weight on the error of x_0,
    min(SNR, gamma), is min(SNR, gamma) / SNR on that of e and min(SNR, gamma) / (SNR + 1) on v's.
    """
    if not gamma:
        return jnp.ones_like(alpha)
    # In terms of alpha, so that neither end of the schedule divides by zero.
    clipped = jnp.minimum(1.0, gamma * (1 - alpha) / jnp.maximum(alpha, 1e-12))
    return clipped if prediction == "epsilon" else clipped * alpha


def denoising_error(
    output: Float[Array, "b h w c"], wanted: Float[Array, "b h w c"]
) -> Float[Array, " b"]:
    """Mean squared error of each record; weighted and averaged, it is the loss."""
    return jnp.square(output.astype(jnp.float32) - wanted).mean((1, 2, 3))


def autoencoder_loss(
    images: Float[Array, "b h w c"],
    reconstruction: Float[Array, "b h w c"],
    mean: Float[Array, "b p q z"],
    logvar: Float[Array, "b p q z"],
    kl_weight: float,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Absolute error plus `kl_weight` times the KL divergence from N(0, 1), each a mean an element.

    (Rombach et al., arXiv 2112.10752, section 3.1, without the perceptual and adversarial terms.)
    """
    error = jnp.abs(reconstruction.astype(jnp.float32) - images).mean()
    mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
    kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean()
    return error + kl_weight * kl, {"l1": error, "kl": kl}


def _factors(alpha: Float[Array, " b"]) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    alpha = alpha[:, None, None, None]
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)
