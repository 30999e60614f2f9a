"""Small sources of image-report pairs on disk, for the tests of ingestion and loading."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.data.store import build, writer
from medsyn_jax.data.store.items import Item


@pytest.fixture
def make_pairs(tmp_path) -> Callable[..., ConfigDict]:
    """make_pairs(count=24, size=16, **settings) -> the ingest config of a new CSV of noise images.

    Two records a subject; the label 'odd' says whether the record's number is odd.
    """

    def make(count: int = 24, size: int = 16, name: str = "table", **settings) -> ConfigDict:
        folder = tmp_path / name
        (folder / "img").mkdir(parents=True)
        rng = np.random.default_rng(count)
        rows = []
        for i in range(count):
            pixels = rng.integers(0, 256, (size, size), np.uint8)
            Image.fromarray(pixels).save(folder / "img" / f"{i:03d}.png")
            report = f"FINDINGS: The lungs of number {i} are clear.\nIMPRESSION: No finding {i}."
            rows.append([f"img/{i:03d}.png", report, f"p{i // 2}", str(i % 2)])
        write_rows(folder / "pairs.csv", rows)
        config = get_config("pairs").ingest
        config.path = str(folder / "pairs.csv")
        config.update({"size": size, "records_per_shard": 5, "workers": 1})
        config.pairs.update({"subject": "subject", "labels": ("odd",)})
        config.update(settings)
        return config

    return make


def write_rows(path: Path, rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "report", "subject", "odd"), *rows])


def write_set(
    directory: Path, records: Mapping[str, Sequence[dict[str, Any]]], label_names: Sequence[str]
) -> list[writer.Shard]:
    """A whole set, one shard a split, of records by split, with images as PNG bytes."""
    items = {s: [Item(r["key"], r["subject"], s, "") for r in rs] for s, rs in records.items()}
    parts = build.divide("made", items, max(map(len, items.values())))
    written = []

    def make(todo: Sequence[build.Part]) -> None:
        for part in todo:
            path = directory / part.name
            written.append(writer.write_shard(path, records[part.split], label_names))

    build.write(directory, build.Plan(parts, label_names, "made", {}, str(directory), "-"), make)
    return written
