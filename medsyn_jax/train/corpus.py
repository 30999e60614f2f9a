"""The shards of a run: made by the first process where they are not there, and found by all."""

from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from medsyn_jax.core import mesh as meshes
from medsyn_jax.data import datasets, ingestion, shards


def prepare(source: str, ingest: Any, root: Path, name: str = "source") -> Path:
    """The directory of shards of `source`, below `root` if they had to be made.

    source: as of `datasets.prepare`, or a folder of class folders where `ingest.source` says
    "folder". Only the first process looks at it: the others need to see the shards alone. name:
    tells the sources of a run apart. Raises UserError as `datasets.prepare`, on the first process.
    """
    found = str(_prepare(source, ingest, root)) if jax.process_index() == 0 else ""
    return Path(meshes.from_first(found, name))


def _prepare(source: str, ingest: Any, root: Path) -> Path:
    path = Path(source)
    if ingest.source != "folder" or (path / shards.INFO).exists():
        return datasets.prepare(source, ingest, root)
    settings = ConfigDict(ingest.to_dict())
    settings.path = source
    plan = ingestion.make_plan(settings)
    return ingestion.ingest(settings, root / f"{path.name}-{plan.fingerprint[:8]}", plan)
