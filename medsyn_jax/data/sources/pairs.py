"""The source `pairs`: a CSV of images with reports, or with labels alone."""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, shortened
from medsyn_jax.data.sources import records, tables
from medsyn_jax.data.store.items import NOT_FRONTAL, Item, Listing, key_of
from medsyn_jax.data.text import reports

_VIEWS = {
    name: re.compile(
        rf"(?i)(?<![a-z])(?:{first[0]}-?{then[0]}|{first}[a-z]{{0,3}}[ _-]?{then}\w*+)(?![a-z])"
    )
    for name, first, then in (("PA", "poster", "anter"), ("AP", "anter", "poster"))
}
_FRONTAL = {"frontal", "front", "f", "portable", "supine", "erect", "upright", "unknown", "unk"}
_PERSON = re.compile(r"patient|subject|person|participant|mrn\b", re.I)
_ID = re.compile(r"(?i:(?:^|[\W_])[up]?id(?:$|[\W_]))|[a-z]I[Dd]$")

make = records.make


def list_items(config: Any) -> Listing:
    """The rows of the CSV; image paths are relative to its folder.

    Findings and impression may have columns of their own; the report column may then be missing.
    No image is opened and no file asked for one by one: a missing one is rejected when its record
    is made.

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
    rows_by_key: dict[str, int] = {}
    with tables.read(path, settings) as (header, rows):
        guesses = {} if columns.subject else _subject_columns(header, settings)
        for number, row in rows:
            where = f"{path}: row {number}"
            try:
                fields = tables.fields(header, row)
                item = _item(fields, columns, label_names, path.parent)
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{where}: {error}"))
                continue
            view = fields.get(columns.view, "").strip()
            if config.frontal_only and _is_lateral(view):
                views[view] += 1
            elif item.key in rows_by_key:
                image = f"{columns.image} {shortened(item.key)}"
                reason = f"{where}: {image} is already in row {rows_by_key[item.key]}"
                rejects.append((item.key, reason))
            else:
                rows_by_key[item.key] = number
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


def _item(fields: dict[str, str], columns: Any, label_names: Sequence[str], folder: Path) -> Item:
    findings, impression = (
        reports.without_head(fields[columns[name]], name) if columns[name] else None
        for name in ("findings", "impression")
    )
    in_parts = findings is not None or impression is not None
    report = fields.get(columns.report, "") if in_parts else fields[columns.report]
    for name in (columns.image, "" if in_parts else columns.report, columns.subject):
        if name and not fields[name].strip():
            raise RejectedRecord(f"column {name!r} is empty")
    labels = tables.labels(fields, label_names)
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
        report=report if in_parts or columns.report else None,
        labels=labels,
        view=_frontal(fields.get(columns.view, "")),
        sections=(findings, impression),
    )


def _subject_columns(header: Sequence[str], taken: Collection[str]) -> dict[str, set[str]]:
    """Columns that by their names may hold subjects, patients first; each with an empty set for
    its values."""
    free = [name for name in header if name not in taken]
    people = [name for name in free if _PERSON.search(name)]
    ids = [name for name in free if _ID.search(name) and name not in people]
    return {name: set() for name in (*people, *ids)}


def _no_subject(guesses: dict[str, set[str]], count: int) -> str:
    """The note where no column of subjects is named: a repeated value may be a patient."""
    likely = {
        name: len(values)
        for name, values in guesses.items()
        if 1 < len(values) < count and (_PERSON.search(name) or 20 * len(values) > count)
    }
    note = "no subject column is named, so every image is a subject of its own"
    if not likely:
        return f"{note}: name one by ingest.pairs.subject where a patient has several images"
    columns = ", ".join(f"{shortened(name)!r} ({n} values)" for name, n in likely.items())
    return (
        f"{note}, and images of one patient can lie in several splits: set ingest.pairs.subject; "
        f"columns that look like subjects: {shortened(columns, 300)}"
    )


def _frontal(view: str) -> str:
    """PA or AP from a wording such as 'AP Supine'; '' for anything else."""
    return next((name for name, wording in _VIEWS.items() if wording.search(view)), "")


def _is_lateral(view: str) -> bool:
    """Whether a view is named, and is neither PA nor AP nor otherwise frontal."""
    words = set(re.findall("[a-z]+", view.lower()))
    lateral = words & {"l", "ll", "rl", "lat", "lateral"}
    return bool(words) and not _frontal(view) and bool(lateral or not words & _FRONTAL)
