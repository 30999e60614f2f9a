"""Lists the sources of real images: a CSV of pairs, MIMIC-CXR-JPG; class folders: `folders`.

No image is opened and no file asked for one by one: what is missing is found, and rejected, when
the record is made.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import tables
from medsyn_jax.data.sources.folders import folder as folder
from medsyn_jax.data.store.items import (
    NEGATIVE,
    POSITIVE,
    UNCERTAIN,
    UNKNOWN,
    Item,
    Listing,
    key_of,
)
from medsyn_jax.data.text import reports

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
NOT_FRONTAL = "not a frontal view"
_VIEWS = {
    name: re.compile(
        rf"(?i)(?<![a-z])(?:{first[0]}-?{then[0]}|{first}[a-z]{{0,3}}[ _-]?{then}\w*+)(?![a-z])"
    )
    for name, first, then in (("PA", "poster", "anter"), ("AP", "anter", "poster"))
}
_FRONTAL = {"frontal", "front", "f", "portable", "supine", "erect", "upright", "unknown", "unk"}
_PERSON = re.compile(r"patient|subject|person|participant|mrn\b", re.I)
_ID = re.compile(r"(?i:(?:^|[\W_])[up]?id(?:$|[\W_]))|[a-z]I[Dd]$")


def pairs(config: Any) -> Listing:
    """A CSV of images and reports; image paths are relative to the folder of the CSV.

    Findings and impression may have columns of their own; the report column may then be missing.

    Raises:
      UserError: the table is missing or broken, or lacks a column that `config.pairs` names.
    """
    path, columns = Path(config.path), config.pairs
    label_names = tuple(dict.fromkeys(name for name in columns.labels if name))
    in_parts = bool(columns.findings or columns.impression)
    texts = ("findings", "impression") if in_parts else ("report",)
    settings = {columns.image: "ingest.pairs.image"}
    for name in ("subject", "split", "view", *texts):
        settings[columns[name]] = f"ingest.pairs.{name}, to nothing where there is none"
    settings |= dict.fromkeys(label_names, "ingest.pairs.labels")
    settings.pop("", None)
    items: list[Item] = []
    rejects: list[tuple[str, str]] = []
    views: Counter[str] = Counter()
    seen: dict[str, int] = {}
    with tables.read(path, settings) as (header, table):
        guesses = {} if columns.subject else _subject_columns(header, settings)
        for number, row in table:
            where = f"{path}: row {number}"
            try:
                fields = tables.fields(header, row)
                fields[""] = ""  # no column, even where one has no name, as pandas' index has
                item = _pair(fields, columns, label_names, path.parent)
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{where}: {error}"))
                continue
            view = fields.get(columns.view, "").strip()
            if config.frontal_only and _not_frontal(view):
                views[view] += 1
            elif item.key in seen:
                key = shortened(item.key)
                reason = f"{where}: {columns.image} {key} is already in row {seen[item.key]}"
                rejects.append((item.key, reason))
            else:
                seen[item.key] = number
                items.append(item)
                for name, values in guesses.items():
                    values.add(fields[name])
    notes = [] if columns.subject else [_no_subject(guesses, len(items))]
    if in_parts and columns.report and columns.report not in header:
        notes.append(f"no column {columns.report!r}: reports are their findings and impression")
    if views:
        names = shortened(", ".join(f"{name} {n}" for name, n in views.most_common()), 300)
        notes.append(f"not frontal by column {columns.view!r}, and so left out: {names}")
    dropped = {NOT_FRONTAL: views.total()} if views else {}
    return Listing(items, label_names, rejects, dropped, notes)


def _pair(fields: dict[str, str], columns: Any, label_names: Sequence[str], folder: Path) -> Item:
    findings, impression = (
        reports.without_head(fields[column], name) if column else None
        for name, column in (("findings", columns.findings), ("impression", columns.impression))
    )
    in_parts = findings is not None or impression is not None
    report = fields.get(columns.report, "") if in_parts else fields[columns.report]
    for name in (columns.image, "" if in_parts else columns.report, columns.subject):
        if name and not fields[name].strip():
            raise RejectedRecord(f"column {name!r} is empty")
    for name in label_names:
        if fields[name].strip() not in LABEL_VALUES:
            value = shortened(fields[name])
            raise RejectedRecord(f"column {name!r}: {value!r} is not 1, 0, -1 or empty")
    if "\0" in fields[columns.image]:
        raise RejectedRecord(f"column {columns.image!r} holds a NUL character, so it is no path")
    if in_parts and not (findings or impression) and report.strip():
        findings = impression = None  # as where nobody cut it into sections
    elif in_parts and not report.strip():
        parts = {"FINDINGS": findings, "IMPRESSION": impression}
        report = "\n\n".join(f"{head}: {text}" for head, text in parts.items() if text)
    image = PurePath(fields[columns.image].strip())  # ./a.png and a.png are the same image
    key = key_of(image.as_posix())
    return Item(
        key=key,
        subject=fields.get(columns.subject, "").strip() or key,
        split=fields.get(columns.split, "").strip() or None,
        image=str(folder / image),
        report=report,
        labels=tuple(LABEL_VALUES[fields[name].strip()] for name in label_names),
        view=_frontal(fields.get(columns.view, "")),
        sections=(findings, impression),
    )


def _subject_columns(header: Sequence[str], taken: Collection[str]) -> dict[str, set[str]]:
    """Columns whose name says that they may hold subjects, patients first; each with a set for its
    values."""
    found = [name for name in header if name not in taken]
    people = [name for name in found if _PERSON.search(name)]
    ids = [name for name in found if _ID.search(name) and name not in people]
    return {name: set() for name in (*people, *ids)}


def _no_subject(guesses: dict[str, set[str]], count: int) -> str:
    """What is said where no column of subjects is named: a repeated value may be a patient."""
    likely = {
        name: len(values)
        for name, values in guesses.items()
        if 1 < len(values) < count and (_PERSON.search(name) or 20 * len(values) > count)
    }
    said = "no subject column is named, so every image is a subject of its own"
    if not likely:
        return f"{said}: name one by ingest.pairs.subject where a patient has several images"
    looks = ", ".join(f"{shortened(name)!r} ({n} values)" for name, n in likely.items())
    return (
        f"{said}, and images of one patient can lie in several splits: set ingest.pairs.subject; "
        f"columns that look like subjects: {shortened(looks, 300)}"
    )


def _frontal(view: str) -> str:
    """PA or AP from a wording such as 'AP Supine'; '' for anything else."""
    return next((name for name, wording in _VIEWS.items() if wording.search(view)), "")


def _not_frontal(view: str) -> bool:
    """Whether a view is named, and is neither PA nor AP nor otherwise frontal."""
    words = set(re.findall("[a-z]+", view.lower()))
    lateral = words & {"l", "ll", "rl", "lat", "lateral"}
    return bool(words) and not _frontal(view) and bool(lateral or not words & _FRONTAL)


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
    with tables.read(path, wanted) as (header, table):
        at = [header.index(name) for name in wanted]
        for number, row in table:
            try:
                tables.check(header, row)
                dicom, subject, study, view = (row[position] for position in at)
                if frontal_only and view not in ("PA", "AP"):
                    laterals += 1
                    continue
                if not (dicom and subject and study) or "\0" in dicom + subject + study:
                    raise RejectedRecord("dicom_id, subject_id or study_id is empty or has a NUL")
                if dicom not in splits:
                    raise RejectedRecord(f"dicom_id {shortened(dicom)} is not in the split table")
                key = key_of(f"p{subject[:2]}/p{subject}/s{study}/{dicom}")
                if key in found:
                    raise RejectedRecord(f"dicom_id {shortened(dicom)} is listed twice")
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
    with tables.read(path, ("dicom_id", "split")) as (header, table):
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
    with tables.read(path, ("study_id", *MIMIC_LABELS)) as (header, table):
        study, at = header.index("study_id"), [header.index(name) for name in MIMIC_LABELS]
        for number, row in table:
            try:
                tables.check(header, row)
                values = tuple(LABEL_VALUES[row[position]] for position in at)
            except RejectedRecord as error:
                raise UserError(f"broken table: {path}: row {number}: {error}") from None
            except KeyError:
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
                if os.path.isfile(base / f"{name}{suffix}"):  # also of names that are too long
                    return base, suffix
    tried = ", ".join(str(base / f"{shortened(names[0])}{suffixes[0]}") for base in bases)
    raise UserError(f"no {what}: mimic_cxr: looked for {tried} and others: set {setting}")
