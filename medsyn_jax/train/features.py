"""Tables of features of whole splits by a frozen encoder: computed once and kept on disk."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core.files import full_disk_is_user_error, replaced
from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards
from medsyn_jax.train import frozen
from medsyn_jax.train.frozen import Encoder


@dataclass(frozen=True)
class Table:
    """What a probe needs of one split, in its order of records."""

    features: np.ndarray  # float32 [n, f]
    labels: np.ndarray  # int8 [n, l]: 1, 0, -1 uncertain, -2 not mentioned
    subjects: np.ndarray  # str [n]


class Images:
    """The images of one split without their reports, which would need a tokenizer."""

    def __init__(self, records: shards.Records, size: int):
        """size: side of the images in pixels; stored images of another size are resized."""
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

    The file name holds a hash of the encoder's fingerprint (weights, architecture, preparation) and
    the data set's; a file that cannot be read is computed again. batch_size: images a step over all
    devices; UserError if the devices do not divide it.
    """
    origin = f"{encoder.fingerprint}/{records.info['fingerprint']}/{records.split}"
    key = hashlib.sha256(origin.encode()).hexdigest()[:12]
    path = folder / f"{encoder.name}-{records.split}-{key}.npz"
    stored = _read(path)
    if _on_every_process(stored is not None) and stored is not None:
        return stored
    features = compute(encoder, records, mesh, batch_size, threads)
    computed = Table(features, labels(records), np.array(records.subjects()))
    if jax.process_index() == 0:
        _write(path, computed)
    return computed


def compute(
    encoder: Encoder, records: shards.Records, mesh: Mesh, batch_size: int, threads: int
) -> np.ndarray:
    """Pooled features, float32 [n, f], of all `records` on every process; see `frozen.over`."""
    source, title = Images(records, encoder.size), f"features: {encoder.name}, {records.split}"
    settings = (mesh, batch_size, threads, title)
    return frozen.outputs(encoder, Encoder.pooled, ("image",), source, *settings)


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


def _write(path: Path, computed: Table) -> None:
    with full_disk_is_user_error(path), replaced(path) as temporary, temporary.open("wb") as f:
        np.savez(f, **vars(computed))


def _on_every_process(condition: bool) -> bool:
    """Whether the condition holds everywhere: processes compute together or not at all."""
    if jax.process_count() == 1:
        return condition
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(condition)).all())
