"""A frozen encoder's features of whole splits, computed once: tables of pooled features, kept on
disk, and pyramids of feature maps, kept in memory."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core.files import replaced
from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards
from medsyn_jax.train import frozen
from medsyn_jax.train.frozen import Encoder


@dataclass(frozen=True)
class Table:
    """Features and labels of the records of one split, in order."""

    features: np.ndarray  # float32 [n, f]
    labels: np.ndarray  # int8 [n, l]: 1, 0, -1 uncertain, -2 not mentioned
    subjects: np.ndarray  # str [n]


@dataclass(frozen=True)
class Pixels:
    """The grey values of an image, reduced to `side` x `side`, as an encoder: the baseline that
    tells how much of a label can be read off brightness and shape alone."""

    side: int = 16
    name: str = "pixels"

    @property
    def fingerprint(self) -> str:
        return f"grey {self.side} x {self.side}"


class Images:
    """A source of the images of one split, resized to `size`, without their reports.

    arrays: what a batch also holds of the records, [n, ...] in order.
    """

    def __init__(self, records: shards.Records, size: int, **arrays: np.ndarray):
        self.records, self.size, self.arrays = records, size, arrays

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: np.ndarray) -> loader.Batch:
        """image uint8 [b, size, size] of the records at `indices`."""
        stored = (shards.value(self.records.features(i), "image") for i in indices.tolist())
        images = np.stack([decode.square(image, self.size) for image in stored])
        return {"image": images} | {k: array[indices] for k, array in self.arrays.items()}


def table(
    encoder: Encoder | Pixels,
    records: shards.Records,
    mesh: Mesh,
    folder: Path,
    *,
    batch_size: int,
    threads: int,
) -> Table:
    """The table of one split, read from `folder`, or computed and written there.

    The file name holds a hash of the fingerprints of encoder and data set; an unreadable file is
    computed again. batch_size: images a step over all devices. Raises UserError if the devices do
    not divide it.
    """
    origin = f"{encoder.fingerprint}/{records.info['fingerprint']}/{records.split}"
    key = hashlib.sha256(origin.encode()).hexdigest()[:12]
    path = folder / f"{encoder.name}-{records.split}-{key}.npz"
    stored = _read(path)
    if _on_every_process(stored is not None) and stored is not None:
        return stored
    if isinstance(encoder, Pixels):
        features = _pixels(encoder, records, batch_size)
    else:
        features = compute(encoder, records, mesh, batch_size, threads)
    computed = Table(features, labels(records), np.array(records.subjects()))
    if jax.process_index() == 0:
        _write(path, computed)
    return computed


def compute(
    encoder: Encoder, records: shards.Records, mesh: Mesh, batch_size: int, threads: int
) -> np.ndarray:
    """Pooled features, float32 [n, f], of all `records` on every process; see `frozen.over`."""
    title = f"features: {encoder.name}, {records.split}"
    settings = (Images(records, encoder.size), mesh, batch_size, threads, title)
    return frozen.outputs(encoder, Encoder.pooled, ("image",), *settings)


def _pixels(encoder: Pixels, records: shards.Records, count: int) -> np.ndarray:
    """Grey values in [0, 1], float32 [n, side * side], of all records; `count` are read at once."""
    images, n = Images(records, encoder.side), len(records)
    rows = [np.arange(start, min(start + count, n)) for start in range(0, n, count)]
    grey = np.concatenate([images.take(some)["image"] for some in rows])
    return grey.reshape(n, -1).astype(np.float32) / 255


def labels(records: shards.Records) -> np.ndarray:
    """`Table.labels`, int8 [n, l], of all records; decodes no image."""
    rows = range(len(records))
    return np.stack([shards.value(records.features(row), "labels") for row in rows])


def _read(path: Path) -> Table | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return Table(arrays["features"], arrays["labels"], arrays["subjects"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None  # missing or truncated


def _write(path: Path, computed: Table) -> None:
    with replaced(path) as temporary, temporary.open("wb") as f:
        np.savez(f, **vars(computed))


def _on_every_process(condition: bool) -> bool:
    """Whether the condition holds on every process; all of them compute, or none."""
    if jax.process_count() == 1:
        return condition
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(condition)).all())
