"""Batches for training and evaluation: Grain over the shards, one stream for any number of hosts.

The record at position p of the training stream is a function of (seed, p) alone. The global batch
of step s is the positions [s * B, (s + 1) * B), of which every process takes an equal, contiguous
chunk. So the records of a step and their order do not depend on the number of processes, and a run
resumes exactly where it stopped, on any number of them.

The host reads, decodes the PNG and tokenizes. Everything else happens on the device.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np

from medsyn_jax.core.checks import is_number
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading.dataset import Batch, Mixture, Source

_AHEAD = 2  # batches made ahead of the one in use, for each thread


def train_loader(
    sources: Sequence[Source],
    weights: Sequence[float],
    batch_size: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> TrainBatches:
    """The endless stream of training batches of one process.

    Every source is shuffled anew each epoch of its own; sources are interleaved so that any
    stretch of the stream holds them in the proportion of their weights.

    Args:
        sources: to draw from.
        weights: positive; how often a record comes from each source.
        batch_size: records a step on this process; alike on all.
        seed: of the shuffles.
        process_index: of this process, below `process_count`.
        process_count: processes that share the stream.
        threads: that read and decode; 0 does it in the calling thread.

    Returns:
        An iterator over batches: image uint8[b, h, w], ids int32[b, t], mask bool[b, t], and
        index int32[b], unique over the sources.

    Raises:
        UserError: for weights that do not fit the sources.
    """
    check_weights(weights, len(sources))
    weights = [float(w) for w in weights]
    mixture = Mixture(tuple(sources))
    streams = [
        grain.MapDataset.range(first, last).shuffle(seed=_shuffle_seed(seed, number)).repeat()
        for number, (first, last) in enumerate(pairwise(mixture.offsets.tolist()))
    ]
    stream = streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, weights)

    def take(chunk: int, indices: np.ndarray) -> Batch:
        positions = range(chunk * batch_size, (chunk + 1) * batch_size)
        return mixture.take(indices, _draws(seed, positions) if sentences else None)

    sentences = any(source.random_sentence for source in sources)
    batches = stream.batch(batch_size, drop_remainder=True).map_with_index(take)
    order = json.dumps([seed, weights, [source.fingerprint for source in sources]])
    whole = batch_size * process_count
    return TrainBatches(batches[process_index::process_count], whole, order, threads)


def check_weights(weights: Sequence[Any], sources: int) -> None:
    """UserError unless there is one positive number for each of so many sources, 1 or more."""
    fits = len(weights) == sources
    if not fits or not sources or not all(is_number(w) and w > 0 for w in weights):
        what = tuple(weights) if fits else f"{len(weights)} weights for {sources} sources"
        raise UserError(
            f"config.data.weights: {what}: give one positive number for each of the {sources} "
            "sources of config.data.sources"
        )


class TrainBatches(Iterator[Batch]):
    """Iterator over training batches that can be put to any step; see `train_loader`."""

    def __init__(self, batches: grain.MapDataset[Batch], batch_size: int, order: str, threads: int):
        """batch_size: over all processes of the run. order: all that decides the stream's order."""
        self.batch_size = batch_size
        self.order = hashlib.sha256(order.encode()).hexdigest()[:16]
        self._batches, self._threads = batches, threads
        self._iterator: grain.DatasetIterator[Batch] | None = None
        self._step = 0

    def __next__(self) -> Batch:
        if self._iterator is None:
            stream = self._batches[self._step :].to_iter_dataset(_options(self._threads))
            self._iterator = iter(stream)
        batch = next(self._iterator)
        self._step += 1
        return batch

    def seek(self, step: int) -> None:
        """Makes the batch of `step` the next one; those before it are not read."""
        self.close()
        self._step = step

    def get_state(self) -> dict[str, Any]:
        """The place in the stream, as JSON; the same on every process of the run."""
        return {"records": self._step * self.batch_size, "order": self.order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Resumes where `get_state` was called, on any number of processes.

        Raises:
            UserError: for other data, weights or seed, or a place that is not between two batches
                of this size.
        """
        if state["order"] != self.order:
            raise UserError(
                "data: the checkpoint was made with other data, weights or seed: "
                "use those, or another workdir"
            )
        step, rest = divmod(state["records"], self.batch_size)
        if rest:
            raise UserError(
                f"data.batch_size: {self.batch_size}: does not divide the {state['records']} "
                "records that the checkpoint has seen: use the one it was made with"
            )
        self.seek(step)

    def close(self) -> None:
        """Stops the threads; the next batch starts them again."""
        if self._iterator is not None:
            self._iterator.close()
        self._iterator = None


@runtime_checkable
class Readable(Protocol):
    """What evaluation needs of a source."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch: ...


def eval_loader(
    source: Readable,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
) -> EvalBatches:
    """Every record of a source once, in order, in batches of one shape.

    Args:
        source: of the records.
        batch_size, process_index, process_count, threads: as of `train_loader`; each process takes
            a contiguous chunk of a step.

    Returns:
        A sized, repeatable iterable of batches as in training, with weight float32[b]: 1 for a
        record, 0 for the copies of the last record that fill up the last step.
    """
    whole = batch_size * process_count
    steps = -(-len(source) // whole)

    def take(positions: np.ndarray) -> Batch:
        # Filled up with a real record: a blank one, all its tokens masked, could give NaN.
        real = np.minimum(positions, len(source) - 1)
        weight = (positions < len(source)).astype(np.float32)
        return source.take(real) | {"index": real.astype(np.int32), "weight": weight}

    positions = grain.MapDataset.range(steps * whole)
    chunks = positions.batch(batch_size)[process_index::process_count]
    return EvalBatches(chunks.map(take), _options(threads))


def in_order(source: Readable, rows: np.ndarray, threads: int = 2) -> EvalBatches:
    """The records at `rows`, int [t, b], in t batches; threads: as of `train_loader`."""
    return EvalBatches(grain.MapDataset.source(list(rows)).map(source.take), _options(threads))


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Repeatable iterable over batches that ends; see `eval_loader` and `in_order`."""

    batches: grain.MapDataset[Batch]
    options: grain.ReadOptions

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self.batches.to_iter_dataset(self.options))
        try:
            yield from iterator
        finally:
            iterator.close()


def record_keys(sources: Sequence[Source], indices: Sequence[int] | np.ndarray) -> list[str]:
    """The keys of records by their `index` in batches from `sources`, for messages."""
    return Mixture(tuple(sources)).keys(indices)


def _options(threads: int) -> grain.ReadOptions:
    # A thread makes whole batches, so the buffer counts batches, not records.
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=_AHEAD * threads)


def _draws(seed: int, positions: range) -> np.ndarray:
    """float[b] in [0, 1): one number for each position of the stream, on any process."""
    return np.array([np.random.default_rng([seed, p]).random() for p in positions])


def _shuffle_seed(seed: int, number: int) -> int:
    # Grain adds the epoch to the seed: seeds that follow each other would share their epochs.
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
