"""The sources of image-report records: what a source holds, and how one record is made.

A source is listed first (`SOURCES[config.source](config)`: no pixel is read, no image is touched),
then each item becomes an example on its own (`example`), in any process and any order.

Fields of `config` (the ingest config) read here:
  source, path, size (pixels), sections, min_tokens, frontal_only, seed,
  phantom.subjects, phantom.studies_per_subject,
  pairs.{image, report, subject, split, labels, view}: column names, "" = no such column,
  mimic_cxr.reports: folder of the report tree, "" = `path`,
  folder.subject: regular expression, "" = the file name's stem is the subject.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
from ml_collections import ConfigDict

from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data import images, reports, rows

POSITIVE, NEGATIVE, UNCERTAIN, UNKNOWN = 1, 0, -1, -2

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
_SPLITS = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "val": "valid",
    "validate": "valid",
    "validation": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
}
_LABEL_VALUES = {
    **dict.fromkeys(("1", "1.0"), POSITIVE),
    **dict.fromkeys(("0", "0.0"), NEGATIVE),
    **dict.fromkeys(("-1", "-1.0"), UNCERTAIN),
    **dict.fromkeys(("", "-2", "-2.0"), UNKNOWN),
}
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".dcm", ".dicom"}


@dataclass(frozen=True, slots=True)
class Item:
    """One record before its pixels are read. Small and picklable."""

    key: str  # unique in the source, stable across runs, ASCII without spaces
    subject: str
    split: str | None  # train, valid, test; None where the source brings no split
    image: str | tuple[int, int, int]  # a path, or the phantom's (seed, subject, study)
    report: str = ""
    labels: tuple[int, ...] = ()  # in the order of Listing.label_names; () until made (phantom)
    view: str = ""  # PA, AP or ''
    report_path: str = ""  # where the report lies when it is read with the image (MIMIC-CXR)


@dataclass(frozen=True)
class Listing:
    """All items of a source, in a stable order."""

    items: list[Item]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]] = field(default_factory=list)  # bad rows: (key, reason)
    dropped: dict[str, int] = field(default_factory=dict)  # left out by choice: reason -> count


def key_of(path: str) -> str:
    """A record key from a path: ASCII without spaces; distinct paths give distinct keys."""
    return quote(path, safe="/-_.~+,=@:()")


def phantom_items(config: ConfigDict) -> Listing:
    """`phantom.subjects` x `phantom.studies_per_subject` procedural radiographs."""
    from medsyn_jax.data import phantom

    seed = config.seed
    items = [
        Item(f"phantom/{seed}/{subject:06d}/{study}", f"{subject:06d}", None, (seed, subject, study))
        for subject in range(config.phantom.subjects)
        for study in range(config.phantom.studies_per_subject)
    ]
    return Listing(items, tuple(phantom.LABELS))


def _view(text: str) -> str | None:
    """'PA', 'AP' or '' (not said); None for a view that is not frontal."""
    words = re.findall(r"[a-z]+", text.lower())
    for name in ("pa", "ap"):
        if name in words:
            return name.upper()
    return None if words and words[0] in {"l", "ll", "rl", "lat", "lateral"} else ""


def pairs(config: ConfigDict) -> Listing:
    """A CSV of image-report pairs; image paths are relative to the CSV's folder."""
    path, columns = Path(config.path), config.pairs
    names = [columns.image, columns.report, columns.subject, columns.split, columns.view]
    label_names = tuple(name for name in columns.labels if name)
    header, table = rows.read(path, [name for name in (*names, *label_names) if name])
    at = {name: position for position, name in enumerate(header)}
    items, rejects, dropped, seen = [], [], Counter(), {}
    for number, row in table:
        try:
            item = _pair(row, header, at, columns, label_names, path.parent, config)
        except RejectedRecord as error:
            rejects.append((f"row-{number}", f"{path}: row {number}: {error}"))
            continue
        if item is None:
            dropped["not a frontal view"] += 1
        elif item.key in seen:
            reason = f"{path}: row {number}: image {item.key} is already in row {seen[item.key]}"
            rejects.append((item.key, reason))
        else:
            seen[item.key] = number
            items.append(item)
    return Listing(items, label_names, rejects, dict(dropped))


