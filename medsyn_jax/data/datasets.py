"""From what a user names as data to a directory of shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medsyn_jax.core.errors import UserError
from medsyn_jax.data import ingestion, plan, shards


def prepare(source: str, ingest_config: Any, root: Path | str) -> Path:
    """The shard directory for `source`, ingested first if need be.

    Args:
        source: 'phantom', the path of a CSV of pairs, or a directory of shards.
        ingest_config: how to ingest the first two (`config.ingest`); its `source` and `path` are
            set here. The caller's is left unchanged.
        root: where ingested sets are kept, as <name>-<fingerprint>; the same source and settings
            find the same directory again.

    Raises:
        UserError: when it is none of the three, or cannot be ingested (`ingestion.ingest`).
    """
    path = Path(source)
    if source != "phantom" and not path.exists():
        raise UserError(
            f"data: {source}: no such file or directory: give 'phantom', a CSV or shards"
        )
    if path.is_dir() and source != "phantom":
        shards.describe(path)
        return path
    config = ConfigDict(ingest_config.to_dict())
    if source == "phantom":
        config.source, config.path, name = "phantom", "", "phantom"
    elif path.name.lower().endswith((".csv", ".csv.gz", ".tsv")):
        config.source, config.path = "pairs", str(path)
        name = re.sub(r"\W+", "_", path.name.split(".")[0]).strip("_") or "pairs"
    else:
        raise UserError(f"data: {source}: is neither a CSV nor a directory of shards")
    todo = plan.make_plan(config)
    return ingestion.ingest(config, Path(root) / f"{name}-{todo.fingerprint[:8]}", todo)
