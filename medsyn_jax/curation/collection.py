"""A set of images with all that curation asks of it, over one split or several."""

import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from medsyn_jax.data.images import decode
from medsyn_jax.data.loading import loader
from medsyn_jax.data.store import shards

SMALL = 32  # pixels of the images that are compared as such


@dataclass
class Collection:
    """Splits of a set, one after the other, as one: n images."""

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
        """bool [n]: not of the training split; all of them where there are no others."""
        found = np.array([s.records.split != "train" for s in self.sources for _ in range(len(s))])
        return found if found.any() else ~found

    def only_held_out(self) -> "Collection":
        """The images of `held_out`."""
        rows, starts = self.held_out, self.mixture.offsets[:-1].tolist()
        sources = [s for s, start in zip(self.sources, starts, strict=True) if rows[start]]
        return Collection(sources, self.features[rows], self.labels[rows], self.subjects[rows])

    @functools.cached_property
    def _written(self) -> dict[str, np.ndarray]:
        """All that is written of the records, in one pass over them."""
        found: dict[str, list[str]] = {"text": [], "prompt": [], "report": []}
        for row in range(len(self.keys)):
            stored = self.stored(row)
            text = shards.text(stored, self.sources[0].sections)
            found["text"].append(text)
            found["prompt"].append(shards.value(stored, "prompt") if "prompt" in stored else text)
            found["report"].append(shards.value(stored, "report"))
        return {name: np.array(values) for name, values in found.items()}

    @property
    def texts(self) -> np.ndarray:
        """What the text encoder reads, str [n]."""
        return self._written["text"]

    @property
    def prompts(self) -> np.ndarray:
        """What the generator read where that was kept, else `texts`, str [n]."""
        return self._written["prompt"]

    @property
    def reports(self) -> np.ndarray:
        """The whole reports, as they came, str [n]."""
        return self._written["report"]

    def stored(self, row: int) -> Mapping[str, Any]:
        """The stored fields of a record, to be decoded by `shards.value`."""
        at = int(np.searchsorted(self.mixture.offsets, row, "right")) - 1
        return self.sources[at].records.features(row - int(self.mixture.offsets[at]))

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
    """Both, one after the other."""
    both = ((getattr(x, name) for x in (a, b)) for name in ("features", "labels", "subjects"))
    return Collection(a.sources + b.sources, *(np.concatenate(list(x)) for x in both))
