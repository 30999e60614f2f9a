"""A set of images with everything that curation reads of it, over one split or several."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards

SMALL = 32  # side in pixels of the thumbnails


@dataclass
class Collection:
    """n images: splits of a set, one after the other."""

    sources: list[loader.Source]
    features: np.ndarray  # float32 [n, f]
    labels: np.ndarray  # int8 [n, l]
    subjects: np.ndarray  # str [n]

    @functools.cached_property
    def mixture(self) -> loader.Mixture:
        return loader.Mixture(tuple(self.sources))

    @functools.cached_property
    def keys(self) -> list[str]:
        return [key for source in self.sources for key in source.records.keys]

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """bool [n]: images outside the training split; all images if there is no other split."""
        names = np.array([s.records.split for s in self.sources])
        outside = np.repeat(names != "train", [len(s) for s in self.sources])
        return outside if outside.any() else ~outside

    def only_held_out(self) -> "Collection":
        """The images of `held_out`."""
        rows, starts = self.held_out, self.mixture.offsets[:-1].tolist()
        sources = [s for s, start in zip(self.sources, starts, strict=True) if rows[start]]
        return Collection(sources, self.features[rows], self.labels[rows], self.subjects[rows])

    @functools.cached_property
    def _strings(self) -> list[np.ndarray]:
        """texts, prompts and reports, in one pass over the records."""
        rows = []
        for row in range(len(self.keys)):
            stored = self.stored(row)
            text = shards.text(stored, self.sources[0].sections)
            prompt = shards.value(stored, "prompt") if "prompt" in stored else text
            rows.append((text, prompt, shards.value(stored, "report")))
        return [np.array(column) for column in zip(*rows, strict=True)]

    @property
    def texts(self) -> np.ndarray:
        """The input of the text encoder, str [n]."""
        return self._strings[0]

    @property
    def prompts(self) -> np.ndarray:
        """The input of the generator where it is stored, else `texts`, str [n]."""
        return self._strings[1]

    @property
    def reports(self) -> np.ndarray:
        """The whole reports as the source had them, str [n]."""
        return self._strings[2]

    def stored(self, row: int) -> Mapping[str, Any]:
        """The stored fields of a record, which `shards.value` decodes."""
        source = int(np.searchsorted(self.mixture.offsets, row, "right")) - 1
        return self.sources[source].records.features(row - int(self.mixture.offsets[source]))

    def pixels(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 [k, s, s], of the size that the encoders take."""
        return self.mixture.take(np.asarray(rows, int))["image"]

    def thumbnails(self, threads: int) -> np.ndarray:
        """All images at SMALL pixels, uint8 [n, SMALL, SMALL]."""

        def small(row: int) -> np.ndarray:
            return decode.square(shards.value(self.stored(row), "image"), SMALL)

        with ThreadPoolExecutor(max(threads, 1)) as pool:
            return np.stack(list(pool.map(small, range(len(self.keys)))))


def joined(a: Collection, b: Collection) -> Collection:
    """The images of `a`, then those of `b`."""
    pairs = ((a.features, b.features), (a.labels, b.labels), (a.subjects, b.subjects))
    return Collection(a.sources + b.sources, *map(np.concatenate, pairs))
