"""Turns what a user names as data into a directory of shards."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from medsyn_jax.core.errors import UserError, shortened
from medsyn_jax.core.log import say
from medsyn_jax.data.sources import ingestion, plan, tables
from medsyn_jax.data.store import shards

_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")


def stored(path: Path) -> Path:
    """The shards in a directory: the folder itself, or `shards` in the workdir of a run."""
    inner = path / "shards"
    return inner if (inner / shards.INFO).exists() and not (path / shards.INFO).exists() else path


def check_labels(source: str, ingest_config: Any) -> None:
    """Raises UserError for a CSV of which no label column is named, with the columns that look
    like labels: before anything is ingested."""
    if not source.lower().endswith(_TABLES) or any(ingest_config.pairs.labels):
        return
    with tables.read(Path(source), ()) as (header, table):
        values: dict[str, set[str]] = {name: set() for name in header if name}
        for _, row in table:
            for name, cell in zip(header, row, strict=False):
                if name in values and cell.strip() in tables.LABEL_VALUES:
                    values[name].add(cell.strip())
                else:
                    values.pop(name, None)
    likely = ", ".join(name for name, cells in values.items() if len(cells) > 1)
    looks = f"these look like labels: {shortened(likely, 300)}" if likely else "none looks like one"
    raise UserError(
        "config.ingest.pairs.labels: is empty: name the columns of 1, 0, -1 or nothing that "
        "any run is to learn, since others are another set, for which all images are read again "
        "(a classification chooses among them by config.labels.names); of those of "
        f"{source} {looks}"
    )


def prepare(source: str, ingest_config: Any, root: Path | str) -> Path:
    """The shard directory for `source`, ingested first if need be.

    Args:
        source: 'phantom', the path of a CSV of pairs, a directory of shards or the workdir of the
            run that wrote them, or a folder of images in the layout that `ingest_config.source`
            names.
        ingest_config: how to ingest (`config.ingest`); not changed. Its `path` is `source`.
        root: where ingested sets are kept, as <name>-<fingerprint>; the same source and settings
            find the same directory again.

    Raises:
        UserError: when it is none of these, or cannot be ingested (`ingestion.ingest`).
    """
    path, config = Path(source), ConfigDict(ingest_config.to_dict())
    if source == "phantom":
        config.source, config.path, name = "phantom", "", "phantom"
    elif path.is_dir():
        home = stored(path)
        if config.source in ("phantom", "pairs") or (home / shards.INFO).exists():
            shards.describe(home)
            return home
        config.path, name = source, path.name
    elif not path.exists():
        raise UserError(
            f"data: {source}: no such file or directory: give 'phantom', a CSV or shards"
        )
    elif path.name.lower().endswith(_TABLES):
        config.source, config.path = "pairs", str(path)
        name = re.sub(r"\W+", "_", path.name.split(".")[0]).strip("_") or "pairs"
    else:
        raise UserError(f"data: {source}: is neither a CSV nor a directory of shards")
    todo = plan.make_plan(config)
    directory = Path(root) / f"{name}-{todo.fingerprint[:8]}"
    others = [d for d in sorted(Path(root).glob(f"{name}-{'?' * 8}")) if d != directory]
    if not directory.exists():
        directory = next(filter(todo.of_earlier_version, others), directory)
    if others and not directory.exists():
        kept = shortened(", ".join(d.name for d in others), 300)
        say(
            f"ingest: a set beside {kept} in {root}, of other settings, source or version: delete "
            "what no run needs"
        )
    return ingestion.ingest(config, directory, todo)
