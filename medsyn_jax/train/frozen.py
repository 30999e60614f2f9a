"""Frozen models: the encoders of a pre-training run, and their outputs for records.

`outputs` maps a method of a frozen model over the records of a source; `over` maps any function of
a batch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8
from rich.progress import track

from medsyn_jax.core import log, tree
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode, transforms
from medsyn_jax.data.loading import loader
from medsyn_jax.data.text import tokenizers
from medsyn_jax.models import encoder_configs, resnet, towers, vit
from medsyn_jax.models.weights import convert
from medsyn_jax.objectives.contrastive import normalize
from medsyn_jax.train import checkpoint
from medsyn_jax.train import state as states

Pixels = tuple[tuple[str, Any], ...]  # arguments of `transforms.normalize`
_BATCH = 32  # records a step on one device


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "stats"],
    meta_fields=["name", "settings", "structure", "size", "crop", "pixels"],
)
@dataclass(frozen=True)
class Encoder:
    """An image encoder with its preparation of images.

    It is a pytree, so that `jax.jit(Encoder.pooled)(encoder, images)` takes the weights as
    arguments; `jax.jit(encoder.pooled)` would compile them in as constants.
    """

    params: Any
    stats: Any
    name: str
    settings: str  # JSON of the architecture
    structure: Any
    size: int  # side of the stored images in pixels
    crop: int  # side of the central part that the encoder sees
    pixels: Pixels

    @cached_property
    def fingerprint(self) -> str:
        """Hash of weights, architecture and preparation, which decide the features of an image."""
        preparation = (self.settings, self.size, self.crop, sorted(self.pixels))
        digest = hashlib.sha256(repr(preparation).encode())
        for name, leaf in sorted((tree.named(self.params) | tree.named(self.stats)).items()):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(jax.device_get(leaf)).tobytes())
        return digest.hexdigest()

    def features(self, images: UInt8[Array, "b h w"]) -> Any:
        """`ImageFeatures` or `PatchFeatures` of stored images in evaluation mode."""
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        return model(_prepared(self, images), train=False)

    def pooled(self, images: UInt8[Array, "b h w"]) -> Float[Array, "b f"]:
        """The features that a linear probe sees, fp32."""
        return self.features(images).pooled.astype(jnp.float32)

    def pyramid(self, images: UInt8[Array, "b h w"]) -> tuple[Float[Array, "b _ _ _"], ...]:
        """The feature maps of whole images in evaluation mode, the finest first, channels last.

        Of a ResNet C1 to C5 (`ResNet.pyramid`), of a ViT the grid of its patches alone. Images are
        neither cropped nor enlarged, so that a pixel of a mask or box keeps its place: h = w is the
        side that the encoder sees. Raises UserError for a ViT of another side.
        """
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        if isinstance(model, vit.ViT) and model.size != images.shape[1]:
            raise UserError(
                f"config.data.size: {images.shape[1]}: the encoder is a ViT for {model.size} "
                f"pixels: give --config.data.size={model.size}"
            )
        pixels = dict(self.pixels) | {"upsample": 0}
        return model.pyramid(transforms.normalize(images, **pixels), train=False)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "stats"],
    meta_fields=["structure", "tokenizer", "tokens", "sections", "size", "crop", "pixels"],
)
@dataclass(frozen=True)
class Pair:
    """Image and text encoder with their heads and preparation; a pytree, as `Encoder`."""

    params: Any
    stats: Any
    structure: Any
    tokenizer: tokenizers.Tokenizer
    tokens: int  # length of a text
    sections: tuple[str, ...]  # of a report, whose text is read
    size: int  # side of the stored images in pixels
    crop: int  # side of the central part that the encoder sees
    pixels: Pixels

    def fit(self, image: np.ndarray) -> np.ndarray:
        """A radiograph, uint8 [h, w], as the run's data hold it: [size, size]."""
        return decode.square(image, self.size)

    def embed(
        self, images: UInt8[Array, "b h w"], ids: Int[Array, "b t"], mask: Bool[Array, "b t"]
    ) -> tuple[Float[Array, "b d"], Float[Array, "b d"]]:
        """(image, text) embeddings of unit norm, fp32, in evaluation mode.

        images: of `size`. ids, mask: of `tokenizer.encode(texts, tokens)`. The alignment score of
        a pair is the inner product of its embeddings.
        """
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        e = model(_prepared(self, images), ids, mask, train=False)
        return normalize(e.image), normalize(e.text)

    def heat(
        self,
        images: UInt8[Array, "b h w"],
        ids: Int[Array, "b t"],
        mask: Bool[Array, "b t"],
        words: Int[Array, "b t"],
    ) -> Float[Array, "b s s"]:
        """Heat maps: how well each of s x s places of the `crop` fits a phrase, fp32.

        With local heads: the mean over the words of their cosine with the regions. Without, for a
        ResNet: Grad-CAM (arXiv 1610.02391, equations 1 and 2) of the alignment score at layer 3.

        ids, mask, words: of `tokenizer.encode_words(phrases, tokens)`. Raises UserError for a ViT
        without local heads.
        """
        model = nnx.merge(self.structure, self.params, self.stats, copy=True)
        prepared = _prepared(self, images)
        e = model(prepared, ids, mask, words, train=False)
        return _grad_cam(model, prepared, e.text) if e.local is None else _by_words(e.local)


