"""The source `coco`: a user's own boxes and masks in COCO's format for object detection (Lin et al.
2014, https://cocodataset.org/#format-data)."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from medsyn_jax.core.errors import RejectedRecord, UserError, reason, shortened
from medsyn_jax.data.images.dicom import MAX_PIXELS
from medsyn_jax.data.sources import folder, records
from medsyn_jax.data.store.items import (
    NEGATIVE,
    POSITIVE,
    Item,
    Listing,
    Runs,
    coco_counts,
    key_of,
)
from medsyn_jax.data.store.splits import split_name

_NAME = re.compile(r"_?(?:annotations?|instances?)[._-]*(?:coco)?[._-]*(.*)", re.I)
# What a value of another kind than the format's raises, and a value that is refused.
_WRONG = (LookupError, TypeError, ValueError, AttributeError, OverflowError, RejectedRecord)

make = records.make

Box = tuple[str, float, float, float, float]


@dataclass
class _Table:
    """One JSON file."""

    path: Path
    split: str | None
    images: list[Mapping[str, Any]]
    categories: dict[str, str]  # id -> name
    annotations: dict[Any, list[Mapping[str, Any]]]  # by image id
    strays: list[str] = field(default_factory=list)  # annotations of no image


def list_items(config: Any) -> Listing:
    """The images of `annotations*.json` or `instances*.json` in `path` or a folder in it.

    `path` may also be one JSON file. The split is in the name of the file (`instances_train.json`)
    or else of its folder (`train/_annotations.coco.json`). Image files lie beside the JSON file, in
    `images`, or in a folder called as in the name of the file. Labels say which categories an image
    has. Where there are segmentations, each category of them becomes a field `mask_<category>`, the
    union of its polygons and run-lengths, empty in images without. The subject is the stem, or what
    `config.coco.subject` finds in the path below `path`.

    Raises:
      UserError: no such file, a JSON file that is broken or lacks keys, or two categories of one
        mask.
    """
    root, paths = _files(config)
    tables = [_read(path, root) for path in paths]
    notes: list[str] = []
    subject_of = folder.subjects(config, notes)
    files = {*folder.image_files(root, Counter())}
    label_names = tuple(sorted({name for table in tables for name in table.categories.values()}))
    fields = _fields(tables)
    counts: Counter[str] = Counter()
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    used: set[str] = set()
    for table in tables:
        for number, image in enumerate(table.images):
            key = f"{key_of(table.path.stem)}-{number}"
            try:
                name = _file_of(str(image["file_name"]), table, root, files)
                key = key_of(name)
                used.add(name)
                item = Item(key, subject_of(name), table.split, str(root / name))
                items.append(_annotated(item, image, table, label_names, fields, counts))
            except _WRONG as error:
                why = error if isinstance(error, RejectedRecord) else reason(error)
                rejects.append((key, f"{table.path}: images[{number}]: {why}"))
    if strays := [stray for table in tables for stray in table.strays]:
        notes.append(f"{len(strays)} annotations are of no image, such as {strays[0]}")
    if counts["no mask"]:
        notes.append(f"{counts['no mask']} annotations have a box alone: no mask shows them")
    if counts["crowds"]:
        notes.append(f"{counts['crowds']} crowds (iscrowd) are in labels and masks, but no boxes")
    dropped = {}
    if lone := sorted(files - used):
        dropped["image in no JSON file"] = len(lone)
        notes.append(f"{len(lone)} images are in no JSON file, such as {shortened(lone[0])}")
    return Listing(items, label_names, rejects, dropped, notes)


def _annotated(
    item: Item,
    image: Mapping[str, Any],
    table: _Table,
    label_names: Sequence[str],
    fields: Mapping[str, str],
    counts: Counter[str],
) -> Item:
    """The item with size, labels, boxes and masks; raises RejectedRecord or one of _WRONG."""
    named = []  # (category, annotation)
    for annotation in table.annotations[image["id"]]:
        category = table.categories.get(str(annotation.get("category_id")))
        if category is None:
            number = shortened(str(annotation.get("category_id")))
            raise RejectedRecord(f"category_id {number} of an annotation is in no category")
        named.append((category, annotation))
    shape = _shape(image)
    boxes = tuple(_box(category, a) for category, a in named if not a.get("iscrowd"))
    masks = _masks(named, fields, shape, counts)
    counts["crowds"] += len(named) - len(boxes)
    present = {category for category, _ in named}
    labels = tuple(POSITIVE if name in present else NEGATIVE for name in label_names)
    return replace(item, labels=labels, masks=masks, boxes=boxes, size=shape)


def _files(config: Any) -> tuple[Path, list[Path]]:
    """The folder that paths are below, and the JSON files."""
    path = Path(config.path)
    if path.is_file():
        is_inner = path.parent.name == "annotations"  # as COCO's own, beside the images
        return path.parent.parent if is_inner else path.parent, [path]
    root = folder.root_of(config)
    places = [*sorted(root.glob("*.json")), *sorted(root.glob("*/*.json"))]
    files = [place for place in places if _NAME.fullmatch(place.stem)]
    if not files:
        raise UserError(
            f"coco: {root}: no annotations*.json or instances*.json in it or in a folder of it: "
            "set ingest.path to the folder or to one JSON file"
        )
    return root, files


def _read(path: Path, root: Path) -> _Table:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"coco: {path}: no JSON: {reason(error)}: mend the file") from None
    lists = {}
    for key in ("images", "annotations", "categories"):
        lists[key] = values.get(key) if isinstance(values, dict) else None
        if not isinstance(lists[key], list) or not all(isinstance(v, dict) for v in lists[key]):
            raise UserError(
                f"coco: {path}: no list of objects under the key {key!r}: expected COCO's format "
                "for object detection"
            )
    match = _NAME.fullmatch(path.stem)
    split = split_name(match[1]) if match else None
    split = split or (split_name(path.parent.name) if path.parent != root else None)
    try:
        categories = {str(c["id"]): str(c["name"]).strip() for c in lists["categories"]}
        annotations: dict[Any, list[Mapping[str, Any]]] = {i["id"]: [] for i in lists["images"]}
        table = _Table(path, split, lists["images"], categories, annotations)
        for number, annotation in enumerate(lists["annotations"]):
            if annotation["image_id"] in annotations:
                annotations[annotation["image_id"]].append(annotation)
            else:
                table.strays.append(f"annotations[{number}] of {path}")
    except _WRONG as error:
        raise UserError(
            f"coco: {path}: an id, name or image_id: {reason(error)}: mend the file"
        ) from None
    if len(annotations) < len(table.images):
        raise UserError(f"coco: {path}: two images have one id: mend the file")
    return table


def _fields(tables: Sequence[_Table]) -> dict[str, str]:
    """category -> mask_<category>, of the categories with a segmentation."""
    fields: dict[str, str] = {}
    for table in tables:
        for annotation in (a for own in table.annotations.values() for a in own):
            name = table.categories.get(str(annotation.get("category_id")))
            if annotation.get("segmentation") and name is not None:
                words = re.findall(r"\w+", name.lower())
                fields[name] = f"mask_{'_'.join(words) or 'object'}"
    for name, mask in fields.items():
        other = next((o for o, own in fields.items() if own == mask and o != name), None)
        if other is not None:
            raise UserError(f"coco: the categories {name!r} and {other!r} are both {mask}: rename")
    return dict(sorted(fields.items()))


def _file_of(name: str, table: _Table, root: Path, files: set[str]) -> str:
    """The path below root of an image of a table; raises RejectedRecord."""
    match = _NAME.fullmatch(table.path.stem)
    beside = table.path.parent.relative_to(root)
    called = match[1] if match else ""  # train2017
    for base in (beside, beside / "images", "", "images", called, f"images/{called}"):
        path = (PurePosixPath(base) / name).as_posix()
        if path in files:
            return path
    raise RejectedRecord(f"{shortened(name)!r} is not below {root}")


def _shape(image: Mapping[str, Any]) -> tuple[int, int]:
    height, width = int(image["height"]), int(image["width"])
    if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
        raise RejectedRecord(f"height {height} and width {width} are those of no image")
    return height, width


def _box(category: str, annotation: Mapping[str, Any]) -> Box:
    left, top, width, height = map(float, annotation["bbox"])
    if not (0 < width < np.inf and 0 < height < np.inf and np.isfinite(left + top)):
        what = shortened(str(annotation["bbox"]))
        raise RejectedRecord(f"the box {what} (x, y, width, height) has no area")
    return category, left, top, left + width, top + height


def _masks(
    named: Sequence[tuple[str, Mapping[str, Any]]],
    fields: Mapping[str, str],
    shape: tuple[int, int],
    counts: Counter[str],
) -> tuple[tuple[str, Runs], ...]:
    """(mask_<category>, run-lengths) of an image of `shape`, one for each of `fields`."""
    parts: dict[str, list[Any]] = {category: [] for category in fields}
    for category, annotation in named if fields else ():
        if segmentation := annotation.get("segmentation"):
            parts[category] += _parts(segmentation, *shape)
        else:
            counts["no mask"] += 1
    masks = []
    for category, own in parts.items():
        runs = coco_counts(coco_mask.merge(own)["counts"]) if own else [shape[0] * shape[1]]
        masks.append((fields[category], Runs(*shape, tuple(runs))))
    return tuple(masks)


def _parts(segmentation: Any, height: int, width: int) -> Iterator[Any]:
    """Polygons, or run-lengths, compressed or not, as pycocotools' compressed run-lengths.

    pycocotools trusts what it is given, so all is checked here first.
    """
    if isinstance(segmentation, dict):
        size, counts = segmentation["size"], segmentation["counts"]
        if [*size] != [height, width]:
            raise RejectedRecord(
                f"run-lengths of an image of {size[1]} x {size[0]} pixels, but the image has "
                f"{width} x {height}"
            )
        counts = (
            coco_counts(counts) if isinstance(counts, str) else [int(count) for count in counts]
        )
        if min(counts, default=0) < 0 or sum(counts) != height * width:
            raise RejectedRecord(f"run-lengths do not fill the image of {width} x {height} pixels")
        joined: list[int] = []  # without empty runs, at which `merge` may stop
        for n, count in enumerate(counts):
            if n % 2 != len(joined) % 2:
                joined[-1] += count
            elif count or not n:
                joined.append(count)
        whole: Any = {"size": [height, width], "counts": joined}
        yield coco_mask.frPyObjects(whole, height, width)
        return
    for polygon in segmentation:
        points = np.asarray(polygon, np.float64)
        if points.ndim != 1 or len(points) < 6 or len(points) % 2:
            raise RejectedRecord("a polygon is no list of x, y, x, y, ... of three points or more")
        inside = np.abs(points.reshape(-1, 2) / (width, height) - 0.5) <= 1.5
        if not inside.all():  # also of NaN
            raise RejectedRecord(f"a polygon is far outside of the image of {width} x {height}")
        yield from coco_mask.frPyObjects([points.tolist()], height, width)
