"""The source `openi`: Indiana University's chest X-rays (Demner-Fushman et al. 2016) in the layout
of the Kaggle set `chest-xrays-indiana-university`."""

from collections import Counter
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import folder, records, tables
from medsyn_jax.data.store.items import NOT_FRONTAL, Item, Listing, key_of
from medsyn_jax.data.text import reports

_FOLDERS = ("images/images_normalized", "images_normalized", "images")
_SECTIONS = ("findings", "impression")

make = records.make


def list_items(config: Any) -> Listing:
    """The images of `indiana_projections.csv` with the reports of `indiana_reports.csv`.

    A `uid` is a report with all of its images, and here the subject: the set names no patients.
    Findings and impression are the columns of these names, `XXXX` stands for what was removed. The
    set brings no split and no labels.

    Raises:
      UserError: a table or the folder of images is missing, or a table is broken.
    """
    root = folder.root_of(config)
    images = next((root / name for name in _FOLDERS if (root / name).is_dir()), None)
    if images is None:
        raise UserError(f"openi: {root}: holds no folder {_FOLDERS[0]}: set ingest.path")
    files = {*folder.image_files(images, Counter())}
    rejects: list[tuple[str, str]] = []
    texts = _reports(root / "indiana_reports.csv", rejects)
    items: list[Item] = []
    laterals, listed, used = 0, set(), set()
    path = root / "indiana_projections.csv"
    with tables.read(path, ("uid", "filename", "projection")) as (header, rows):
        for number, row in rows:
            try:
                fields = tables.fields(header, row)
                uid, name = fields["uid"].strip(), fields["filename"].strip()
                listed.add(name)
                used.add(uid)
                if config.frontal_only and fields["projection"].strip().lower() != "frontal":
                    laterals += 1
                    continue
                if uid not in texts:
                    raise RejectedRecord(f"uid {shortened(uid)!r} has no report")
                if name not in files:
                    raise RejectedRecord(f"{shortened(name)!r} is not in {images}")
            except RejectedRecord as error:
                rejects.append((f"row-{number}", f"{path}: row {number}: {error}"))
                continue
            report, sections = texts[uid]
            image = str(images / name)
            items.append(Item(key_of(name), uid, None, image, report, sections=sections))
    notes = ["openi names no patients: all images of one report (uid) are one subject"]
    if without := [uid for uid in texts if uid not in used]:
        notes.append(f"{len(without)} reports are of no image, such as that of uid {without[0]}")
    dropped = {NOT_FRONTAL: laterals} if laterals else {}
    if lone := sorted(files - listed):
        dropped["image in no table"] = len(lone)
        notes.append(f"{len(lone)} images are in no row of {path}, such as {shortened(lone[0])}")
    return Listing(items, (), rejects, dropped, notes)


def _reports(
    path: Path, rejects: list[tuple[str, str]]
) -> dict[str, tuple[str, tuple[str | None, str | None]]]:
    """uid -> report under its heads, (findings, impression); unusable rows go to `rejects`."""
    texts: dict[str, tuple[str, tuple[str | None, str | None]]] = {}
    with tables.read(path, ("uid", *_SECTIONS)) as (header, rows):
        for number, row in rows:
            try:
                fields = tables.fields(header, row)
                uid = fields["uid"].strip()
                if not uid or uid in texts:
                    raise RejectedRecord(f"uid {shortened(uid)!r} is empty or was in a row before")
            except RejectedRecord as error:
                rejects.append((f"report-{number}", f"{path}: row {number}: {error}"))
                continue
            findings, impression = (reports.without_head(fields[name], name) for name in _SECTIONS)
            parts = {"FINDINGS": findings, "IMPRESSION": impression}
            whole = "\n\n".join(f"{head}: {text}" for head, text in parts.items() if text)
            texts[uid] = whole, (findings, impression)
    return texts