def _prepared(model: Encoder | Pair, images: UInt8[Array, "b h w"]) -> Float[Array, "b s s c"]:
    return transforms.normalize(transforms.center_crop(images, model.crop), **dict(model.pixels))


def _by_words(local: towers.Local) -> Float[Array, "b s s"]:
    places = jnp.arange(local.words.shape[1])[None]
    real = (places > 0) & (places <= local.word_count[:, None])
    regions, words = jax.vmap(normalize)(local.regions), jax.vmap(normalize)(local.words)
    cosines = jnp.einsum("brd,bwd->brw", regions, words)
    count = jnp.maximum(real.sum(-1), 1).astype(jnp.float32)
    heat = jnp.where(real[:, None], cosines, 0.0).sum(-1) / count[:, None]
    side = round(heat.shape[1] ** 0.5)
    return heat.reshape(-1, side, side)


def _grad_cam(model: Any, images: Array, text: Array) -> Float[Array, "b s s"]:
    if not isinstance(model.image, resnet.ResNet):
        raise UserError(
            "heat maps: the encoder is a ViT, without a layer 3, and was pre-trained without "
            "regions: use an encoder of GLoRIA or MGCA"
        )
    layer3 = model.image(images, False).layer3

    def score(layer3: Array) -> Array:
        image = model.image_head(model.image.after_layer3(layer3), False)
        return (normalize(image) * normalize(text)).sum()

    weights = jax.grad(score)(layer3).mean((1, 2), keepdims=True)
    return jax.nn.relu((weights * layer3).sum(-1)).astype(jnp.float32)


def pretrained(workdir: Path) -> Encoder:
    """The image encoder of the best checkpoint of a pre-training run, on one device.

    Raises UserError if the folder is not the workdir of a run that has saved a checkpoint.
    """
    config = checkpoint.read_config(workdir)
    structure, params, stats, _ = checkpoint.restore(workdir, _image_maker(config), "image")
    return _encoder("pretrained", workdir, config, structure, params, stats)


def untrained(workdir: Path, seed: int) -> Encoder:
    """The image encoder of a run at a random initialization, the baseline of pre-training."""
    config = checkpoint.read_config(workdir)
    make = _image_maker(config)
    with checkpoint.rebuilding(workdir):
        structure, *_ = states.shapes(make)
    params, stats = states.random(make, jax.random.key(seed))
    return _encoder("random", workdir, config, structure, params, stats)


