"""Features of whole splits by a frozen encoder: computed once, on all devices, and kept on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from zipfile import BadZipFile

import jax
import numpy as np
from jax.sharding import Mesh
from rich.progress import track

from medsyn_jax.core import log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.core.files import replaced
from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards
from medsyn_jax.train.encoders import Encoder


@dataclass(frozen=True)
class Table:
    """What a probe needs of one split, in its order of records."""

    features: np.ndarray  # float32 [n, f]
    labels: np.ndarray  # int8 [n, l]: 1, 0, -1 uncertain, -2 not mentioned
    subjects: np.ndarray  # str [n]


class Images:
    """The images of one split without their reports, which would need a tokenizer."""

    def __init__(self, records: shards.Records, size: int):
        """size: side of the images in pixels; stored ones of another size are resized."""
        self.records, self.size = records, size

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: np.ndarray) -> loader.Batch:
        """image uint8 [b, size, size] of the records at `indices`."""
        pixels = np.empty((len(indices), self.size, self.size), np.uint8)
        for row, index in enumerate(indices.tolist()):
            image = shards.value(self.records.features(index), "image")
            fits = image.shape == (self.size, self.size)
            pixels[row] = image if fits else decode.square(image, self.size)
        return {"image": pixels}


def table(
    encoder: Encoder,
    records: shards.Records,
    mesh: Mesh,
    folder: Path,
    *,
    batch_size: int,
    threads: int,
) -> Table:
    """The table of one split: read from `folder`, or computed and written there.

    A file is found again by a hash of the encoder's fingerprint (weights, structure, preparation)
    and of the data set's; one that cannot be read is made again.
    """
    made_from = f"{encoder.fingerprint}/{records.info['fingerprint']}/{records.split}"
    key = hashlib.sha256(made_from.encode()).hexdigest()[:12]
    path = folder / f"{encoder.name}-{records.split}-{key}.npz"
    found = _read(path)
    if _on_every_process(found is not None) and found is not None:
        return found
    features = compute(encoder, records, mesh, batch_size, threads)
    made = Table(features, labels(records), np.array(records.subjects()))
    if jax.process_index() == 0:
        _write(path, made)
    return made


def labels(records: shards.Records) -> np.ndarray:
    """int8 [n, l] of all records, in order, as `Table.labels`; no image is decoded."""
    rows = range(len(records))
    return np.stack([shards.value(records.features(row), "labels") for row in rows])


def _read(path: Path) -> Table | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Table(arrays["features"], arrays["labels"], arrays["subjects"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # missing or cut short


def _write(path: Path, made: Table) -> None:
    with log.full_disk_is_user_error(path), replaced(path) as temporary, temporary.open("wb") as f:
        np.savez(f, **vars(made))


def _on_every_process(condition: bool) -> bool:
    """All processes must compute together or not at all."""
    if jax.process_count() == 1:
        return condition
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def compute(
    encoder: Encoder, records: shards.Records, mesh: Mesh, batch_size: int, threads: int
) -> np.ndarray:
    """Pooled features, float32 [n, f], of all `records` on every process.

    batch_size: images a step over all devices. Raises UserError if they do not divide it.
    """
    local = meshes.per_process(batch_size, mesh)
    everywhere = meshes.replicated(mesh)
    forward = jax.jit(
        encoder.pooled,
        in_shardings=(everywhere, everywhere, meshes.batch_sharding(mesh)),
        out_shardings=everywhere,
    )
    weights = jax.device_get((encoder.params, encoder.stats))
    params, stats = jax.device_put(weights, everywhere)
    # `Images` has what the loader asks of a source here: a length, and `take`.
    source = cast(loader.Source, Images(records, encoder.size))
    this, count = jax.process_index(), jax.process_count()
    batches = loader.eval_loader(source, local, this, count, threads)
    title = f"features: {encoder.name}, {records.split}"
    quiet = jax.process_index() > 0 or not log.console.is_terminal
    rows: list[np.ndarray] = []
    waiting: jax.Array | None = None
    for batch in track(batches, title, total=len(batches), console=log.console, disable=quiet):
        pixels = meshes.to_devices(mesh, {"image": batch["image"]})["image"]
        done, waiting = waiting, forward(params, stats, pixels)
        if done is not None:  # fetched while the device works on the next
            rows.append(np.asarray(done))
    rows.append(np.asarray(waiting))
    return np.concatenate(rows)[: len(records)]
