"""The shards of a run: made by the first process where they are not there, and found by all."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from medsyn_jax.core import mesh as meshes
from medsyn_jax.data import datasets, ingestion, shards, tokenizers


def prepare(source: str, ingest: Any, root: Path, name: str = "source") -> Path:
    """The directory of shards of `source`, below `root` if they had to be made.

    source: as of `datasets.prepare`, or a folder of class folders where `ingest.source` says
    "folder". Only the first process looks at it: the others need to see the shards alone. name:
    tells the sources of a run apart. Raises UserError as `datasets.prepare`, on the first process.
    """
    found = str(_prepare(source, ingest, root)) if jax.process_index() == 0 else ""
    return Path(meshes.from_first(found, name))


def check_labels(source: str, ingest: Any) -> None:
    """`datasets.check_labels`, on the process that reads the source."""
    if jax.process_index() == 0 and ingest.source != "folder":
        datasets.check_labels(source, ingest)


def _prepare(source: str, ingest: Any, root: Path) -> Path:
    path = Path(source)
    if ingest.source != "folder" or (datasets.stored(path) / shards.INFO).exists():
        return datasets.prepare(source, ingest, root)
    settings = ConfigDict(ingest.to_dict())
    settings.path = source
    plan = ingestion.make_plan(settings)
    return ingestion.ingest(settings, root / f"{path.name}-{plan.fingerprint[:8]}", plan)


def tokenizer(own: Path, shards_of: Path, sections: Sequence[str], size: int, length: int) -> Path:
    """The folder `own` of a WordPiece of `size` pieces, trained once on the training reports of
    `shards_of`; other programs that open it cut texts at `length` tokens."""
    if jax.process_index() == 0 and not own.exists():
        texts = shards.open_split(shards_of, "train").texts(sections)
        part = own.with_name(f".{own.name}.{os.getpid()}.tmp")  # never a folder half written
        tokenizers.train_wordpiece(texts, size, part)
        path = part / "tokenizer_config.json"
        config = json.loads(path.read_text()) | {"model_max_length": length}
        path.write_text(json.dumps(config, indent=2) + "\n")
        part.rename(own)
    meshes.wait_for_all("tokenizer")
    return own
