"""Batches for training and evaluation: Grain over the shards, one stream for any number of hosts.

The record at position p of the training stream is a function of (seed, p) alone. The global batch
of step s is the positions [s * B, (s + 1) * B), of which every process takes an equal, contiguous
chunk; so the records of a step and their order do not depend on the number of processes, and a
run goes on exactly where it stopped on any number of them.

The host reads, decodes the PNG and tokenizes. Everything else happens on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from medsyn_jax.core.errors import UserError
from medsyn_jax.data import images, reports, shards
from medsyn_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
_AHEAD = 2  # batches made ahead of the one in use, for each thread
_LEAST_WORDS = 3  # of a sentence that says something


class Source:
    """One split of a shard directory as model inputs.

    Args:
        directory: of shards.
        split: 'train', 'valid' or 'test'.
        sections: whose text the model reads (`reports.select_text`).
        tokenizer: for that text.
        length: tokens a text.
        size: side of the images in pixels; stored images of another size are resized.
        cache_mib: keep the decoded records in memory if all fit into so many MiB: each is then
            decoded once, not once an epoch.
        random_sentence: each time that training draws a record, its text is one of its sentences,
            all alike likely (ConVIRT, arXiv 2010.00747, 3.3), of 3 words or more if it has such.
        latents: batches have the stored `latents` float16[b, p, q, 2 z] instead of the image.
        words: batches have besides `words` int32[b, t], the word of each token
            (`Tokenizer.encode_words`).

    Raises:
        UserError: for a directory that is not whole, or a split that it lacks.
    """

    def __init__(
        self,
        directory: Path | str,
        split: str,
        sections: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        size: int,
        cache_mib: int = 512,
        random_sentence: bool = False,
        latents: bool = False,
        words: bool = False,
    ):
        self.records = shards.open_split(directory, split)
        self.sections, self.tokenizer = tuple(sections), tokenizer
        self.length, self.size = length, size
        self.random_sentence, self.words = random_sentence, words
        self._seen = ("image", (size, size), np.uint8)
        if latents:
            first = shards.value(self.records.features(0), "latents")
            self._seen = ("latents", first.shape, np.float16)
        self.label_names = self.records.label_names
        self._cache: Batch | None = None
        each = sum(array.nbytes for array in self._empty(1).values())
        if len(self) * each <= cache_mib * 2**20:
            self._cache = self._empty(len(self))
            self._filled = np.zeros(len(self), bool)
            self._texts = [""] * len(self)  # kept for `random_sentence` alone

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """The records at `indices`, int[b], in that order.

        Args:
            indices: of the records.
            draws: float[b] in [0, 1): which sentence of each record to read; None: all of them.

        Returns:
            image uint8[b, size, size], ids int32[b, length], mask bool[b, length],
            labels int8[b, l].
        """
        if self._cache is None:
            batch = self._empty(len(indices))
            texts = self._read(indices, batch, np.arange(len(indices)))
            if draws is None:
                batch |= self._tokens(texts)
        else:
            missing = np.unique(indices[~self._filled[indices]])
            if len(missing):
                self._fill(missing, self._cache)
            batch = {name: array[indices] for name, array in self._cache.items()}
            texts = [self._texts[index] for index in indices.tolist()]
        if draws is not None:
            chosen = list(map(_sentence, texts, draws.tolist()))
            batch |= self._tokens(chosen)
        return batch

    def texts(self) -> list[str]:
        """What the model reads of every record, before it is tokenized."""
        return self.records.texts(self.sections)

    def subjects(self) -> list[str]:
        """The subject of every record."""
        return self.records.subjects()

    @property
    def fingerprint(self) -> str:
        """Tells this sequence of records from any other."""
        return f"{self.records.info['fingerprint']}/{self.records.split}"

    def _tokens(self, texts: list[str]) -> Batch:
        encode = self.tokenizer.encode_words if self.words else self.tokenizer.encode
        return dict(zip(("ids", "mask", "words"), encode(texts, self.length), strict=False))

    def _empty(self, count: int) -> Batch:
        name, shape, kind = self._seen
        words = {"words": np.empty((count, self.length), np.int32)} if self.words else {}
        return words | {
            name: np.empty((count, *shape), kind),
            "ids": np.empty((count, self.length), np.int32),
            "mask": np.empty((count, self.length), bool),
            "labels": np.empty((count, len(self.label_names)), np.int8),
        }

    def _fill(self, indices: np.ndarray, cache: Batch) -> None:
        texts = self._read(indices, cache, indices)
        if self.random_sentence:
            for index, text in zip(indices.tolist(), texts, strict=True):
                self._texts[index] = text
        for name, values in self._tokens(texts).items():
            cache[name][indices] = values
        self._filled[indices] = True

    def _read(self, indices: np.ndarray, out: Batch, rows: np.ndarray) -> list[str]:
        """Decodes the records at `indices` into the `rows` of `out`, but for their texts."""
        texts = []
        for index, row in zip(indices.tolist(), rows.tolist(), strict=True):
            stored = self.records.features(index)
            name, shape, _ = self._seen
            seen = shards.value(stored, name)
            out[name][row] = seen if seen.shape == shape else images.square(seen, self.size)
            out["labels"][row] = shards.value(stored, "labels")
            texts.append(shards.text(stored, self.sections))
        return texts


def _sentence(text: str, draw: float) -> str:
    """One sentence of `text`, chosen by a number in [0, 1)."""
    every = reports.sentences(text) or [text]
    telling = [s for s in every if reports.token_count(s) >= _LEAST_WORDS] or every
    return telling[int(draw * len(telling))]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources in a row, whose records are numbered from 0 through all of them."""

    sources: tuple[Source, ...]

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """The number of the first record of each source, and behind the last: int[k + 1]."""
        return np.cumsum([0, *(len(source) for source in self.sources)])

    @functools.cached_property
    def labelled(self) -> bool:
        """Whether `labels` mean the same in all sources."""
        first = self.sources[0].label_names
        return all(source.label_names == first for source in self.sources)

    def take(self, indices: np.ndarray, draws: np.ndarray | None = None) -> Batch:
        """The records with these numbers, int[b], with their `index` int32[b]; see `Source`.

        draws: float[b] in [0, 1), used for sources of `random_sentence` alone.
        """
        owners = np.searchsorted(self.offsets, indices, "right") - 1
        batch: Batch = {}
        for number in np.unique(owners).tolist():
            rows = np.flatnonzero(owners == number)
            source = self.sources[number]
            own = draws[rows] if draws is not None and source.random_sentence else None
            part = source.take(indices[rows] - self.offsets[number], own)
            if len(rows) == len(indices):
                batch = part
                break
            for name, values in part.items():
                if name not in batch:
                    batch[name] = np.empty((len(indices), *values.shape[1:]), values.dtype)
                if self.labelled or name != "labels":
                    batch[name][rows] = values
        if not self.labelled:
            del batch["labels"]
        return batch | {"index": indices.astype(np.int32)}

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of the records with these numbers."""
        found = []
        for index in np.asarray(indices).ravel().tolist():
            number = int(np.searchsorted(self.offsets, index, "right")) - 1
            found.append(self.sources[number].records.keys[index - int(self.offsets[number])])
        return found


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
        sources: to draw from; with one set of label names, batches have `labels`.
        weights: positive; how often a record comes from each source.
        batch_size: records a step on this process; alike on all.
        seed: of the shuffles.
        process_index: of this process, below `process_count`.
        process_count: processes that share the stream.
        threads: that read and decode; 0 does it in the calling thread.

    Returns:
        An iterator over batches: image uint8[b, h, w],
        ids int32[b, t], mask bool[b, t], index int32[b], unique over the sources, and, if
        all sources have the same label names, labels int8[b, l].

    Raises:
        UserError: for weights that do not fit the sources.
    """
    weights = [float(w) for w in weights]
    if not sources or len(weights) != len(sources) or not all(0 < w < np.inf for w in weights):
        raise UserError(
            f"data.weights: {tuple(weights)}: give one positive number for each of the "
            f"{len(sources)} sources"
        )
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


