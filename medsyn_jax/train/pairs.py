"""The pre-trained pair of encoders of a pre-training run, frozen: which image fits which report."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from medsyn_jax.core import mesh as meshes
from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode, transforms
from medsyn_jax.data.loading import loader
from medsyn_jax.data.text import tokenizers
from medsyn_jax.models import resnet, towers
from medsyn_jax.objectives.contrastive import normalize
from medsyn_jax.train import checkpoint
from medsyn_jax.train import state as states


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "stats"],
    meta_fields=["structure", "tokenizer", "tokens", "sections", "size", "crop", "pixels"],
)
@dataclass(frozen=True)
class Pair:
    """Both towers with their heads, and the preparation of images and texts that they expect.

    A pytree of its weights, so that `jax.jit(Pair.embed)(pair, images, ids, mask)` takes them as
    arguments; `jax.jit(pair.embed)` would compile them in as constants.
    """

    params: Any
    stats: Any
    structure: Any
    tokenizer: tokenizers.Tokenizer
    tokens: int  # of a text
    sections: tuple[str, ...]  # of a report that make up its text
    size: int  # side of the stored images in pixels
    crop: int  # side of their middle that the encoder sees
    pixels: tuple[tuple[str, Any], ...]  # mean, std, channels of `transforms.normalize`

    def fit(self, image: np.ndarray) -> np.ndarray:
        """A radiograph, uint8 [h, w], as the run's data would hold it: [size, size]."""
        return image if image.shape == (self.size,) * 2 else decode.square(image, self.size)

    def embed(
        self, images: UInt8[Array, "b h w"], ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """(image, text) embeddings of unit norm, fp32, in evaluation mode; to be jitted.

        images: of `size`; ids, mask: from `tokenizer.encode(texts, tokens)`. The alignment score of
        a pair is the product of its two.
        """
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        seen = transforms.normalize(transforms.center_crop(images, self.crop), **dict(self.pixels))
        e = model(seen, ids, mask, train=False)
        return normalize(e.image), normalize(e.text)

    def heat(
        self, images: UInt8[Array, "b h w"], texts: tuple[Array, Array, Array]
    ) -> Float[Array, "b s s"]:
        """How well each of s x s places of the `crop` that the encoder sees fits a phrase, fp32:
        of a pair with local heads the mean over the words of their cosine with the regions; of
        another with a ResNet, Grad-CAM (arXiv 1610.02391, equations 1 and 2) of the alignment score
        at layer 3.

        texts: from `tokenizer.encode_words(phrases, tokens)`. Raises UserError for a pair with a
        ViT and without local heads. To be jitted, as `embed`.
        """
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        seen = transforms.normalize(transforms.center_crop(images, self.crop), **dict(self.pixels))
        e = model(seen, *texts, train=False)
        return _grad_cam(model, seen, e.text) if e.local is None else _by_words(e.local)


def _by_words(local: towers.Local) -> Float[Array, "b s s"]:
    places = jnp.arange(local.words.shape[1])[None]
    real = (places > 0) & (places <= local.word_count[:, None])
    cosines = jnp.einsum(
        "brd,bwd->brw", jax.vmap(normalize)(local.regions), jax.vmap(normalize)(local.words)
    )
    count = jnp.maximum(real.sum(-1), 1).astype(jnp.float32)
    fits = jnp.where(real[:, None], cosines, 0.0).sum(-1) / count[:, None]
    side = round(fits.shape[1] ** 0.5)
    return fits.reshape(-1, side, side)


def _grad_cam(model: Any, seen: Array, text: Array) -> Float[Array, "b s s"]:
    if not isinstance(model.image, resnet.ResNet):
        raise UserError(
            "heat maps: the encoder was pre-trained without regions, and its ViT has no layer 3: "
            "use GLoRIA's or MGCA's"
        )
    layer3 = model.image(seen, False).layer3

    def score(layer3: Array) -> Array:
        image = model.image_head(model.image.after_layer3(layer3), False)
        return (normalize(image) * normalize(text)).sum()

    weights = jax.grad(score)(layer3).mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * layer3).sum(-1)).astype(jnp.float32)


def pretrained(workdir: Path) -> Pair:
    """The pair of the best checkpoint of a pre-training run, on one device.

    Raises UserError if the folder is not the workdir of a run that has saved one.
    """
    config = checkpoint.read_config(workdir)
    with checkpoint.rebuilding(workdir):
        data, crop = config["data"], config["augment"]["size"]
        folder = Path(data["tokenizer"] or workdir / "tokenizer")
        tokens, sections = data["tokens"], tuple(data["sections"])
        size, pixels = data["size"], tuple((k, config["image"][k]) for k in transforms.PIXELS)
    tokenizer = tokenizers.load(folder)

    def make(rngs: nnx.Rngs) -> nnx.Module:
        image, text, heads = (config[part] for part in ("image", "text", "heads"))
        vocab, dtype = tokenizer.vocab_size, jnp.dtype(config["dtype"])
        return towers.PairEncoder(image, text, heads, vocab, dtype=dtype, rngs=rngs)

    with checkpoint.rebuilding(workdir):
        structure, *like = states.shapes(make)
    checkpoints, step = checkpoint.opened(workdir)
    try:
        saved = checkpoints.restore_all(step, ("params", "stats"))
    finally:
        checkpoints.close()
    try:
        params, stats = (tree.unnamed(flat, x) for flat, x in zip(saved, like, strict=True))
    except KeyError as e:
        raise UserError(f"{workdir}: its encoders do not fit its config: {e}") from None
    return Pair(params, stats, structure, tokenizer, tokens, sections, size, crop, pixels)


def embed_all(
    pair: Pair, source: loader.Source, mesh: Mesh, batch_size: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(image, text) embeddings [n, d] of all records of `source`, on every process.

    batch_size: pairs a step over all devices. Raises UserError if they do not divide it.
    """
    local = meshes.per_process(batch_size, mesh)
    everywhere, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    embed = jax.jit(
        Pair.embed, in_shardings=(everywhere, rows, rows, rows), out_shardings=everywhere
    )
    weights = jax.device_get((pair.params, pair.stats))
    params, stats = jax.device_put(weights, everywhere)
    pair = replace(pair, params=params, stats=stats)
    this, count = jax.process_index(), jax.process_count()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    waiting = None
    for batch in loader.eval_loader(source, local, this, count, threads):
        on_devices = meshes.to_devices(mesh, {k: batch[k] for k in ("image", "ids", "mask")})
        done, waiting = waiting, embed(pair, *on_devices.values())
        if done is not None:  # fetched while the devices work on the next
            found.append(jax.device_get(done))
    found.append(jax.device_get(waiting))
    image, text = (np.concatenate(x)[: len(source)] for x in zip(*found, strict=True))
    return image, text


_SCORED = 32  # pairs at a time
_embed = jax.jit(Pair.embed)


def scores(pair: Pair, pixels: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Alignment scores [n] of images, uint8 [h, w] each, with their texts.

    In batches of one shape on one device, so that a score does not depend on what else is scored.
    """
    ids, mask = pair.tokenizer.encode(texts, pair.tokens)
    fits = [pair.fit(x) for x in pixels]
    found = []
    for start in range(0, len(fits), _SCORED):
        rows = np.arange(start, min(start + _SCORED, len(fits)))
        full = np.resize(rows, _SCORED)
        v, t = _embed(pair, np.stack([fits[i] for i in full]), ids[full], mask[full])
        found.append(np.einsum("nd,nd->n", *jax.device_get((v, t)))[: len(rows)])
    return np.concatenate(found)
