"""The source `siim`: SIIM-ACR Pneumothorax Segmentation (Kaggle 2019), stage 1 or 2."""

from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, key_of, runs_of

SIDE = 1024  # pixels of every image and mask

make = records.make


def list_items(config: Any) -> Listing:
    """The images of `train-rle.csv` (stage 1), or else of `stage_2_train.csv`, in `config.path`.

    The DICOM files lie anywhere below, in stage 1 each in two folders of its own
    (`dicom-images-train/<study>/<series>/<ImageId>.dcm`). The field `mask_pneumothorax` is the
    union of an image's rows, and empty for -1. An image with an unusable row is rejected: its mask
    would lack a part. The set names no patients, so every image is a subject, and it has no split.

    Raises:
      UserError: the folder or the table is missing, or the table is broken.
    """
    root = Path(config.path)
    path = files.table_in(root, "train-rle.csv", "stage_2_train.csv")
    rejects: dict[str, str] = {}
    encoded = tables.grouped(path, "ImageId", ("EncodedPixels",), _runs, rejects)
    images = files.images_below(root, (".dcm",), lambda stem: PurePosixPath(stem).name)
    items: list[Item] = []
    for name, rows in encoded.items():
        image = images.pop(name, "")
        if name in rejects:
            continue
        if len({bool(runs) for runs in rows}) > 1:
            what = f"ImageId {shortened(name)}"
            rejects[name] = f"{path}: {what} has a mask in one row, and -1 in another"
        elif not image:
            rejects[name] = f"{path}: there is no {shortened(name)}.dcm below {root}"
        else:
            runs = [run for row in rows for run in row]
            labels = (POSITIVE if runs else NEGATIVE,)
            masks = (("mask_pneumothorax", runs_of(SIDE, SIDE, runs)),)
            items.append(Item(key_of(name), name, None, image, labels=labels, masks=masks))
    return Listing(
        items,
        ("Pneumothorax",),
        [(key_of(name), reason) for name, reason in rejects.items()],
        {files.NOT_IN_TABLE: len(images)} if images else {},
        [
            f"masks and labels are those of {path}",
            "siim does not name patients: every image is a subject of its own",
        ],
    )


def _runs(fields: dict[str, str]) -> list[tuple[int, int]]:
    """(first pixel, pixel behind the last) of each run, counted down the columns; [] for -1.

    A run is two numbers: pixels since the end of the run before, and its length.
    """
    text = fields["EncodedPixels"].strip()
    if text == "-1":
        return []
    try:
        numbers = [int(number) for number in text.split()]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2 or min(numbers) < 0 or not any(numbers[1::2]):
        what = f"EncodedPixels {shortened(text)!r}"
        raise RejectedRecord(f"{what}: expected -1, or pairs of numbers from 0: gap and length")
    ends = [*accumulate(numbers)]
    if ends[-1] > SIDE * SIDE:
        raise RejectedRecord(f"EncodedPixels: the runs leave the mask of {SIDE} x {SIDE} pixels")
    return [*zip(ends[::2], ends[1::2], strict=True)]
