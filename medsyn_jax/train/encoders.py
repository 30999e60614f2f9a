"""Frozen image encoders for downstream tasks: pre-trained, from a weights file, or untrained."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from medsyn_jax.core import log, tree
from medsyn_jax.data.images import transforms
from medsyn_jax.models import encoder_configs, towers
from medsyn_jax.models.layers import split
from medsyn_jax.models.weights import convert
from medsyn_jax.train import checkpoint
from medsyn_jax.train import state as states


@dataclass(frozen=True)
class Encoder:
    """An image encoder with the preparation of images that it expects."""

    name: str
    structure: Any
    params: Any
    stats: Any
    size: int  # side of the stored images in pixels
    crop: int  # side of their middle that the encoder sees
    pixels: Mapping[str, Any]  # mean, std, channels of `transforms.normalize`

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the features of an image: weights, structure and preparation."""
        digest = hashlib.sha256(repr((self.structure, self.size, self.crop)).encode())
        digest.update(repr(sorted(self.pixels.items())).encode())
        for name, leaf in sorted((tree.named(self.params) | tree.named(self.stats)).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
        return digest.hexdigest()

    def features(self, params: Any, stats: Any, images: UInt8[Array, "b h w"]) -> Any:
        """`ImageFeatures` of stored images in evaluation mode; to be jitted by the caller.

        params, stats: this encoder's own, as arguments so that they are no constants of the jit.
        """
        model = nnx.merge(self.structure, params, stats, copy=True)
        seen = transforms.center_crop(images, self.crop)
        return model(transforms.normalize(seen, **self.pixels), train=False)

    def pooled(self, params: Any, stats: Any, images: UInt8[Array, "b h w"]) -> Float[Array, "b f"]:
        """The features that a linear probe sees, fp32."""
        return self.features(params, stats, images).pooled.astype(jnp.float32)


def pretrained(workdir: Path) -> Encoder:
    """The image encoder of the best checkpoint of a pre-training run.

    Raises UserError if the folder is not the workdir of a run that has saved one.
    """
    config = checkpoint.read_config(workdir)
    make = _maker(config)
    structure, params, stats, _ = checkpoint.restore_part(workdir, make, "image")
    return _encoder("pretrained", workdir, config, structure, params, stats)


def untrained(workdir: Path, seed: int) -> Encoder:
    """The same architecture at its random initialization: what pre-training has to beat."""
    config = checkpoint.read_config(workdir)
    make = _maker(config)
    with checkpoint.rebuilding(workdir):
        structure, *_ = states.shapes(make)
    params, stats = jax.jit(lambda key: split(make(nnx.Rngs(key)))[1:])(jax.random.key(seed))
    return _encoder("random", workdir, config, structure, params, stats)


def imported(workdir: Path, path: str, layout: str, mean: float, std: float) -> Encoder:
    """The same architecture with the weights of a file, say of ImageNet.

    mean, std: of the grey value in [0, 1], as that file's network expects. Raises UserError if the
    file does not fit the architecture, or its folder says otherwise (`encoder_configs.agreed`).
    """
    config, pixels = dict(checkpoint.read_config(workdir)), {"mean": mean, "std": std}
    flags = {"part": "config.image", "pixels": "config.encoder"}
    settings = config["image"] | pixels
    config["image"] = encoder_configs.agreed(path, settings, **flags, report=log.say)
    with checkpoint.rebuilding(workdir):
        structure, params, stats = states.shapes(_maker(config))
    params, stats = convert.load(path, layout, params, stats, report=log.say)
    return _encoder("imagenet", workdir, config, structure, params, stats, **pixels)


def _maker(config: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: towers.image_encoder(config["image"], jnp.dtype(config["dtype"]), rngs)


def _encoder(
    name: str,
    workdir: Path,
    config: Mapping[str, Any],
    structure: Any,
    params: Any,
    stats: Any,
    **pixels: float,
) -> Encoder:
    with checkpoint.rebuilding(workdir):
        size, crop = config["data"]["size"], config["augment"]["size"]
        pixels = {k: config["image"][k] for k in transforms.PIXELS} | pixels
    return Encoder(name, structure, params, stats, size, crop, pixels)
