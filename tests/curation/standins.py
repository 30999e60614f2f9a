"""Stand-ins for generated sets: records made here, or those of another set changed."""

import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from medsyn_jax.data.images.decode import encode_png
from tests.data import conftest

Record = dict[str, Any]


def write_set(
    folder: Path, records: Mapping[str, Iterable[Record]], label_names: list[str]
) -> Path:
    """A whole set, one shard a split, of records as `shards.Records` gives them."""
    stored = {split: list(map(_stored, members)) for split, members in records.items()}
    conftest.write_set(folder, stored, label_names)
    return folder


def _stored(record: Record) -> Record:
    kept = {k: v for k, v in record.items() if not k.startswith(("mask_", "boxes"))}
    return kept | {"image": io.BytesIO(encode_png(record["image"]))}


def changed(
    source: Iterable[Record], change: Callable[[int, Record], Record], copies: int = 1
) -> list[Record]:
    """The records of `source`, `copies` of each with keys that end in #0, #1, ..., changed."""
    found = []
    for record in source:
        for copy in range(copies):
            key = f"{record['key']}#{copy}" if copies > 1 else record["key"]
            found.append(change(len(found), record | {"key": key}))
    return found


def report(bright: int, left: int) -> str:
    """What there is to say of an image of `tests.train.runs.write_pairs`."""
    return f"{'Bright' if bright else 'Dark'} image. {'Left' if left else 'No'} side bright."


def make(seed: int, count: int, size: int) -> list[Record]:
    """Images of the kind that `tests.train.runs.write_pairs` writes, of other subjects."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        bright, left = (int(b) for b in rng.integers(0, 2, 2))
        pixels = rng.integers(0, 90, (size, size)) + 90 * bright
        pixels[:, : size // 2] += 60 * left
        text = report(bright, left)
        found.append(
            {
                "key": f"made/{i:03d}",
                "subject": f"m{i // 2}",
                "image": pixels.astype(np.uint8),
                "report": text,
                "findings": "",
                "impression": text,
                "view": "",
                "labels": np.array([bright, left, 0], np.int8),
            }
        )
    return found
