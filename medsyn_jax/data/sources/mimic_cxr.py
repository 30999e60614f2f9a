"""The source `mimic_cxr`: MIMIC-CXR-JPG 2.x (Johnson et al. 2019) in its own layout."""

import os
import sys
from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import records, tables
from medsyn_jax.data.store.items import NOT_FRONTAL, UNKNOWN, Item, Listing, key_of

LABELS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
)

make = records.make


class Image(NamedTuple):
    """An image as the tables describe it."""

    key: str  # its path without `files/` and without suffix
    study: str  # the path of its report, as the key
    subject: str
    split: str
    labels: tuple[int, ...]
    view: str


def list_items(config: Any) -> Listing:
    """All images with the official split.

    `config.path` holds `mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz` and `files/`; the reports
    (`files/p10/p10000032/s50414267.txt`) lie there too, or under `config.mimic_cxr.reports`.
    No image is opened and no file asked for one by one: a missing one is rejected when its record
    is made.

    Raises:
      UserError: a table is missing or broken, or no image or no report lies where it should.
    """
    root = Path(config.path)
    images, rejects, dropped = read_tables(root, config.frontal_only)
    if not images:
        path = table_path(root, "metadata")
        raise UserError(f"mimic_cxr: {path}: lists no usable image: check the file")
    keys, suffixes = [image.key for image in images], (".jpg", ".png", ".dcm")
    folder, suffix = _find_files(keys, (root / "files", root), suffixes, "image", "path")
    home = config.get("mimic_cxr", {}).get("reports") or root
    reports = find_reports([image.study for image in images], home, "mimic_cxr.reports")
    items = [
        Item(
            key=image.key,
            subject=image.subject,
            split=image.split,
            image=f"{folder}/{image.key}{suffix}",
            labels=image.labels,
            view=image.view,
            report_path=sys.intern(f"{reports}/{image.study}.txt"),
        )
        for image in images
    ]
    return Listing(items, LABELS, rejects, dropped)


def read_tables(
    root: Path, frontal_only: bool
) -> tuple[list[Image], list[tuple[str, str]], dict[str, int]]:
    """The images in the tables, the rejects and what is left out, as in `Listing`.

    Raises:
      UserError: a table is missing or broken.
    """
    homes, labels, unknown = _splits(root), _labels(root), (UNKNOWN,) * len(LABELS)
    path = table_path(root, "metadata")
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    images: dict[str, Image] = {}
    rejects: list[tuple[str, str]] = []
    laterals = 0
    with tables.read(path, columns) as (header, rows):
        pick = itemgetter(*map(header.index, columns))
        for number, row in rows:
            try:
                dicom, subject, study, view = pick(tables.cells(header, row))
                if frontal_only and view not in ("PA", "AP"):
                    laterals += 1
                    continue
                if not (dicom and subject and study) or "\0" in dicom + subject + study:
                    raise RejectedRecord("dicom_id, subject_id or study_id is empty or has a NUL")
                if dicom not in homes:
                    raise RejectedRecord(f"dicom_id {shortened(dicom)} is not in the split table")
                key = key_of(f"p{subject[:2]}/p{subject}/s{study}/{dicom}")
                if key in images:
                    raise RejectedRecord(f"dicom_id {shortened(dicom)} is listed twice")
                images[key] = Image(
                    key,
                    sys.intern(key.rpartition("/")[0]),
                    sys.intern(subject),
                    homes[dicom],
                    labels.get(study, unknown),
                    view if view in ("PA", "AP") else "",
                )
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{path}: row {number}: {error}"))
    return [*images.values()], rejects, {NOT_FRONTAL: laterals} if laterals else {}


def table_path(root: Path, name: str) -> Path:
    """Where a table of MIMIC-CXR-JPG is, packed or, if there is no such file, unpacked."""
    path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
    plain = path.with_suffix("")
    return plain if plain.is_file() and not path.is_file() else path


def find_reports(studies: Sequence[str], folder: Path | str, setting: str) -> Path:
    """The folder, in `folder`, that the paths of reports start from; UserError if none does."""
    base = Path(folder)
    bases = (base / "files", base / "mimic-cxr-reports" / "files", base)
    return _find_files(studies, bases, (".txt",), "report", setting)[0]


def _splits(root: Path) -> dict[str, str]:
    """dicom_id -> train, valid or test."""
    path = table_path(root, "split")
    names = {"train": "train", "validate": "valid", "test": "test"}
    homes = {}
    for number, (dicom, split) in tables.columns(path, ("dicom_id", "split")):
        if split not in names:
            where = f"{path}: row {number}"
            raise UserError(f"broken table: {where}: expected train, validate or test")
        homes[dicom] = names[split]
    return homes


def _labels(root: Path) -> dict[str, tuple[int, ...]]:
    """study_id -> values of LABELS; the few studies without a row are unknown throughout."""
    path = table_path(root, "chexpert")
    labels = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # few of the combinations differ
    for number, (study, *cells) in tables.columns(path, ("study_id", *LABELS)):
        try:
            values = tables.label_values(cells, LABELS)
        except RejectedRecord as error:
            raise UserError(f"broken table: {path}: row {number}: {error}") from None
        labels[study] = same.setdefault(values, values)
    return labels


def _find_files(
    names: Sequence[str], bases: Sequence[Path], suffixes: Sequence[str], what: str, setting: str
) -> tuple[Path, str]:
    """The folder and suffix that hold some of the files; a sample of them is enough to tell."""
    for name in names[:: max(1, len(names) // 100)]:
        for base in bases:
            for suffix in suffixes:
                if os.path.isfile(base / f"{name}{suffix}"):  # also of names that are too long
                    return base, suffix
    tried = ", ".join(str(base / f"{shortened(names[0])}{suffixes[0]}") for base in bases)
    raise UserError(f"no {what}: mimic_cxr: looked for {tried} and others: set {setting}")