class TrainBatches(Iterator[Batch]):
    """Iterator over training batches that can be put to any step; see `train_loader`."""

    def __init__(self, batches: grain.MapDataset[Batch], batch_size: int, order: str, threads: int):
        """batch_size: over all processes of the run. order: what the stream's order rests on."""
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
        """Makes the batch of `step` the next one, without reading those before it."""
        self.close()
        self._step = step

    def get_state(self) -> dict[str, Any]:
        """Where the stream is, as JSON; the same on every process of the run."""
        return {"records": self._step * self.batch_size, "order": self.order}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was called, on any number of processes.

        Raises:
            UserError: when the stream was another one (other data, weights or seed), or the
                position does not fall between two batches of this size.
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


class Readable(Protocol):
    """What evaluation asks of a source: `Source`, or anything alike."""

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
        source: to go through.
        batch_size: records a step on this process; alike on all.
        process_index: of this process, below `process_count`.
        process_count: processes that share the work; each takes a contiguous chunk of a step.
        threads: that read and decode; 0 does it in the calling thread.

    Returns:
        A sized, repeatable iterable of batches as in training, with labels int8[b, l] and
        weight float32[b]: 1 for a record, 0 for the copies of the last one that fill up the last
        step.
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


@dataclasses.dataclass(frozen=True)
class EvalBatches:
    """Repeatable iterable over evaluation batches; see `eval_loader`."""

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
    """float[b] in [0, 1): one number for each position of the stream, whoever asks."""
    return np.array([np.random.default_rng([seed, p]).random() for p in positions])


def _shuffle_seed(seed: int, number: int) -> int:
    # Grain adds the epoch to the seed: seeds that follow each other would share their epochs.
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
