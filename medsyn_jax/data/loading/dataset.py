"""Records of a shard directory, and of several, as model inputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medsyn_jax.data.images import decode
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import reports
from medsyn_jax.data.text.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]
_LEAST_WORDS = 3  # of a sentence to be read alone


class Source:
    """One split of a shard directory as model inputs.

    Args:
        directory: of shards.
        split: 'train', 'valid' or 'test'.
        sections: whose text the model reads (`reports.select_text`).
        tokenizer: for that text.
        length: tokens a text.
        size: side of the images in pixels; stored images of another size are resized.
        cache_mib: keep all decoded records in memory if they fit into so many MiB.
        random_sentence: training reads one sentence of a record at a time, each as likely as the
            others (ConVIRT, arXiv 2010.00747, 3.3), of 3 words or more if there are such.
        latents: batches have the stored `latents` float16[b, p, q, 2 z] instead of the image.
        words: batches have `words` int32[b, t], too: the word of each token
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
        self._pixels = ("image", (size, size), np.uint8)
        if latents:
            first = shards.value(self.records.features(0), "latents")
            self._pixels = ("latents", first.shape, np.float16)
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
            image uint8[b, size, size], ids int32[b, length], mask bool[b, length].
        """
        if self._cache is None:
            batch = self._empty(len(indices))
            texts = self._read(indices, batch, np.arange(len(indices)))
        else:
            missing = np.unique(indices[~self._filled[indices]])
            if len(missing):
                self._fill(missing, self._cache)
            batch = {name: array[indices] for name, array in self._cache.items()}
            texts = [self._texts[index] for index in indices.tolist()]
        if draws is not None:
            texts = list(map(_sentence, texts, draws.tolist()))
        if draws is not None or self._cache is None:
            batch |= self._tokens(texts)
        return batch

    def texts(self) -> list[str]:
        """What the model reads of every record, before it is tokenized; kept once it is read."""
        return self._every_text

    @functools.cached_property
    def _every_text(self) -> list[str]:
        return self.records.texts(self.sections)

    def subjects(self) -> list[str]:
        """The subject of every record."""
        return self.records.subjects()

    @property
    def fingerprint(self) -> str:
        """The identity of this sequence of records."""
        return f"{self.records.info['fingerprint']}/{self.records.split}"

    def _tokens(self, texts: list[str]) -> Batch:
        encode = self.tokenizer.encode_words if self.words else self.tokenizer.encode
        return dict(zip(("ids", "mask", "words"), encode(texts, self.length), strict=False))

    def _empty(self, count: int) -> Batch:
        name, shape, kind = self._pixels
        words = {"words": np.empty((count, self.length), np.int32)} if self.words else {}
        return words | {
            name: np.empty((count, *shape), kind),
            "ids": np.empty((count, self.length), np.int32),
            "mask": np.empty((count, self.length), bool),
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
            name, shape, _ = self._pixels
            pixels = shards.value(stored, name)
            out[name][row] = pixels if pixels.shape == shape else decode.square(pixels, self.size)
            texts.append(shards.text(stored, self.sections))
        return texts


def _sentence(text: str, draw: float) -> str:
    """One sentence of `text`, chosen by a number in [0, 1)."""
    sentences = reports.sentences(text) or [text]
    long = [s for s in sentences if reports.token_count(s) >= _LEAST_WORDS] or sentences
    return long[int(draw * len(long))]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Several sources in a row; their records are numbered through all of them, from 0."""

    sources: tuple[Source, ...]

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        """The number of the first record of each source, and the number of all: int[k + 1]."""
        return np.cumsum([0, *(len(source) for source in self.sources)])

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
                batch[name][rows] = values
        return batch | {"index": indices.astype(np.int32)}

    def keys(self, indices: Sequence[int] | np.ndarray) -> list[str]:
        """The keys of the records with these numbers."""
        indices = np.asarray(indices).ravel()
        owners = np.searchsorted(self.offsets, indices, "right") - 1
        rows = (indices - self.offsets[owners]).tolist()
        return [self.sources[o].records.keys[r] for o, r in zip(owners, rows, strict=True)]
