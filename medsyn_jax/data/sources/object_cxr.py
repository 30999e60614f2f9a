"""The source `object_cxr`: foreign objects on chest radiographs (JF Healthcare 2020)."""

import dataclasses
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as coco

from medsyn_jax.core.errors import RejectedRecord, shortened
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import (
    NEGATIVE,
    POSITIVE,
    Item,
    Listing,
    Runs,
    check_box,
    coco_counts,
    key_of,
)

LABEL = "Foreign Object"
_RECTANGLE, _ELLIPSE, _POLYGON = "0", "1", "2"
_ANGLES = np.linspace(0, 2 * np.pi, 120, endpoint=False)  # of the outline of an ellipse

Shape = np.ndarray  # float64 [n, 2]: the outline as x, y in pixels

make = records.make


def list_items(config: Any) -> Listing:
    """The images of `train.csv`, `dev.csv` and, where there is one, `test.csv`, which lie in
    folders of these names.

    A row is an image and its objects, `0 x1 y1 x2 y2;2 x1 y1 x2 y2 x3 y3;...`: rectangles and
    ellipses by their corners, polygons by their points. The boxes are the bounding boxes, also of
    polygons; all objects together are `mask_objects`. The label says whether there is an object.
    Without `test.csv`, which was not published at first, `dev` is the test split, and validation
    is drawn from train.

    Of each image the header is read, as a mask needs the size of its image.

    Raises:
      UserError: a table or folder is missing or broken.
    """
    root = Path(config.path)
    homes = {"train": "train", "dev": "test"}
    notes = [f"{root} has no test.csv, so dev is the test split"]
    if (root / "test.csv").exists():
        homes, notes = {"train": "train", "dev": "valid", "test": "test"}, []
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    shapes: list[list[Shape]] = []  # of the items
    listed: set[str] = set()
    images = files.images_below(root, (".jpg", ".jpeg", ".png"), _name_of)
    for name, split in homes.items():
        table = root / f"{name}.csv"
        with tables.read(table, ("image_name", "annotation")) as (header, rows):
            for number, row in rows:
                try:
                    fields = tables.fields(header, row)
                    image = fields["image_name"].strip()
                    if not image:
                        raise RejectedRecord("column 'image_name' is empty")
                    stem = _name_of(f"{name}/{PurePosixPath(image).stem}")
                    if stem not in images:
                        raise RejectedRecord(f"there is no image {shortened(image)} in {name}")
                    listed.add(stem)
                    key = key_of(f"{name}/{image}")
                    outlines = _shapes(fields["annotation"])
                except RejectedRecord as error:
                    rejects.append((f"{name}-row-{number}", f"{table}: row {number}: {error}"))
                    continue
                labels = (POSITIVE if outlines else NEGATIVE,)
                boxes = tuple((LABEL, *_box(outline)) for outline in outlines)
                items.append(Item(key, key, split, images[stem], labels=labels, boxes=boxes))
                shapes.append(outlines)
    with futures.ThreadPoolExecutor(32) as pool:  # a network disk may take its time for each
        masked = [*pool.map(_masked, items, shapes)]
    rejects += [result for result in masked if isinstance(result, tuple)]
    items = [result for result in masked if isinstance(result, Item)]
    others = len(images.keys() - listed)
    dropped = {files.NOT_IN_TABLE: others} if others else {}
    return Listing(items, (LABEL,), rejects, dropped, notes)


def _name_of(stem: str) -> str:
    """Folder and name of an image, without suffix."""
    return "/".join(PurePosixPath(stem).parts[-2:])


def _shapes(annotation: str) -> list[Shape]:
    """The outlines of `type x1 y1 x2 y2 ...;...`; raises RejectedRecord."""
    shapes = []
    for text in filter(None, map(str.strip, annotation.split(";"))):
        kind, *words = text.split()
        points = np.array([tables.number(word, f"object {shortened(text)!r}") for word in words])
        corners = kind in (_RECTANGLE, _ELLIPSE) and len(points) == 4
        if not corners and not (kind == _POLYGON and len(points) >= 6 and len(points) % 2 == 0):
            raise RejectedRecord(
                f"object {shortened(text)!r} is no rectangle (0) or ellipse (1) of two points and "
                "no polygon (2) of three or more"
            )
        points = points.reshape(-1, 2)
        check_box(*(points.ravel().tolist() if corners else _box(points)))
        if kind == _RECTANGLE:
            (left, top), (right, bottom) = points
            points = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
        elif kind == _ELLIPSE:
            circle = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
            points = (points.mean(0) + circle * (points[1] - points[0]) / 2).round(3)
        shapes.append(points)
    return shapes


def _box(shape: Shape) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of an outline."""
    (left, top), (right, bottom) = shape.min(0).tolist(), shape.max(0).tolist()
    return left, top, right, bottom


def _masked(item: Item, shapes: Sequence[Shape]) -> Item | tuple[str, str]:
    """The item with its mask, or its reject."""
    try:
        width, height = decode.size(str(item.image))
    except RejectedRecord as error:
        return item.key, f"{item.image}: {error}"
    return dataclasses.replace(item, masks=(("mask_objects", filled(shapes, width, height)),))


def filled(shapes: Sequence[Shape], width: int, height: int) -> Runs:
    """The inside of outlines, cut off at the edges of an image of `width` x `height` pixels."""
    # Far points are moved to the edge: pycocotools takes memory for all the way to them.
    edge = (width, height)
    polygons = [np.clip(shape, 0, edge).ravel().tolist() for shape in shapes]
    if not polygons:
        return Runs(height, width, (width * height,))
    runs = coco.merge(coco.frPyObjects(polygons, height, width))
    return Runs(height, width, tuple(coco_counts(runs["counts"])))  # pyright: ignore[reportArgumentType]
