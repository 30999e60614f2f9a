"""Shards with the latents of their images, for a training that need not encode them each time.

At 512 pixels the encoder of an autoencoder takes about half as long as the U-Net's whole training
step. The text encoder takes 2 % of it, so its states are not kept.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.markup import escape
from rich.progress import track

from medsyn_jax.core import log
from medsyn_jax.core import mesh as meshes
from medsyn_jax.data.images import decode
from medsyn_jax.data.store import build, schema, shards, writer
from medsyn_jax.data.store.build import Part, Plan

BATCH = 8  # images a device


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A record of the set that is copied."""

    records: shards.Records
    index: int

    @property
    def key(self) -> str:
        """Of the record and of its copy."""
        return self.records.keys[self.index]

    @property
    def subject(self) -> str:
        """Of the record and of its copy."""
        return self.records.subjects()[self.index]


def precompute(
    folder: Path,
    root: Path,
    encode: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    made_by: str,
    size: int,
) -> Path:
    """A copy of the shards in `folder`, below `root`, whose records have `latents`.

    encode: (params, uint8 images [b, size, size]) -> [b, p, q, 2 z], mean and log-variance.
    made_by: tells the autoencoder from others. Each process writes its share of the shards on its
    own devices; a run that was cut off is completed.
    """
    info = shards.describe(folder)
    settings = {"of": info["fingerprint"], "autoencoder": made_by, "size": size}
    digest = hashlib.sha256(repr((shards.FORMAT, settings)).encode()).hexdigest()
    to = root / f"{folder.name}-latents-{digest[:8]}"
    plan = Plan(
        parts=_parts(folder, info),
        label_names=info["label_names"],
        source=info["source"],
        settings=settings,
        fingerprint=digest,
        others="the images or the autoencoder",
    )

    def make(parts: Sequence[Part]) -> None:
        mesh = Mesh(np.array(jax.local_devices()), ("data",))
        run = jax.jit(encode, in_shardings=(None, NamedSharding(mesh, P("data"))))
        todo = [part for part in parts if part.finished(to) is None]
        title = f"latents of {escape(folder.name)}, shards"
        quiet = jax.process_index() > 0 or not log.console.is_terminal
        for part in track(todo, title, console=log.console, disable=quiet):
            records = _records(part.items, lambda x: run(params, x), mesh.size * BATCH, size)
            writer.write_shard(to / part.name, records, plan.label_names)

    build.write(to, plan, make, jax.process_index(), jax.process_count(), meshes.wait_for_all)
    return to


def _parts(folder: Path, info: dict[str, Any]) -> list[Part]:
    """A part for each shard of the set in `folder`, with the same records."""
    opened = {s: shards.open_split(folder, s) for s, n in info["splits"].items() if n["records"]}
    parts, starts = [], dict.fromkeys(info["splits"], 0)
    for name, file in info["files"].items():
        split = shards.split_of(name)
        start = starts[split]
        starts[split] += file["records"]
        rows = [Row(opened[split], index) for index in range(start, starts[split])]
        parts.append(Part(name, split, rows))
    return parts


def _records(
    rows: Sequence[Row],
    encode: Callable[[np.ndarray], jax.Array],
    batch: int,
    size: int,
) -> Iterator[dict[str, Any]]:
    for start in range(0, len(rows), batch):
        records = [row.records[row.index] for row in rows[start : start + batch]]
        pixels = [r["image"] for r in records]
        fits = [x if x.shape == (size, size) else decode.square(x, size) for x in pixels]
        moments = np.asarray(encode(np.resize(np.stack(fits), (batch, size, size))), np.float16)
        for record, latents in zip(records, moments, strict=False):
            packed = {
                name: decode.encode_png(value) if schema.is_image(name) else value
                for name, value in record.items()
            }
            yield packed | {"latents": latents}