def imported(workdir: Path, path: str, layout: str, mean: float, std: float) -> Encoder:
    """The image encoder of a run with the weights of a file, such as ImageNet's.

    mean, std: of grey values in [0, 1], as the file's network expects. Raises UserError if the file
    does not fit the architecture, or its folder contradicts it (`encoder_configs.agreed`).
    """
    config, pixels = dict(checkpoint.read_config(workdir)), {"mean": mean, "std": std}
    flags = {"part": "config.image", "pixels": "config.encoder"}
    settings = config["image"] | pixels
    config["image"] = encoder_configs.agreed(path, settings, **flags, report=log.say)
    with checkpoint.rebuilding(workdir):
        structure, params, stats = states.shapes(_image_maker(config))
    params, stats = convert.load(path, layout, params, stats, report=log.say)
    return _encoder("imagenet", workdir, config, structure, params, stats)


def _image_maker(config: Mapping[str, Any]) -> Callable[[nnx.Rngs], nnx.Module]:
    return lambda rngs: towers.image_encoder(config["image"], jnp.dtype(config["dtype"]), rngs)


def _encoder(
    name: str, workdir: Path, config: Mapping[str, Any], structure: Any, params: Any, stats: Any
) -> Encoder:
    settings = json.dumps([config["image"], config["dtype"]], sort_keys=True)
    return Encoder(params, stats, name, settings, structure, *_preparation(workdir, config))


def _preparation(workdir: Path, config: Mapping[str, Any]) -> tuple[int, int, Pixels]:
    """Fields size, crop and pixels of an `Encoder` or `Pair`."""
    with checkpoint.rebuilding(workdir):
        pixels = tuple((k, config["image"][k]) for k in transforms.PIXELS)
        return config["data"]["size"], config["augment"]["size"], pixels


def pretrained_pair(workdir: Path) -> Pair:
    """The pair of the best checkpoint of a pre-training run, on one device.

    Raises UserError if the folder is not the workdir of a run that has saved a checkpoint.
    """
    config = checkpoint.read_config(workdir)
    preparation = _preparation(workdir, config)
    with checkpoint.rebuilding(workdir):
        data = config["data"]
        tokens, sections = data["tokens"], tuple(data["sections"])
        folder = Path(data["tokenizer"] or workdir / "tokenizer")
    tokenizer = tokenizers.load(folder)
    structure, params, stats, _ = checkpoint.restore(workdir, pair_maker(config, tokenizer))
    return Pair(params, stats, structure, tokenizer, tokens, sections, *preparation)


def pair_maker(
    config: Mapping[str, Any], tokenizer: tokenizers.Tokenizer
) -> Callable[[nnx.Rngs], towers.PairEncoder]:
    """Builds the pair of encoders that the config of a pre-training run describes."""

    def make(rngs: nnx.Rngs) -> towers.PairEncoder:
        image, text, heads = (config[part] for part in ("image", "text", "heads"))
        vocab, dtype = tokenizer.vocab_size, jnp.dtype(config["dtype"])
        return towers.PairEncoder(image, text, heads, vocab, dtype=dtype, rngs=rngs)

    return make


class Arrays:
    """A source of batches from arrays in memory, whose axis 0 counts the records."""

    def __init__(self, **arrays: np.ndarray):
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def take(self, indices: np.ndarray) -> loader.Batch:
        """The records at `indices`."""
        return {name: array[indices] for name, array in self.arrays.items()}


