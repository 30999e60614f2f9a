"""The source `masks`: a user's own images and masks in parallel folders, boxes in a table."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import folder, names, records, tables
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, key_of
from medsyn_jax.data.store.splits import split_name

TABLE = "boxes.csv"
_CORNERS = ("left", "top", "right", "bottom")

make = records.make

Box = tuple[str, float, float, float, float]


def list_items(config: Any) -> Listing:
    """Images and masks of equal names below `path`, with or without folders of splits.

    Masks lie in folders called `masks`, `lung masks`, `seg` and the like (or are called
    `..._mask`), beside or in the folders of images: images/a.png and masks/a.png, or
    train/images/a.png and train/masks/a.png. `lung masks` become the field `mask_lungs`. An image
    that lacks a mask is left out, one with two masks of a kind rejected. The table `path`/boxes.csv
    (image, left, top, right, bottom and perhaps label; pixels; one row a box) gives boxes; an image
    without a row has none. The labels are those of the boxes. The subject is the stem, or what
    `config.masks.subject` finds in the path below `path`.

    Raises:
      UserError: no such folder, neither masks nor boxes, a broken table or expression.
    """
    root = folder.root_of(config)
    dropped: Counter[str] = Counter()
    notes: list[str] = []
    rejects: list[tuple[str, str]] = []
    subject_of = folder.subjects(config, notes)
    images, masks = folder.images_and_masks(folder.image_files(root, dropped))
    images = _parallel(images, masks)
    fields = sorted({f for image in images for f in masks.get(image.at, ()) if f[-1] != "_"})
    if not fields and not (root / TABLE).is_file():
        raise UserError(
            f"masks: {root}: {len(images)} images and {sum(map(len, masks.values()))} masks, none "
            f"of them of equal names, and no {TABLE}: expected images/NAME.png and masks/NAME.png"
        )
    items: list[Item] = []
    lacking: list[tuple[str, str]] = []  # (image, a field of masks)
    for image in images:
        own = masks.get(image.at, {})
        key, path = key_of(image.path), str(root / image.path)
        try:
            if missing := [field for field in fields if field not in own]:
                lacking.append((image.path, missing[0]))
                continue
            if double := [field for field in own if field[-1] == "_"]:
                raise RejectedRecord(f"has two masks, such as {own[double[0]]}: join them")
            subject = subject_of(image.path)
        except RejectedRecord as error:
            rejects.append((key, f"{path}: {error}"))
            continue
        split = next((name for name in image.place if split_name(name)), None)
        paths = tuple((field, str(root / own[field])) for field in fields)
        items.append(Item(key, subject, split, path, masks=paths))
    if fields:
        notes.append(f"{', '.join(fields)}: of {len(items)} images")
    if lacking:
        dropped["image without a mask"] = len(lacking)
        notes.append(
            f"{len(lacking)} of {len(images)} images lack a mask and are left out, such as "
            f"{shortened(lacking[0][0])} (no {lacking[0][1]}): where that means an empty mask, "
            "save a black image as the mask"
        )
    at = {image.at for image in images}
    if lone := sorted(p for place, own in masks.items() if place not in at for p in own.values()):
        dropped["mask without an image"] = len(lone)
        notes.append(f"{len(lone)} masks are of no image, such as {shortened(lone[0])}")
    label_names: tuple[str, ...] = ()
    if (root / TABLE).is_file():
        dropped["not a .jpg, .png or .dcm file"] -= 1
        items, label_names = _boxed(root / TABLE, items, images, rejects)
    return Listing(items, label_names, rejects, dict(+dropped), notes)


def _parallel(images: Sequence[folder.Image], masks: folder.Masks) -> list[folder.Image]:
    """The images without the folder that holds all of them, but no mask: `cxr/a.png` beside
    `masks/a.png`."""
    shared = set.intersection(*({*image.place} for image in images)) if images else set()
    shared -= {name for place, _ in masks for name in place}
    shared = {name for name in shared if not split_name(name)}
    return [replace(i, place=tuple(n for n in i.place if n not in shared)) for i in images]


def _boxed(
    path: Path,
    items: Sequence[Item],
    images: Sequence[folder.Image],
    rejects: list[tuple[str, str]],
) -> tuple[list[Item], tuple[str, ...]]:
    """The items with boxes and labels, and the names of the labels. Rows of no image become
    rejects, as do all records with an unusable row."""
    keys_of = names.lookup((key_of(image.path), "") for image in images)
    boxes: dict[str, list[Box]] = {}
    unusable: dict[str, str] = {}  # key -> reason
    with tables.read(path, ("image", *_CORNERS)) as (header, rows):
        for number, row in rows:
            keys = []
            try:
                name = dict(zip(header, row, strict=False)).get("image", "").strip()
                keys = keys_of(name)
                if len(keys) != 1:
                    count = "several images" if keys else "no image"
                    raise RejectedRecord(f"{shortened(name)!r} is {count} of the folder")
                boxes.setdefault(keys[0], []).append(_box(tables.fields(header, row)))
            except RejectedRecord as error:
                reason = f"{path}: row {number}: {error}"
                if not keys:
                    rejects.append((f"row-{number}", reason))
                for key in keys:
                    unusable.setdefault(key, reason)
    label_names = tuple(sorted({label for own in boxes.values() for label, *_ in own}))
    kept = []
    for item in items:
        if item.key in unusable:
            rejects.append((item.key, unusable[item.key]))
            continue
        own = tuple(boxes.get(item.key, ()))
        labels = {label for label, *_ in own}
        values = tuple(POSITIVE if name in labels else NEGATIVE for name in label_names)
        kept.append(replace(item, boxes=own, labels=values))
    return kept, label_names


def _box(fields: dict[str, str]) -> Box:
    try:
        left, top, right, bottom = (float(fields[name]) for name in _CORNERS)
    except ValueError:
        left = top = right = bottom = math.nan
    if not (left < right and top < bottom and math.isfinite(right - left + bottom - top)):
        values = shortened(", ".join(fields[name] for name in _CORNERS))
        raise RejectedRecord(
            f"left, top, right, bottom are {values!r}: expected four numbers with left < right and "
            "top < bottom"
        )
    return fields.get("label", "").strip() or "object", left, top, right, bottom
