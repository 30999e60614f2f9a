"""Lists the sources of real images: a CSV of pairs, MIMIC-CXR-JPG, class folders.

No image is opened and no file asked for one by one: what is missing is found, and rejected, when
the record is made.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data import rows
from medsyn_jax.data.items import (
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNKNOWN,
    Item,
    Listing,
    key_of,
)

MIMIC_LABELS = (
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
LABEL_VALUES = {
    **dict.fromkeys(("1", "1.0"), POSITIVE),
    **dict.fromkeys(("0", "0.0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0"), UNCERTAIN),
    **dict.fromkeys(("", "-2", "-2.0"), UNKNOWN),
}
_SUFFIXES = (".jpg", ".jpeg", ".png", ".dcm", ".dicom")
_SPLIT_FOLDERS = {
    "train": "train",
    "valid": "valid",
    "val": "valid",
    "validation": "valid",
    "test": "test",
}
NOT_FRONTAL = "not a frontal view"


def pairs(config: Any) -> Listing:
    """A CSV of images and reports; image paths are relative to the folder of the CSV.

    Raises:
      UserError: the table is missing or broken, or lacks a column that `config.pairs` names.
    """
    path, columns = Path(config.path), config.pairs
    label_names = tuple(name for name in columns.labels if name)
    named = (columns.image, columns.report, columns.subject, columns.split, columns.view)
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    dropped: Counter[str] = Counter()
    seen: dict[str, int] = {}
    with rows.read(path, [name for name in (*named, *label_names) if name]) as (header, table):
        for number, row in table:
            where = f"{path}: row {number}"
            try:
                fields = rows.fields(header, row)
                fields[""] = ""  # no column, even where one has no name, as pandas' index has
                item = _pair(fields, columns, label_names, path.parent)
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{where}: {error}"))
                continue
            if config.frontal_only and _lateral(fields.get(columns.view, "")):
                dropped[NOT_FRONTAL] += 1
            elif item.key in seen:
                reason = f"{where}: {columns.image} {item.key} is already in row {seen[item.key]}"
                rejects.append((item.key, reason))
            else:
                seen[item.key] = number
                items.append(item)
    return Listing(items, label_names, rejects, dict(dropped))


def _pair(fields: dict[str, str], columns: Any, label_names: Sequence[str], folder: Path) -> Item:
    for name in (columns.image, columns.report, columns.subject):
        if name and not fields[name].strip():
            raise RejectedRecord(f"column {name!r} is empty")
    for name in label_names:
        if fields[name].strip() not in LABEL_VALUES:
            raise RejectedRecord(f"column {name!r}: {fields[name]!r} is not 1, 0, -1 or empty")
    image = PurePath(fields[columns.image].strip())  # ./a.png and a.png are the same image
    key = key_of(image.as_posix())
    return Item(
        key=key,
        subject=fields.get(columns.subject, "").strip() or key,
        split=fields.get(columns.split, "").strip() or None,
        image=str(folder / image),
        report=fields[columns.report],
        labels=tuple(LABEL_VALUES[fields[name].strip()] for name in label_names),
        view=_frontal(fields.get(columns.view, "")),
    )


def _frontal(view: str) -> str:
    """PA or AP from a wording such as 'AP Supine'; '' for anything else."""
    words = re.findall("[a-z]+", view.lower())
    return next((name for name in ("PA", "AP") if name.lower() in words), "")


def _lateral(view: str) -> bool:
    words = set(re.findall("[a-z]+", view.lower()))
    return not _frontal(view) and bool(words & {"l", "ll", "rl", "lat", "lateral"})


def mimic_cxr(config: Any) -> Listing:
    """MIMIC-CXR-JPG 2.x (Johnson et al. 2019) in its own layout, with its official split.

    `config.path` holds `mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz` and `files/`; the reports
    (`files/p10/p10000032/s50414267.txt`) lie there too, or under `config.mimic_cxr.reports`.
    Keys are the image paths without `files/` and without suffix.

    Raises:
      UserError: a table is missing or broken, or no image or no report lies where it should.
    """
    root = Path(config.path)
    splits = mimic_splits(root)
    labels = mimic_labels(root)
    found, rejects, laterals = mimic_images(root, splits, config.frontal_only)
    if not found:
        path = mimic_table(root, "metadata")
        raise UserError(f"mimic_cxr: {path}: lists no usable image: check the file")
    studies = [key.rpartition("/")[0] for key in found]
    bases = (root / "files", root)
    images, suffix = find_files(list(found), bases, (".jpg", ".png", ".dcm"), "image", "path")
    base = Path(config.mimic_cxr.reports or root)
    bases = (base / "files", base / "mimic-cxr-reports" / "files", base)
    reports, _ = find_files(studies, bases, (".txt",), "report", "mimic_cxr.reports")
    unknown = (UNKNOWN,) * len(MIMIC_LABELS)
    items = [
        Item(
            key=key,
            subject=sys.intern(subject),
            split=splits[dicom],
            image=f"{images}/{key}{suffix}",
            labels=labels.get(study, unknown),
            view=view if view in ("PA", "AP") else "",
            report_path=sys.intern(f"{reports}/{key.rpartition('/')[0]}.txt"),
        )
        for key, (dicom, subject, study, view) in found.items()
    ]
    return Listing(items, MIMIC_LABELS, rejects, {NOT_FRONTAL: laterals} if laterals else {})


def mimic_images(
    root: Path, splits: dict[str, str], frontal_only: bool
) -> tuple[dict[str, tuple[str, str, str, str]], list[tuple[str, str]], int]:
    """key -> (dicom, subject, study, view), the bad rows, and how many are not frontal."""
    path = mimic_table(root, "metadata")
    wanted = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    found: dict[str, tuple[str, str, str, str]] = {}
    rejects: list[tuple[str, str]] = []
    laterals = 0
    with rows.read(path, wanted) as (header, table):
        at = [header.index(name) for name in wanted]
        for number, row in table:
            try:
                rows.check(header, row)
                dicom, subject, study, view = (row[position] for position in at)
                if frontal_only and view not in ("PA", "AP"):
                    laterals += 1
                    continue
                if not (dicom and subject and study):
                    raise RejectedRecord("dicom_id, subject_id or study_id is empty")
                if dicom not in splits:
                    raise RejectedRecord(f"dicom_id {dicom} is not in the split table")
                key = key_of(f"p{subject[:2]}/p{subject}/s{study}/{dicom}")
                if key in found:
                    raise RejectedRecord(f"dicom_id {dicom} is listed twice")
                found[key] = (dicom, subject, study, view)
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{path}: row {number}: {error}"))
    return found, rejects, laterals


def mimic_table(root: Path, name: str) -> Path:
    """Where a table of MIMIC-CXR-JPG is, packed or, if there is no such file, unpacked."""
    path = root / f"mimic-cxr-2.0.0-{name}.csv.gz"
    plain = path.with_suffix("")
    return plain if plain.is_file() and not path.is_file() else path


def mimic_splits(root: Path) -> dict[str, str]:
    """dicom_id -> train, valid or test."""
    path = mimic_table(root, "split")
    names = {"train": "train", "validate": "valid", "test": "test"}
    result = {}
    with rows.read(path, ("dicom_id", "split")) as (header, table):
        dicom, split = header.index("dicom_id"), header.index("split")
        for number, row in table:
            if len(row) != len(header) or row[split] not in names:
                where = f"{path}: row {number}"
                raise UserError(f"broken table: {where}: expected train, validate or test")
            result[row[dicom]] = names[row[split]]
    return result


def mimic_labels(root: Path) -> dict[str, tuple[int, ...]]:
    """study_id -> values of MIMIC_LABELS; the few studies without a row are unknown throughout."""
    path = mimic_table(root, "chexpert")
    result = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # few of the combinations differ
    with rows.read(path, ("study_id", *MIMIC_LABELS)) as (header, table):
        study, at = header.index("study_id"), [header.index(name) for name in MIMIC_LABELS]
        for number, row in table:
            try:
                values = tuple(LABEL_VALUES[row[position]] for position in at)
            except (KeyError, IndexError):
                raise UserError(
                    f"broken table: {path}: row {number}: expected 1, 0, -1 or nothing"
                ) from None
            result[row[study]] = same.setdefault(values, values)
    return result


def find_files(
    names: Sequence[str], bases: Sequence[Path], suffixes: Sequence[str], what: str, setting: str
) -> tuple[Path, str]:
    """The folder and suffix that hold some of the files; a sample of them is enough to tell."""
    for name in names[:: max(1, len(names) // 100)]:
        for base in bases:
            for suffix in suffixes:
                if (base / f"{name}{suffix}").is_file():
                    return base, suffix
    tried = ", ".join(str(base / f"{names[0]}{suffixes[0]}") for base in bases)
    raise UserError(f"no {what}: mimic_cxr: looked for {tried} and others: set {setting}")


def folder(config: Any) -> Listing:
    """Class folders: `path`/[train|valid|test/]CLASS/**/*, each a .jpg, .png or .dcm; no reports.

    The labels are one-hot over the class names in sorted order. The subject is the file name's
    stem, or what `config.folder.subject`, a regular expression, finds in the path below `path`: its
    groups joined by '-'. A file in which it finds nothing is rejected.

    Raises:
      UserError: no such folder, no image in a class folder, a broken expression.
    """
    root = Path(config.path)
    try:
        pattern = re.compile(config.folder.subject) if config.folder.subject else None
    except re.error as error:
        text = config.folder.subject
        raise UserError(f"folder.subject: {text!r}: {error}: give a regular expression") from None
    if not root.is_dir():
        raise UserError(f"no folder: {root} does not exist: set path")
    dropped: Counter[str] = Counter()
    files = list(_image_files(root, dropped))
    splits = {Path(file).parts[0] for file in files} & {*_SPLIT_FOLDERS}
    depth = 1 if splits else 0  # where the class stands in the path
    classed = []
    for file in files:
        parts = PurePath(file).parts
        if len(parts) < depth + 2 or (splits and parts[0] not in splits):
            dropped["outside a class folder"] += 1
        else:
            classed.append((file, parts[depth], _SPLIT_FOLDERS[parts[0]] if splits else None))
    names = tuple(sorted({name for _, name, _ in classed}))
    if not names:
        layout = root / "[train|valid|test]" / "CLASS" / "*.png"
        raise UserError(f"no images: {root}: expected {layout} or .jpg or .dcm")
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    for file, name, split in classed:
        key = key_of(file)
        subject = _subject(file, pattern)
        if not subject:
            where = str(root / file)
            rejects.append(
                (key, f"{where}: folder.subject {config.folder.subject!r} finds nothing")
            )
            continue
        labels = tuple(POSITIVE if name == other else NEGATIVE for other in names)
        items.append(Item(key, subject, split, str(root / file), labels=labels))
    return Listing(items, names, rejects, dict(dropped))


def _subject(file: str, pattern: re.Pattern[str] | None) -> str:
    if pattern is None:
        return PurePath(file).stem
    match = pattern.search(file)
    if not match:
        return ""
    return "-".join(filter(None, match.groups())) if pattern.groups else match[0]


def _image_files(root: Path, dropped: Counter[str]) -> Iterator[str]:
    """Paths below root, in sorted order; hidden files and folders are passed over."""
    for place, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(files):
            if name.lower().endswith(_SUFFIXES) and not name.startswith("."):
                yield (Path(place) / name).relative_to(root).as_posix()
            else:
                dropped["not a .jpg, .png or .dcm file"] += 1
