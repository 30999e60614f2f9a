"""Evaluation of a pre-training run on a whole split: validation loss and retrieval."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from medsyn_jax.core import metrics
from medsyn_jax.data.loading import loader
from medsyn_jax.models.towers import Embeddings
from medsyn_jax.train import frozen
from medsyn_jax.train.state import State


@dataclass(frozen=True)
class Evaluation:
    """Figures of a state on a split.

    Attributes:
        config: of the run; `loss`, `heads.local`, `data.batch_size` and `data.threads` count.
        embed: (params, stats, batch) -> Embeddings of unit norm, replicated.
        loss: (embeddings, None, **config.loss) -> (loss, metrics).
        similarity: (embeddings, config.loss) -> [n, n] by regions and words, or None.
        mesh: the devices.
    """

    config: Any
    embed: Callable[..., Embeddings]
    loss: Callable[..., tuple]
    similarity: Callable[[Embeddings, Any], jax.Array] | None
    mesh: Mesh

    def embeddings(self, state: State, source: loader.Source) -> Embeddings:
        """NumPy embeddings of all records on every process, with the prototypes of the state."""
        settings = self.config.data
        embeddings = frozen.over(
            lambda batch: self.embed(state["params"], state["stats"], batch),
            source,
            self.mesh,
            settings.batch_size,
            settings.threads,
        )
        return embeddings._replace(prototypes=state["params"].get("prototypes"))

    def validate(self, state: State, source: loader.Source) -> Mapping[str, float]:
        """Validation loss and recall@1 in both directions.

        The loss is of the whole split at once; with regions and words, the mean over batches.
        """
        c, e = self.config, self.embeddings(state, source)
        count, size = len(e.image), c.data.batch_size if c.heads.local else len(e.image)
        starts = range(0, max(count - size, 0) + 1, size)  # whole batches, or all
        losses = [self.loss(_rows(e, slice(i, i + size)), None, **c.loss)[0] for i in starts]
        scores = np.asarray(e.image) @ np.asarray(e.text).T
        figures = metrics.retrieval(scores, np.array(source.texts()), ks=(1,), resamples=1)
        names = ("image_to_text/recall@1", "text_to_image/recall@1")
        return {"valid/loss": float(np.mean(jax.device_get(losses)))} | {
            f"valid/{name}": float(figures[name]["value"] or 0) for name in names
        }

    def retrieval(self, state: State, source: loader.Source) -> dict[str, dict[str, Any]]:
        """Figures of retrieval by whole images and reports.

        With a similarity of regions and words also by this ("local/"), and by the mean of both,
        each standardized over the images ("mixed/").
        """
        e, c = self.embeddings(state, source), self.config
        texts, subjects = np.array(source.texts()), np.array(source.subjects())
        scores = {"": np.asarray(e.image) @ np.asarray(e.text).T}
        if self.similarity is not None:
            size = c.data.batch_size  # all regions of MIMIC-CXR's test split take 6 GB
            parts = (_with_regions(e, slice(i, i + size)) for i in range(0, len(texts), size))
            scores["local/"] = np.concatenate([self.similarity(part, c.loss) for part in parts])
            both = [(x - x.mean(0)) / np.maximum(x.std(0), 1e-12) for x in scores.values()]
            scores["mixed/"] = np.mean(both, 0)
        return {
            f"{kind}{name}": figure
            for kind, values in scores.items()
            for name, figure in metrics.retrieval(values, texts, subjects).items()
        }


def _rows(e: Embeddings, rows: slice) -> Embeddings:
    """Embeddings of some of the records, on the device."""
    chosen = jax.tree.map(lambda x: jnp.asarray(x[rows]), e._replace(prototypes=None))
    return chosen._replace(prototypes=e.prototypes)


def _with_regions(e: Embeddings, rows: slice) -> Embeddings:
    """Embeddings with the regions of some images and all words."""
    assert e.local is not None
    return e._replace(local=e.local._replace(regions=e.local.regions[rows]))
