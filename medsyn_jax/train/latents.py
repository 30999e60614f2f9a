"""Shards with the latents of their images, for a training that need not encode them each time.

At 512 pixels the encoder of an autoencoder takes about half as long as the U-Net's whole training
step. The text encoder takes 2 % of it, so its states are not kept.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
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
from medsyn_jax.data.store import directory, shards

BATCH = 8  # images a device


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
    to, first = root / f"{folder.name}-latents-{digest[:8]}", jax.process_index() == 0
    with log.full_disk_is_user_error(to), directory.only_writer(to) if first else nullcontext():
        if first:
            directory.accept(to, digest, settings, "the images or the autoencoder")
        meshes.wait_for_all(f"latents of {folder.name}")
        if not directory.is_complete(to, digest):
            mesh = Mesh(np.array(jax.local_devices()), ("data",))
            run = jax.jit(encode, in_shardings=(None, NamedSharding(mesh, P("data"))))
            parts = [(name, *part) for name, part in _parts(info).items()]
            own = parts[jax.process_index() :: jax.process_count()]
            own = [part for part in own if shards.finished(to / part[0]) is None]
            title = f"latents of {escape(folder.name)}, shards"
            quiet = not first or not log.console.is_terminal
            for name, split, rows in track(own, title, console=log.console, disable=quiet):
                source = shards.open_split(folder, split)
                made = _examples(source, rows, lambda x: run(params, x), mesh.size * BATCH, size)
                shards.write_shard(to / name, split, made, info["label_names"])
            meshes.wait_for_all(f"latents of {folder.name} written")
            if first:
                whole = [s for name, *_ in parts if (s := shards.finished(to / name)) is not None]
                more = {"source": info["source"], "fingerprint": digest, "settings": settings}
                directory.finish(to, whole, info["label_names"], [], more | {"left_out": {}})
    meshes.wait_for_all(f"latents of {folder.name} found")
    return to


def _parts(info: dict[str, Any]) -> dict[str, tuple[str, range]]:
    """Of each shard its split, and the rows of the split that it holds."""
    parts, seen = {}, dict.fromkeys(info["splits"], 0)
    for name, file in info["files"].items():
        split = next(s for s in seen if f"-{s}.array_record-" in name)
        parts[name] = (split, range(seen[split], seen[split] + file["records"]))
        seen[split] += file["records"]
    return parts


def _examples(
    source: shards.Records,
    rows: range,
    encode: Callable[[np.ndarray], jax.Array],
    batch: int,
    size: int,
) -> Iterator[dict[str, Any]]:
    for start in range(rows.start, rows.stop, batch):
        records = [source[row] for row in range(start, min(start + batch, rows.stop))]
        pixels = [r["image"] for r in records]
        fits = [x if x.shape == (size, size) else decode.square(x, size) for x in pixels]
        found = np.asarray(encode(np.resize(np.stack(fits), (batch, size, size))), np.float16)
        for record, latents in zip(records, found, strict=False):
            packed = {
                name: decode.encode_png(value) if shards.is_image(name) else value
                for name, value in record.items()
            }
            yield packed | {"latents": latents}
