"""Small sources of image-report pairs on disk, for the tests of ingestion and loading."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs.ingest import get_config


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