def _pair(row, header, at, columns, label_names, folder: Path, config) -> Item | None:
    fault = rows.problem(row, len(header))
    if fault:
        raise RejectedRecord(fault)

    def value(name: str) -> str:
        return row[at[name]].strip() if name else ""

    image, report = value(columns.image), value(columns.report)
    if not image:
        raise RejectedRecord(f"column {columns.image!r} is empty")
    if not report:
        raise RejectedRecord(f"column {columns.report!r} is empty")
    subject = value(columns.subject)
    if columns.subject and not subject:
        raise RejectedRecord(f"column {columns.subject!r} is empty")
    split = value(columns.split)
    if columns.split and split.lower() not in _SPLITS:
        raise RejectedRecord(f"column {columns.split!r}: {split!r} is not train, valid or test")
    labels = []
    for name in label_names:
        if value(name) not in _LABEL_VALUES:
            raise RejectedRecord(f"column {name!r}: {value(name)!r} is not 1, 0, -1 or empty")
        labels.append(_LABEL_VALUES[value(name)])
    view = _view(value(columns.view))
    if view is None and config.frontal_only:
        return None
    place = Path(image) if Path(image).is_absolute() else Path(_normal(image))
    key = key_of(place.as_posix())
    return Item(
        key,
        subject or key,
        _SPLITS[split.lower()] if split else None,
        str(folder / place),
        report,
        tuple(labels),
        view or "",
    )


def _normal(path: str) -> str:
    """a/./b and a/b are the same image, so they must give the same key."""
    return "/".join(part for part in Path(path).parts)


def example(item: Item, config: ConfigDict) -> dict:
    """One full record of the shard schema; images are encoded PNG bytes.

    Raises:
      RejectedRecord: the image or the report cannot be used; the message names the file.
    """
    if isinstance(item.image, tuple):
        record = _phantom_example(item, config)
    else:
        record = _image_example(item, config)
    if item.report_path or item.report or isinstance(item.image, tuple):
        _check_report(item, record, config)
    return record


def _sectioned(report: str) -> dict:
    found = reports.sections(report)
    return {
        "report": report,
        "findings": reports.clean(found.get("findings", "")),
        "impression": reports.clean(found.get("impression", "")),
    }


def _check_report(item: Item, record: dict, config: ConfigDict) -> None:
    text = reports.select_text(
        record["findings"], record["impression"], record["report"], tuple(config.sections)
    )
    count = reports.token_count(text)
    if count < config.min_tokens:
        where = item.report_path or item.key
        raise RejectedRecord(f"{where}: the report has {count} words, need {config.min_tokens}")


def _image_example(item: Item, config: ConfigDict) -> dict:
    report = _read_report(item.report_path) if item.report_path else item.report
    pixels = images.decode_grey(str(item.image), at_least=2 * config.size)
    return {
        "key": item.key,
        "subject": item.subject,
        "image": images.encode_png(images.square(pixels, config.size)),
        **_sectioned(report),
        "labels": np.array(item.labels, np.int8),
        "view": item.view,
    }


def _read_report(path: str) -> str:
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RejectedRecord(f"{path}: no such report") from None
    except UnicodeDecodeError as error:
        raise RejectedRecord(f"{path}: not UTF-8 text at byte {error.start}") from None
    except OSError as error:
        raise RejectedRecord(f"{path}: unreadable report: {error.strerror}") from None


def _phantom_example(item: Item, config: ConfigDict) -> dict:
    from medsyn_jax.data import phantom

    seed, subject, study = item.image
    made = phantom.study(int(seed), int(subject), int(study), config.size)

    def png(mask: np.ndarray) -> bytes:
        return images.encode_png(np.where(mask, 255, 0).astype(np.uint8))

    return {
        "key": item.key,
        "subject": item.subject,
        "image": images.encode_png(made.image),
        **_sectioned(made.report),
        "labels": np.array([made.labels[name] for name in phantom.LABELS], np.int8),
        "view": made.view,
        **{f"mask_{name}": png(mask) for name, mask in made.masks.items()},
        "boxes": [
            {"bbox": np.array(corners, np.float32), "label": label}
            for label, *corners in made.boxes
        ],
    }


def mimic_cxr(config: ConfigDict) -> Listing:
    raise UserError("mimic_cxr: not written yet")


def folder(config: ConfigDict) -> Listing:
    raise UserError("folder: not written yet")


SOURCES: dict[str, Callable[[ConfigDict], Listing]] = {
    "phantom": phantom_items,
    "pairs": pairs,
    "mimic_cxr": mimic_cxr,
    "folder": folder,
}
