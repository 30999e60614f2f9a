"""The source `vindr`: VinDr-CXR (Nguyen et al. 2022), as PhysioNet or as Kaggle hands it out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import (
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNKNOWN,
    Item,
    Listing,
    check_box,
    key_of,
)

_NONE = "No finding"
_KAGGLE = (
    *("Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Consolidation"),
    *("ILD", "Infiltration", "Lung Opacity", "Nodule/Mass", "Other lesion", "Pleural effusion"),
    *("Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", _NONE),
)
_PHYSIONET = (
    *_KAGGLE[:-1],
    *("Clavicle fracture", "Edema", "Emphysema", "Enlarged PA", "Lung cavity", "Lung cyst"),
    *("Mediastinal shift", "Rib fracture"),
    *("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", _NONE),
)
_SPELLINGS = {"Other disease": "Other diseases"}  # in the tables of the test split
_CORNERS = ("x_min", "y_min", "x_max", "y_max")

Box = tuple[float, float, float, float]
Mark = tuple[str, str, Box | None]  # reader, label, box; no box of "No finding"

make = records.make


def list_items(config: Any) -> Listing:
    """The DICOM files in `train/` and `test/`, with labels and boxes.

    PhysioNet's tables are `annotations/{image_labels,annotations}_{train,test}.csv`, Kaggle's is
    `train.csv`, of which splits are drawn. Training images were read by three radiologists each:
    a label is what most of them say, uncertain where as many say yes as no, and their boxes are
    fused (`fuse`), by `config.vindr.iou` and `config.vindr.readers`. The test split holds the
    consensus of five, taken as it is. Patients are not told: every image is a subject.

    Raises:
      UserError: a table or folder is missing or broken, or a setting is out of range.
    """
    root, settings = Path(config.path), config.get("vindr", {})
    iou, readers = settings.get("iou", 0.5), settings.get("readers", 2)
    if not 0 < iou <= 1 or readers < 1:
        raise UserError(f"ingest.vindr: iou={iou}, readers={readers}: use 0 to 1, and at least 1")
    folder = root / "annotations" if (root / "annotations").is_dir() else root
    physionet = (folder / "image_labels_train.csv").exists()
    if not physionet and not (root / "train.csv").exists():
        looked = f"{root}/annotations/image_labels_train.csv (PhysioNet) and {root}/train.csv"
        raise UserError(f"no table: vindr: looked for {looked} (Kaggle): check the path")
    names = _PHYSIONET if physionet else _KAGGLE
    images = files.images_below(root, (".dicom", ".dcm"), lambda stem: PurePosixPath(stem).name)
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    for split in ("train", "test") if physionet else ("train",):
        several, broken = split == "train", {}
        table = folder / f"annotations_{split}.csv" if physionet else root / "train.csv"
        marks = _marks(table, names, several, broken)
        votes = {image: _named(image_marks, names) for image, image_marks in marks.items()}
        if physionet:
            labels_table = folder / f"image_labels_{split}.csv"
            votes = _votes(labels_table, several, broken)
            for image in marks.keys() - votes.keys():
                broken.setdefault(image, f"{table}: {shortened(image)} is not in {labels_table}")
        for image, values in votes.items():
            path = images.pop(image, "")
            if not path:
                broken.setdefault(image, f"{table}: there is no {shortened(image)}.dicom in {root}")
            if image not in broken:
                key = key_of(f"{split}/{image}")
                boxes = fuse(marks.get(image, ()), iou, readers)
                labels = tuple(map(_majority, zip(*values, strict=True)))
                items.append(Item(key, key, split, path, labels=labels, view="PA", boxes=boxes))
        rejects += sorted((key_of(f"{split}/{image}"), why) for image, why in broken.items())
    dropped = {files.NOT_IN_TABLE: len(images)} if images else {}
    return Listing(items, names, rejects, dropped)


def fuse(marks: Iterable[Mark], iou: float, readers: int) -> tuple[tuple, ...]:
    """The boxes of several readers, one for each finding: weighted boxes fusion (Solovyev, Wang
    and Gabruseva 2021) with equal weights.

    In the order of readers, a box joins the cluster of its label whose mean box it overlaps most,
    by an IoU of `iou` at least, unless that cluster has a box of the same reader. The mean boxes
    of clusters of `readers` or more are returned. Boxes whose reader is '' are a consensus and
    are returned as they are.

    Returns:
      (label, left, top, right, bottom) in pixels, sorted.
    """
    clusters: list[tuple[str, dict[str, Box]]] = []  # label, boxes by reader
    for reader, label, box in sorted({(r, name, box) for r, name, box in marks if box}):
        overlaps = [
            _iou(_mean(boxes), box) if name == label and reader not in boxes else 0.0
            for name, boxes in clusters
        ]
        if reader and max(overlaps, default=0.0) >= iou:
            clusters[int(np.argmax(overlaps))][1][reader] = box
        else:
            clusters.append((label, {reader: box}))
    agreed = [(n, b) for n, b in clusters if "" in b or len(b) >= readers]
    return tuple(sorted((name, *_mean(boxes)) for name, boxes in agreed))


def _mean(boxes: Mapping[str, Box]) -> Box:
    left, top, right, bottom = np.mean([*boxes.values()], axis=0).tolist()
    return left, top, right, bottom


def _iou(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


def _marks(
    path: Path, names: Sequence[str], several: bool, broken: dict[str, str]
) -> dict[str, list[Mark]]:
    """The rows of a table of boxes by image; images with an unusable row are added to `broken`."""

    def mark(fields: dict[str, str]) -> Mark:
        label = fields["class_name"].strip()
        label = _SPELLINGS.get(label, label)
        if label not in names:
            raise RejectedRecord(f"class_name {shortened(label)!r} is no label of the set")
        if label == _NONE:
            return _reader(fields, several), label, None
        left, top, right, bottom = (tables.number(fields[c], f"column {c!r}") for c in _CORNERS)
        check_box(left, top, right, bottom)
        return _reader(fields, several), label, (left, top, right, bottom)

    columns = (*(("rad_id",) if several else ()), "class_name", *_CORNERS)
    return tables.grouped(path, "image_id", columns, mark, broken)


def _votes(path: Path, several: bool, broken: dict[str, str]) -> dict[str, list[tuple[int, ...]]]:
    """The labels of an image by each reader; images with an unusable row are added to `broken`."""
    with tables.read(path, ("image_id",)) as (header, _):
        other = next((old for old in _SPELLINGS if old in header), "")
    names = [other if other and name == _SPELLINGS[other] else name for name in _PHYSIONET]

    def vote(fields: dict[str, str]) -> tuple[str, tuple[int, ...]]:
        return _reader(fields, several), tables.labels(fields, names)

    columns = (*(("rad_id",) if several else ()), *names)
    votes = tables.grouped(path, "image_id", columns, vote, broken)
    for image, rows in votes.items():
        if len({reader for reader, _ in rows}) < len(rows):
            broken.setdefault(image, f"{path}: {shortened(image)} has two rows of one reader")
    return {image: [labels for _, labels in rows] for image, rows in votes.items()}


def _reader(fields: Mapping[str, str], several: bool) -> str:
    """The reader of a row, '' of the consensus."""
    reader = fields["rad_id"].strip() if several else ""
    if several and not reader:
        raise RejectedRecord("column 'rad_id' is empty")
    return reader


def _named(marks: Sequence[Mark], names: Sequence[str]) -> list[tuple[int, ...]]:
    """The labels of an image by each reader, from the marks."""
    by_reader: dict[str, set[str]] = {}
    for reader, label, _ in marks:
        by_reader.setdefault(reader, set()).add(label)
    return [
        tuple(POSITIVE if name in labels else NEGATIVE for name in names)
        for labels in by_reader.values()
    ]


def _majority(votes: Sequence[int]) -> int:
    """What most readers say of a label; readers who say nothing do not count."""
    yes, no = votes.count(POSITIVE), votes.count(NEGATIVE)
    if yes == no:
        return UNCERTAIN if yes or UNCERTAIN in votes else UNKNOWN
    return POSITIVE if yes > no else NEGATIVE
