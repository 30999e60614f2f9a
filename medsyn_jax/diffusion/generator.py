"""Radiographs from prompts by a Stable Diffusion pipeline, on all devices of this process.

A device works on chunks of `batch` records. The caller chooses the records of a chunk; the number
of devices decides only how many chunks run at a time. The program of a device, its shapes and its
inputs are then the same on any number of devices, and so is every bit of its images.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, UInt8

from medsyn_jax.core import tree
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.text import tokenizers
from medsyn_jax.diffusion import sampler, schedule
from medsyn_jax.models.diffusion.pipeline import Pipeline, module_of

_LARGEST = 4096  # latents along a side
_DECODED = 4  # latents that a device decodes at a time: the decoder's features are large


@dataclass(frozen=True)
class Sampling:
    """A sampler of `schedule`, its number of steps, and the options of `sampler.sample`."""

    name: str
    steps: int
    guidance: float = 1.0
    interval: tuple[float, ...] = ()  # of noise levels that are guided; empty: all
    rescale: float = 0.0
    cache_every: int = 1


class Chunk(NamedTuple):
    """Records that a device works on together, at most `Generator.batch` of them."""

    indices: np.ndarray  # int [n], which give the noise
    contexts: np.ndarray  # [n, t, w], the text states, from `Generator.encode`


class NotFinite(ArithmeticError):
    """The image of record `index` is not finite, first so after `step`."""

    def __init__(self, index: int, step: int):
        super().__init__(f"record {index}: not finite after step {step}")
        self.index, self.step = index, step


class Generator:
    """Makes images of `size` x `size` pixels; the image of a record is a function of the pipeline,
    the settings, the seed, the record's index and attempt, and its prompt.

    pipeline: with all its parts. sampling: settings. seed: of the noise. batch: records that a
    device works on at a time. size: in pixels; 0: the training size of the U-Net. dtype: of the
    computation and of the matrices on the devices. devices: of this process; None: all of them.
    Raises UserError for parts or settings that do not fit each other.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        sampling: Sampling,
        *,
        seed: int,
        batch: int,
        size: int = 0,
        dtype: DTypeLike = jnp.float32,
        devices: Sequence[Any] | None = None,
    ):
        self.sampling, self.batch = sampling, batch
        table = check(pipeline, sampling, size)
        self.size = size or native_size(pipeline)
        self.tokenizer = tokenizers.load(pipeline.tokenizer)
        self.length = text_length(pipeline)
        mesh = Mesh(np.array(devices or jax.local_devices()), ("data",))
        self._devices = mesh.size
        self._split, self._whole = (NamedSharding(mesh, P(*axes)) for axes in (("data",), ()))
        self._key = jax.device_put(jax.random.key(seed), self._whole)
        params = {name: _matrices(part.params, dtype) for name, part in pipeline.parts.items()}
        self._params = jax.device_put(params, self._whole)
        draw = _per_device(
            _draw_fn(pipeline, sampling, table, self.size, batch, dtype),
            mesh,
            (P(), P(), P(), P("data"), P("data")),
        )
        text = module_of(pipeline.parts["text_encoder"], dtype)
        self._encode = _per_device(
            lambda params, ids: text(params["text_encoder"])(ids), mesh, (P(), P("data"))
        )
        self._empty = jax.device_put(self.encode([""]), self._whole)
        many = self._devices * batch
        indices = jax.ShapeDtypeStruct((many,), jnp.int32)
        contexts = jax.ShapeDtypeStruct((many, *self._empty.shape[1:]), self._empty.dtype)
        self._draw = draw.lower(self._params, self._key, self._empty, indices, contexts).compile()

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Text states [n, t, w] of the n prompts, each in a chunk with its neighbors."""
        ids, _ = self.tokenizer.encode(prompts, self.length)
        chunks = iter([ids[i : i + self.batch] for i in range(0, len(ids), self.batch)])
        states = []
        while group := list(islice(chunks, self._devices)):
            rows = jax.device_get(self._encode(self._params, self._joined(group)))
            states += [rows[i * self.batch :][: len(part)] for i, part in enumerate(group)]
        return np.concatenate(states)

    def images(
        self, indices: Sequence[int] | np.ndarray, prompts: Sequence[str], attempt: int = 0
    ) -> UInt8[np.ndarray, "n s s"]:
        """Grey images of the records with these indices and prompts; distinct prompts are encoded
        once. attempt: another one draws other noise. Raises NotFinite."""
        distinct = {text: i for i, text in enumerate(dict.fromkeys(prompts))}
        contexts = self.encode(list(distinct))[[distinct[text] for text in prompts]]
        indices, cuts = np.asarray(indices), range(0, len(indices), self.batch)
        chunks = (Chunk(indices[i : i + self.batch], contexts[i : i + self.batch]) for i in cuts)
        return np.concatenate(list(self.stream(chunks, attempt)))

    def stream(
        self, chunks: Iterable[Chunk], attempt: int = 0
    ) -> Iterator[UInt8[np.ndarray, "n s s"]]:
        """The images of each chunk in order, while the devices already work on the next ones.

        Raises NotFinite.
        """
        key = jax.random.fold_in(self._key, attempt) if attempt else self._key
        key, source, running = jax.device_put(key, self._whole), iter(chunks), None
        while group := list(islice(source, self._devices)):
            started = group, self._begin(key, group)
            if running:
                yield from self._end(*running)
            running = started
        if running:
            yield from self._end(*running)

    def _begin(self, key: jax.Array, group: list[Chunk]) -> tuple[jax.Array, jax.Array]:
        """Start a program on all devices."""
        indices = self._joined([chunk.indices.astype(np.int32) for chunk in group])
        contexts = self._joined([chunk.contexts for chunk in group])
        return self._draw(self._params, key, self._empty, indices, contexts)

    def _joined(self, parts: Sequence[np.ndarray]) -> jax.Array:
        """Rows for all devices. A device with too few rows repeats them, so that the neighbors of a
        row do not depend on the number of devices."""
        full = [*parts, *[parts[-1]] * (self._devices - len(parts))]
        rows = [np.resize(part, (self.batch, *part.shape[1:])) for part in full]
        return jax.device_put(np.concatenate(rows), self._split)

    def _end(
        self, group: list[Chunk], started: tuple[jax.Array, jax.Array]
    ) -> Iterator[UInt8[np.ndarray, "n s s"]]:
        pixels, bad = jax.device_get(started)
        for i, chunk in enumerate(group):
            rows = slice(i * self.batch, i * self.batch + len(chunk.indices))
            for index, step in zip(chunk.indices.tolist(), bad[rows].tolist(), strict=True):
                if step >= 0:
                    raise NotFinite(index, step)
            yield pixels[rows]


def grey(x: Float[Array, "b h w c"]) -> UInt8[Array, "b h w"]:
    """A decoder's images in [-1, 1] as pixels: 127.5 (x + 1) in float32, clipped to 0 and 255 as in
    diffusers, then the mean of the channels, rounded half to even."""
    levels = jnp.clip(127.5 * (x.astype(jnp.float32) + 1), 0, 255)
    return jnp.round(levels.mean(-1)).astype(jnp.uint8)


def native_size(pipeline: Pipeline) -> int:
    """The side in pixels of the images that the U-Net was trained on."""
    value = pipeline.parts["unet"].config.get("sample_size")
    sides: list[Any] = list(value) if isinstance(value, (list, tuple)) and value else [value]
    if not all(type(side) is int and 0 < side <= _LARGEST and side == sides[0] for side in sides):
        raise UserError(f"pipeline: unet/config.json: sample_size: {value!r}: set config.size")
    return sides[0] * factor(pipeline)


def text_length(pipeline: Pipeline) -> int:
    """The tokens of a prompt, with its start and end marks."""
    return len(pipeline.parts["text_encoder"].params["position"]["table"])


def fingerprint(pipeline: Pipeline) -> str:
    """A hash of weights, configs, schedule and tokenizer that identifies the pipeline."""
    digest = hashlib.sha256()
    for name, part in sorted(pipeline.parts.items()):
        digest.update(json.dumps([name, dict(part.config)], sort_keys=True).encode())
        for path, leaf in sorted(tree.named(part.params).items()):
            array = np.ascontiguousarray(leaf)
            digest.update(json.dumps([path, str(array.dtype), array.shape]).encode())
            digest.update(array.view(np.uint8).data)
    digest.update(json.dumps(dict(pipeline.scheduler), sort_keys=True).encode())
    for file in sorted(p for p in Path(pipeline.tokenizer).rglob("*") if p.is_file()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def factor(pipeline: Pipeline) -> int:
    """Pixels of a latent, along a side."""
    return 2 ** (len(pipeline.parts["vae"].params["decoder"]["levels"]) - 1)


def check(pipeline: Pipeline, sampling: Sampling, size: int) -> schedule.Table:
    """The sampler's table. Raises UserError for parts that do not fit each other, a scheduler that
    is not supported, settings that it does not allow, or a size that the parts cannot make."""
    unet, vae, text = (pipeline.parts[name].params for name in ("unet", "vae", "text_encoder"))
    words, width = text["word"]["table"].shape
    latents, decoded = (p["enter"]["kernel"].shape[2] for p in (unet, vae["decoder"]))
    output = unet["leave"]["kernel"].shape[3]
    vocabulary = tokenizers.load(pipeline.tokenizer).vocab_size
    contexts = {
        leaf.shape[0]
        for name, leaf in tree.named(unet).items()
        if name.endswith("cross_attention/key/kernel")
    }
    read = max(contexts, default=0)
    for fits, fault in (
        (latents == decoded, f"unet/ makes latents of {latents} channels, vae/ takes {decoded}"),
        (contexts <= {width}, f"unet/ reads texts of {read} channels, text_encoder/ makes {width}"),
        (vocabulary <= words, f"tokenizer/ has {vocabulary} tokens, text_encoder/ knows {words}"),
    ):
        if not fits:
            raise UserError(f"pipeline: {fault}: they are not of one model")
    if output != latents:
        raise UserError(
            f"pipeline: unet/ takes {latents} channels and gives {output}: use a U-Net that gives "
            "as many as it takes"
        )
    if (size or native_size(pipeline)) % factor(pipeline):
        raise UserError(f"config.size: {size}: use a multiple of {factor(pipeline)}")
    return schedule.make_table(sampling.name, pipeline.scheduler, sampling.steps)


def _matrices(params: Any, dtype: DTypeLike) -> Any:
    """Matrices and kernels in `dtype`; scales and biases, which need little memory, in float32."""
    return jax.tree.map(lambda p: np.asarray(p, dtype if p.ndim > 1 else np.float32), params)


def _per_device(f: Callable, mesh: Mesh, specs: tuple[P, ...]) -> Callable:
    """`f` jitted so that every device runs it on its own part of the arguments of axis "data"."""
    mapped = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("data"), check_vma=False)
    inputs = tuple(NamedSharding(mesh, spec) for spec in specs)
    return jax.jit(mapped, in_shardings=inputs, out_shardings=NamedSharding(mesh, P("data")))


def _draw_fn(
    pipeline: Pipeline,
    sampling: Sampling,
    table: schedule.Table,
    size: int,
    batch: int,
    dtype: DTypeLike,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """draw(params, key, empty [1, t, w], indices [b], contexts [b, t, w]) -> (pixels uint8
    [b, size, size], the first step after which a record was not finite, or -1; [b])."""
    unet, vae = (module_of(pipeline.parts[name], dtype) for name in ("unet", "vae"))
    channels = pipeline.parts["unet"].params["enter"]["kernel"].shape[2]
    side, together = size // factor(pipeline), math.gcd(batch, _DECODED)
    low, high = sampling.interval or (0.0, math.inf)

    def draw(
        params: Any,
        key: jax.Array,
        empty: Float[Array, "1 t w"],
        indices: Int[Array, " b"],
        contexts: Float[Array, "b t w"],
    ) -> tuple[UInt8[Array, "b s s"], Int[Array, " b"]]:
        net, coder = unet(params["unet"]), vae(params["vae"])
        latents, bad = sampler.sample(
            (net.full, net.shallow) if sampling.cache_every > 1 else net,
            sampler.record_noise(key, indices, (side, side, channels)),
            contexts,
            empty,
            table,
            guidance=sampling.guidance,
            interval=(low, high),
            rescale=sampling.rescale,
            cache_every=sampling.cache_every,
        )

        def decode(z: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = coder.decode(z / pipeline.scaling_factor)
            return grey(x), jnp.isfinite(x).all((1, 2, 3))

        groups = latents.reshape(-1, together, side, side, channels)
        pixels, sound = jax.lax.map(decode, groups)
        bad = jnp.where((bad < 0) & ~sound.reshape(batch), len(table.steps.time), bad)
        return pixels.reshape(batch, size, size), bad

    return draw