def over(
    fn: Callable[[dict[str, jax.Array]], Any],
    source: loader.Readable,
    mesh: Mesh,
    batch_size: int,
    threads: int = 0,
    title: str = "",
) -> Any:
    """The outputs of `fn` for every record of a source, in order.

    Args:
        fn: maps a batch, sharded over `mesh`, to a tree of arrays [b, ...], replicated.
        source: of the records.
        mesh: of all processes, or of devices of this process alone.
        batch_size: records a step over all devices of the mesh.
        threads: number of threads that read the source.
        title: of a progress bar on a terminal; "" for none.

    Returns:
        The tree in NumPy on every process of the mesh, with axis 0 as long as the source.

    Raises:
        UserError: if the devices do not divide the batch.
    """
    local, processes = meshes.per_process(batch_size, mesh), meshes.processes(mesh)
    this, count = processes.index(jax.process_index()), len(processes)
    batches = loader.eval_loader(source, local, this, count, threads)
    quiet = not title or jax.process_index() > 0 or not log.console.is_terminal
    shown = track(batches, title, len(batches), console=log.console, disable=quiet)
    whole, pending = None, None
    for number, batch in enumerate(shown):
        previous, pending = pending, fn(meshes.to_devices(mesh, batch))
        if previous is not None:  # fetched while the devices compute the next batch
            whole = _fill(whole, previous, (number - 1) * batch_size, len(source))
    return _fill(whole, pending, (len(batches) - 1) * batch_size, len(source))


def _fill(whole: Any, part: Any, start: int, count: int) -> Any:
    """Arrays [count, ...], made where `whole` is None, with those of `part` from row `start` on.

    Filled one by one, because a concatenation of all parts would need their memory twice.
    """
    part = jax.device_get(part)
    if whole is None:
        whole = jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), part)

    def put(to: np.ndarray, values: np.ndarray) -> None:
        to[start : start + len(values)] = values[: count - start]

    jax.tree.map(put, whole, part)
    return whole


def outputs(
    model: Encoder | Pair,
    method: Callable,
    inputs: Sequence[str],
    source: loader.Readable,
    mesh: Mesh,
    batch_size: int,
    threads: int = 0,
    title: str = "",
) -> Any:
    """The outputs of a method of a frozen model for every record of a source; see `over`.

    method: such as `Encoder.pooled`. inputs: the fields of a batch that are its arguments.
    """
    compiled = _compiled(method, mesh, len(inputs))
    weights = jax.device_get((model.params, model.stats))
    params, stats = jax.device_put(weights, meshes.replicated(mesh))
    placed = replace(model, params=params, stats=stats)

    def fn(batch: dict[str, jax.Array]) -> Any:
        return compiled(placed, *(batch[name] for name in inputs))

    return over(fn, source, mesh, batch_size, threads, title)


@lru_cache
def _compiled(method: Callable, mesh: Mesh, inputs: int) -> Callable:
    whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    return jax.jit(method, in_shardings=(whole, *[rows] * inputs), out_shardings=whole)


def embeddings(
    pair: Pair, source: loader.Readable, mesh: Mesh, batch_size: int, threads: int
) -> tuple[np.ndarray, np.ndarray]:
    """(image, text) embeddings [n, d] of all records of `source`, on every process; see `over`."""
    return outputs(pair, Pair.embed, ("image", "ids", "mask"), source, mesh, batch_size, threads)


def scores(pair: Pair, pixels: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """Alignment scores [n] of images, uint8 [h, w] each, with their texts.

    On one device, in batches of one shape, so that no score depends on the other pairs.
    """
    ids, mask = pair.tokenizer.encode(texts, pair.tokens)
    source = Arrays(image=np.stack([pair.fit(x) for x in pixels]), ids=ids, mask=mask)
    image, text = embeddings(pair, source, meshes.one_device(), _BATCH, 0)
    return np.einsum("nd,nd->n", image, text)


def heat_maps(pair: Pair, pixels: np.ndarray, phrase: str) -> np.ndarray:
    """Heat maps [n, s, s] of one phrase on images, uint8 [n, size, size]; see `Pair.heat`.

    Raises UserError for a phrase without a word.
    """
    if not phrase.strip():
        raise UserError(f"phrase {phrase!r}: give it a word")
    inputs = ("image", "ids", "mask", "words")
    tokens = pair.tokenizer.encode_words([phrase] * len(pixels), pair.tokens)
    source = Arrays(**dict(zip(inputs, (pixels, *tokens), strict=True)))
    return outputs(pair, Pair.heat, inputs, source, meshes.one_device(), _BATCH)
