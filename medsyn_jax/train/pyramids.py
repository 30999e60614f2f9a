"""Feature maps of frozen encoders, computed once for all records of a split."""

from collections.abc import Callable
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import log
from medsyn_jax.data.loading import loader
from medsyn_jax.train import frozen
from medsyn_jax.train.frozen import Encoder


def pyramids(
    encoder: Encoder,
    source: loader.Readable,
    mesh: Mesh,
    *,
    batch_size: int,
    threads: int,
    memory_mib: int,
    name: str,
    coarsest: int = 0,
) -> tuple[np.ndarray, ...] | None:
    """The feature maps (`Encoder.pyramid`) of every record of a source, computed once and kept.

    Args:
        encoder: frozen, in evaluation mode.
        source: gives `image` uint8 [b, s, s] at the side that the encoder sees.
        mesh, batch_size, threads: as of `frozen.over`.
        memory_mib: the most that the maps may take; `pyramid_bytes` says what they need.
        name: of the records in messages, such as "train".
        coarsest: the number of maps to keep, such as 3 for C3 to C5; 0 for all.

    Returns:
        For each map, the finest first, bfloat16 [n, p, q, f] on the host of every process. None,
        with one line that says so, where the maps do not fit: the encoder must then run in every
        step.

    Raises:
        UserError: for a ViT of another side, or a batch that the devices do not divide.
    """
    needed = pyramid_bytes(encoder, source, coarsest) / 2**20
    if needed > memory_mib:
        log.say(
            f"features of {encoder.name}, {name}: the maps of {len(source)} images need "
            f"{needed:,.0f} MiB and may take {memory_mib:,} (config.data.memory_mib): the encoder "
            "runs in every step"
        )
        return None
    title = f"feature maps: {encoder.name}, {name}"
    method = _stored_pyramid(coarsest)
    return frozen.outputs(encoder, method, ("image",), source, mesh, batch_size, threads, title)


def pyramid_bytes(encoder: Encoder, source: loader.Readable, coarsest: int = 0) -> int:
    """What the maps of `pyramids` take, in bytes; computes none."""
    image = source.take(np.zeros(1, int))["image"]
    images = jax.ShapeDtypeStruct(image.shape, image.dtype)
    maps = jax.eval_shape(_stored_pyramid(coarsest), encoder, images)
    return len(source) * sum(x.size * x.dtype.itemsize for x in maps)


@lru_cache  # the same function each time, so that it is compiled once
def _stored_pyramid(coarsest: int) -> Callable[[Encoder, jax.Array], tuple[jax.Array, ...]]:
    """In bfloat16: untrained encoders go beyond float16's 65,504, some by far."""

    def maps(encoder: Encoder, images: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(x.astype(jnp.bfloat16) for x in encoder.pyramid(images)[-coarsest:])

    return maps
