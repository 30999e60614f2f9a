"""The source `rsna`: RSNA Pneumonia Detection Challenge (Kaggle 2018), stage 2."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, Runs, key_of, runs_of

OPACITY = "Lung Opacity"  # the class with Target 1, the challenge's pneumonia
CLASSES = (OPACITY, "No Lung Opacity / Not Normal", "Normal")
SIDE = 1024  # pixels of every image

_LABELS, _CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
_BOX = ("x", "y", "width", "height")

Box = tuple[str, float, float, float, float]


def list_items(config: Any) -> Listing:
    """The images of `stage_2_train_labels.csv` and `stage_2_detailed_class_info.csv`.

    Both tables are in `config.path`, and `<patientId>.dcm` anywhere below. The labels are one-hot
    over CLASSES; the published figures are those of Lung Opacity alone. An image is rejected if one
    of its rows is unusable, if it has no row in a table, or if the tables contradict each other.
    The set brings no split, and an id for each image, but none for the patients behind them.

    Raises:
      UserError: the folder or a table is missing, or a table is broken.
    """
    root = Path(config.path)
    rejects: dict[str, str] = {}
    targets = tables.grouped(root / _LABELS, "patientId", ("Target", *_BOX), _box, rejects)
    classes = tables.grouped(root / _CLASSES, "patientId", ("class",), _class, rejects)
    images = files.images_below(root, (".dcm",), lambda stem: PurePosixPath(stem).name)
    items: list[Item] = []
    for name in dict.fromkeys((*targets, *classes)):
        image = images.pop(name, "")
        if name in rejects:
            continue
        try:
            if not image:
                raise RejectedRecord("there is no .dcm file of this name in the folder")
            own_class, boxes = _joined(classes.get(name, []), targets.get(name, []))
        except RejectedRecord as error:
            rejects[name] = f"{root}: patientId {shortened(name)}: {error}"
            continue
        labels = tuple(POSITIVE if own_class == each else NEGATIVE for each in CLASSES)
        items.append(Item(key_of(name), name, None, image, labels=labels, boxes=boxes))
    return Listing(
        items,
        CLASSES,
        [(key_of(name), reason) for name, reason in rejects.items()],
        {files.NOT_IN_TABLE: len(images)} if images else {},
        ["rsna has an id of each image, none of patients: every image is a subject of its own"],
    )


def make(item: Item, config: Any) -> dict[str, Any]:
    """As `records.make`, with the field `mask_opacity`: the union of the filled boxes."""
    mask = ("mask_opacity", _filled(item.boxes or ()))
    return records.make(dataclasses.replace(item, masks=(mask,)), config)


def _joined(classes: Sequence[str], targets: Sequence[Box | None]) -> tuple[str, tuple[Box, ...]]:
    """Class and boxes of an image from its rows in both tables; raises RejectedRecord."""
    for rows, table in ((classes, _CLASSES), (targets, _LABELS)):
        if not rows:
            raise RejectedRecord(f"has no row in {table}")
    if len({*classes}) > 1 or len({box is None for box in targets}) > 1:
        raise RejectedRecord("its rows contradict each other in class or Target")
    boxes = tuple(box for box in targets if box)
    if bool(boxes) != (classes[0] == OPACITY):
        raise RejectedRecord(f"is {classes[0]!r} in {_CLASSES}, but has {len(boxes)} boxes")
    return classes[0], boxes


def _class(fields: dict[str, str]) -> str:
    name = fields["class"].strip()
    if name not in CLASSES:
        raise RejectedRecord(f"class {shortened(name)!r} is none of {', '.join(CLASSES)}")
    return name


def _box(fields: dict[str, str]) -> Box | None:
    """The box of a row with Target 1; None of one with Target 0."""
    target, *cells = (fields[name].strip() for name in ("Target", *_BOX))
    if target not in ("0", "1") or (target == "0" and any(cells)):
        raise RejectedRecord(f"Target is {shortened(target)!r}: expected 0 without a box, or 1")
    if target == "0":
        return None
    try:
        left, top, width, height = map(float, cells)
    except ValueError:
        left = top = width = height = math.nan
    if not math.isfinite(left + top + width + height):
        what = shortened(", ".join(cells))
        raise RejectedRecord(f"x, y, width, height are {what!r}: expected four numbers")
    return OPACITY, left, top, left + width, top + height


def _filled(boxes: Sequence[Box]) -> Runs:
    spans = []
    for _, *corners in boxes:
        left, top, right, bottom = (min(max(round(corner), 0), SIDE) for corner in corners)
        spans += [(x * SIDE + top, x * SIDE + bottom) for x in range(left, right)]
    return runs_of(SIDE, SIDE, spans)
