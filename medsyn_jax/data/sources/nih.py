"""The source `nih`: ChestX-ray14 (Wang et al. 2017) in its own layout."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, check_box, key_of

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Effusion",
    "Emphysema",
    "Fibrosis",
    "Hernia",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pleural_Thickening",
    "Pneumonia",
    "Pneumothorax",
)
_SPELLINGS = {"Infiltrate": "Infiltration"}  # in the table of boxes
_ADVICE = "move the others away"

Boxes = dict[str, list[tuple[str, float, float, float, float]]]  # by image

make = records.make


def list_items(config: Any) -> Listing:
    """All images with labels and the official split, or the images with boxes alone.

    `config.path` holds `Data_Entry_2017*.csv`, `train_val_list*.txt`, `test_list*.txt`, and the
    images below, such as in `images_001/images/`. Validation is drawn from train.

    Boxes were drawn on 880 images, and not for all their labels. That a radiograph has no box says
    nothing of the others, so records have none, unless `config.nih.boxes` lists those 880 images
    alone, by `BBox_List_2017*.csv`.

    Raises:
      UserError: a table, list or folder is missing, broken or there several times, or an image is
        in both lists.
    """
    root = Path(config.path)
    entries, homes = files.only(root, "Data_Entry_2017*.csv", _ADVICE), _splits(root)
    images = files.images_below(root, (".png",), lambda stem: PurePosixPath(stem).name)
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    listed: set[str] = set()
    columns = ("Image Index", "Finding Labels", "Patient ID", "View Position")
    with tables.read(entries, columns) as (header, table):
        for number, row in table:
            try:
                fields = tables.fields(header, _evened(header, row))
                name, findings, patient, view = (fields[column].strip() for column in columns)
                image = images.get(PurePosixPath(name).stem, "")
                listed.add(PurePosixPath(name).stem)
                items.append(_item(name, findings, patient, view, homes, image))
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{entries}: row {number}: {error}"))
    unknown = len({key_of(name) for name in homes} - {item.key for item in items})
    notes = [f"{unknown} images of the lists have no usable row in {entries}"] if unknown else []
    others = len(images.keys() - listed)
    dropped = {files.NOT_IN_TABLE: others} if others else {}
    listing = Listing(items, LABELS, rejects, dropped, notes)
    return _with_boxes(listing, root) if config.get("nih", {}).get("boxes") else listing


def _item(
    name: str, findings: str, patient: str, view: str, homes: Mapping[str, str], image: str
) -> Item:
    if not (name and findings and patient):
        raise RejectedRecord("Image Index, Finding Labels or Patient ID is empty")
    if not image:
        raise RejectedRecord(f"there is no image {shortened(name)} in the folder")
    if name not in homes:
        raise RejectedRecord(f"{shortened(name)} is neither in the list of train nor of test")
    positive = {finding.strip() for finding in findings.split("|")} - {"No Finding"}
    if "No Finding" in findings and positive:
        raise RejectedRecord(f"{shortened(findings)!r} is both no finding and a finding")
    for finding in positive:
        _known(finding)
    labels = tuple(POSITIVE if label in positive else NEGATIVE for label in LABELS)
    view = view if view in ("PA", "AP") else ""
    return Item(key_of(name), patient, homes[name], image, labels=labels, view=view)


def _known(finding: str) -> str:
    finding = _SPELLINGS.get(finding.strip(), finding.strip())
    if finding not in LABELS:
        raise RejectedRecord(f"{shortened(finding)!r} is not one of the 14 labels")
    return finding


def _splits(root: Path) -> dict[str, str]:
    """Image -> train or test."""
    homes: dict[str, str] = {}
    for split, pattern in (("train", "train_val_list*.txt"), ("test", "test_list*.txt")):
        path = files.only(root, pattern, _ADVICE)
        for number, name in tables.lines(path):
            if homes.setdefault(name, split) != split:
                where = f"{path}: line {number}"
                raise UserError(f"broken lists: {where}: {shortened(name)} is in both lists")
    return homes


def _evened(header: Sequence[str], row: list[str]) -> list[str]:
    """A row as long as the head line, where they differ by the comma at the end of one."""
    if not header[-1] and len(row) == len(header) - 1:
        return [*row, ""]
    return row[:-1] if len(row) == len(header) + 1 and not row[-1] else row


def _with_boxes(listing: Listing, root: Path) -> Listing:
    """The listing of the images that have boxes."""
    path = files.only(root, "BBox_List_2017*.csv", _ADVICE)
    boxes: Boxes = {}
    broken: dict[str, str] = {}
    rejects = [*listing.rejects]
    keys = {item.key for item in listing.items}
    # The head line has nine fields, as `Bbox [x,y,w,h]` is not in quotes, and a row six.
    with tables.read(path, ("Image Index", "Finding Label")) as (_, table):
        for number, row in table:
            where = f"{path}: row {number}"
            key = key_of(row[0].strip())
            try:
                box = _box(row)
            except RejectedRecord as error:
                broken.setdefault(key, f"{where}: {error}")
                continue
            boxes.setdefault(key, []).append(box)
            if key not in keys:
                rejects.append((f"box-{number}", f"{where}: {row[0]}: no usable image"))
    rejects += broken.items()
    items = [
        dataclasses.replace(item, boxes=tuple(boxes[item.key]))
        for item in listing.items
        if item.key in boxes and item.key not in broken
    ]
    without = len(keys - boxes.keys() - broken.keys())
    dropped = listing.dropped | ({"images without a box": without} if without else {})
    return dataclasses.replace(listing, items=items, rejects=rejects, dropped=dropped)


def _box(row: Sequence[str]) -> tuple[str, float, float, float, float]:
    if len(row) < 6 or any(row[6:]):
        raise RejectedRecord("is not image, label, x, y, width and height")
    left, top, width, height = (tables.number(cell, "x, y, w, h") for cell in row[2:6])
    box = (left, top, left + width, top + height)
    check_box(*box)
    return _known(row[1]), *box
