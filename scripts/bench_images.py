"""Measure how many images a second this checkout and another one turn into records, in turns.

    python scripts/bench_images.py OTHER_CHECKOUT [--rounds 10] [--size 256]

Prints a table: for each file format the rate of this checkout, the rate of the other, and their
ratio (above 1: this checkout is faster). Both checkouts read the same files, from the row of the
table to the stored PNG, each in its own process on one core. A rate counts processor time and is
that of the fastest image of all rounds, since other programs can only slow it down.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIDES = (1200, 1000)
SECONDS = 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", help="the other checkout of this repository")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=256, help="side of the stored images in pixels")
    parser.add_argument("--files", help=argparse.SUPPRESS)  # the child process
    options = parser.parse_args()
    if options.files:
        print(json.dumps(rates(Path(options.files), options.size)))
        return
    here = str(Path(__file__).resolve().parents[1])
    results: dict[str, list[dict[str, float]]] = {here: [], options.other: []}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for round_ in range(options.rounds):
            for checkout in sorted(results, reverse=bool(round_ % 2)):
                results[checkout].append(child(checkout, folder, options))
    print(f"{'images a second':24} {'this':>8} {'other':>8} {'ratio':>7}")
    for kind in results[here][0]:
        new, old = (max(rate[kind] for rate in results[c]) for c in (here, options.other))
        print(f"{kind:24} {new:8.1f} {old:8.1f} {new / old:7.3f}")


def child(checkout: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, checkout, "--files", folder, "--size", str(options.size)]
    environment = {**os.environ, "PYTHONPATH": checkout, "OMP_NUM_THREADS": "1"}
    return json.loads(
        subprocess.run(command, env=environment, check=True, capture_output=True).stdout
    )


def rates(folder: Path, size: int) -> dict[str, float]:
    from configs.ingest import get_config
    from medsyn_jax.data.sources import pairs

    config = get_config("pairs").ingest
    config.update({"path": str(folder / "pairs.csv"), "size": size})
    fastest = {}
    for item in pairs.list_items(config).items:
        times, start = [], time.process_time()
        while len(times) < 2 or sum(times) < SECONDS:
            pairs.make(item, config)
            times.append(time.process_time() - start)
            start += times[-1]
        fastest[Path(str(item.image)).stem] = 1 / min(times)
    return fastest


def write(folder: Path) -> None:
    """Write a smooth 12-bit image with noise in every format, and a table that lists the files."""
    from openjpeg.utils import encode_array
    from PIL import Image
    from pydicom import uid

    y, x = np.mgrid[: SIDES[0], : SIDES[1]] / 1000
    noise = np.random.default_rng(0).normal(0, 20, SIDES)
    deep = np.clip(2000 + 1500 * np.sin(3 * x) * np.cos(2 * y) + noise, 0, 4095).astype(np.uint16)
    grey = (deep >> 4).astype(np.uint8)
    Image.fromarray(grey).save(folder / "PNG, 8 bit.png")
    Image.fromarray(deep).save(folder / "PNG, 16 bit.png")
    Image.fromarray(grey).save(folder / "JPEG.jpg", quality=90)
    frame = encode_array(deep, bits_stored=12)
    dicom(folder / "DICOM, raw, window.dcm", deep, WindowCenter=2048, WindowWidth=4096)
    dicom(folder / "DICOM, raw, no window.dcm", deep, PhotometricInterpretation="MONOCHROME1")
    dicom(folder / "DICOM, JPEG 2000.dcm", deep, uid.JPEG2000Lossless, frame)
    names = sorted(path.name for path in folder.iterdir())
    rows = [f'"{name}",The lungs are clear.' for name in names]
    (folder / "pairs.csv").write_text("\n".join(["image,report", *rows]) + "\n")


def dicom(path: Path, pixels: np.ndarray, syntax=None, frame: bytes = b"", **fields) -> None:
    from pydicom import uid
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax or uid.ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = uid.ComputedRadiographyImageStorage
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid()
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelData = encapsulate([frame]) if frame else pixels.tobytes()
    data["PixelData"].is_undefined_length = bool(frame)
    for name, value in fields.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)


if __name__ == "__main__":
    main()
