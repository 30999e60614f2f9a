"""Prompts for a generator, from shards, a CSV or the reports of MIMIC-CXR."""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import tokenizers as hf

from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import mimic_cxr, records, tables
from medsyn_jax.data.store import schema, shards, splits
from medsyn_jax.data.store.items import key_of
from medsyn_jax.data.text import reports
from medsyn_jax.data.text.tokenizers import Tokenizer

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """The origin of one or several images; all but `text` is handed on to their records."""

    key: str  # unique, ASCII without spaces
    subject: str
    split: str  # train, valid or test
    text: str  # what the generator reads
    report: str = ""  # whole and raw
    findings: str = ""
    impression: str = ""
    labels: tuple[int, ...] = ()
    view: str = ""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of a source, in its order, and those that cannot be used."""

    items: list[Prompt]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]]  # (key, reason)
    truncated: int = 0  # prompts that were too long for the text encoder
    control_characters: int = 0  # prompts that had some
    marked: int = 0  # prompts whose report held marks of de-identification, taken out


def from_shards(
    directory: Path | str, wanted: Sequence[str], sections: Sequence[str], limit: int = 0
) -> Prompts:
    """The `sections` of the reports in the `wanted` splits of a shard directory, the first `limit`
    of them if it is not 0.

    Raises:
        UserError: for a directory that is not whole, or one without a record in these splits.
    """
    info = shards.describe(directory)
    items = []
    for split in wanted:
        if not info["splits"].get(split, {}).get("records"):
            continue
        opened = shards.open_split(directory, split)
        left = limit - len(items) if limit else len(opened)
        for i in range(min(left, len(opened))):
            stored = opened.features(i)
            texts = {name: shards.value(stored, name) for name in schema.TEXTS}
            labels = tuple(shards.value(stored, "labels").tolist())
            text = shards.text(stored, sections)
            items.append(Prompt(split=split, text=text, labels=labels, **texts))
    if not items:
        raise UserError(f"prompts: {directory}: no record in the splits {', '.join(wanted)}")
    return Prompts(items, tuple(info["label_names"]), [])


def from_csv(
    path: Path | str,
    columns: Any,
    wanted: Sequence[str],
    shares: Sequence[float],
    seed: int,
    limit: int = 0,
) -> Prompts:
    """The rows of a CSV in UTF-8; a row with a label that is none, or an earlier row's key, is
    rejected.

    Args:
        path: of the table.
        columns: names of the columns `prompt`, `key`, `subject`, `split`, `view` ("": there is
            none) and, in a tuple, `labels` (1, 0, -1 or empty). Without a key it is row-<number>;
            without a subject every prompt is one of its own.
        wanted: splits; the rows of others are left out.
        shares: of train, valid and test, by subject, where there is no column of splits.
        seed: of that draw.
        limit: of the number of prompts, if it is not 0.

    Raises:
        UserError: for a table that is missing, broken or lacks a column, and a row of the wrong
            length or encoding.
    """
    path = Path(path)
    names = [n for n in ("prompt", "key", "subject", "split", "view") if columns[n]]
    settings = {columns[n]: f"data.columns.{n}" for n in names}
    settings |= dict.fromkeys(columns.labels, "data.columns.labels")
    rows: dict[str, tuple[Prompt, str | None]] = {}
    rejects = []
    for number, fields in tables.rows(path, settings):
        key = key_of(fields[columns.key].strip()) or f"row-{number}"
        try:
            if key in rows:
                raise RejectedRecord(f"key {key} was listed before")
            rows[key] = _from_row(key, fields, columns), fields[columns.split].strip() or None
        except RejectedRecord as error:
            rejects.append((key, f"{path}: row {number}: {error}"))
    homes = splits.assign([(p.key, p.subject, s) for p, s in rows.values()], shares, seed)
    placed = [dataclasses.replace(p, split=homes[p.key]) for p, _ in rows.values()]
    items = [p for p in placed if p.split in wanted]
    if placed and not items:
        raise UserError(f"prompts: {path}: no row in the splits {', '.join(wanted)}")
    return Prompts(items[: limit or None], tuple(columns.labels), rejects)


def _from_row(key: str, fields: dict[str, str], columns: Any) -> Prompt:
    text = fields[columns.prompt]
    labels = tables.labels(fields, columns.labels)
    sections = {n: reports.clean(t) for n, t in reports.sections(text).items()}
    view = fields[columns.view].strip().upper()
    return Prompt(
        key=key,
        subject=fields[columns.subject].strip() or key,
        split="",
        text=text,
        report=text,
        findings=sections.get("findings", ""),
        impression=sections.get("impression", ""),
        labels=labels,
        view=view if view in ("PA", "AP") else "",
    )


def fit(prompts: Prompts, tokenizer: Tokenizer, length: int) -> Prompts:
    """Prompts that a text encoder can read as they are.

    Control characters and marks of de-identification (`___`, `XXXX`, ...) are taken out, white
    space becomes single spaces, and what is too long is cut off behind a word.

    Args:
        prompts: of any source.
        tokenizer: of the text encoder.
        length: of its input in tokens, start and end marks included.

    Returns:
        The same; those without a word become rejects.

    Raises:
        UserError: when no prompt is left.
    """
    backend = hf.Tokenizer.from_str(tokenizer.backend.to_str())
    backend.no_truncation()
    backend.no_padding()

    def count(text: str) -> int:
        return len(backend.encode(text))

    items, rejects, controls, truncated, marked = [], list(prompts.rejects), 0, 0, 0
    for item in prompts.items:
        text = reports.clean(item.text)
        if not text:
            rejects.append((item.key, "the prompt is empty"))
            continue
        controls += bool(_CONTROL.search(item.text))
        marked += reports.has_marks(item.text) or reports.has_marks(item.report)
        if count(text) > length:
            text = _shortened(text, count, length)
            truncated += 1
        items.append(dataclasses.replace(item, text=text))
    if not items:
        first = f", first: {rejects[0][0]} ({rejects[0][1]})" if rejects else ""
        raise UserError(f"prompts: none can be used, {len(rejects)} were rejected{first}")
    return Prompts(items, prompts.label_names, rejects, truncated, controls, marked)


def _shortened(text: str, count: Callable[[str], int], length: int) -> str:
    """The longest start of `text` with at most `length` tokens, in whole words; in letters, where
    even the first word is longer."""
    for pieces, space in ((text.split(" "), " "), (list(text), "")):
        most = range(1, len(pieces) + 1)
        fitting = bisect.bisect_right(most, length, key=lambda n: count(space.join(pieces[:n])))
        if fitting:
            return space.join(pieces[:fitting])
    return ""


def is_mimic(path: Path) -> bool:
    """Whether a folder holds the tables of MIMIC-CXR-JPG, and no shards."""
    return mimic_cxr.table_path(path, "metadata").exists() and not (path / shards.INFO).exists()


def from_mimic(
    root: Path | str,
    folder: Path | str,
    wanted: Sequence[str],
    sections: Sequence[str],
    limit: int = 0,
) -> Prompts:
    """The reports of MIMIC-CXR, one prompt for each of their frontal images, which are not read.

    Args:
        root: holds the tables of MIMIC-CXR-JPG, `mimic-cxr-2.0.0-{metadata,split,chexpert}.csv.gz`.
        folder: holds the reports; "": as `root`.
        wanted: splits; the images of others are left out.
        sections: that make up a prompt.
        limit: of the number of prompts, if it is not 0.

    Raises:
        UserError: a table or the reports are missing, or a table is broken.
    """
    root = Path(root)
    listed, rejects, _ = mimic_cxr.read_tables(root, frontal_only=True)
    if not listed:
        first = f", first: {rejects[0][1]}" if rejects else ""
        raise UserError(f"prompts: {root}: its tables list no frontal image{first}: check them")
    images = [image for image in listed if image.split in wanted][: limit or None]
    if not images:
        raise UserError(f"prompts: {root}: no frontal image in the splits {', '.join(wanted)}")
    studies = [*dict.fromkeys(image.study for image in images)]
    place = mimic_cxr.find_reports(studies, folder or root, "data.reports")
    with futures.ThreadPoolExecutor(32) as pool:  # a network disk may take its time for each
        texts = pool.map(lambda study: _report(f"{place / study}.txt"), studies)
        by_study = dict(zip(studies, texts, strict=True))
    items = []
    for image in images:
        report = by_study[image.study]
        if isinstance(report, RejectedRecord):
            rejects.append((image.key, str(report)))
            continue
        parts = reports.sections(report)
        main = {n: reports.clean(parts.get(n, "")) for n in ("findings", "impression")}
        text = reports.select_text(**main, report=report, sections=tuple(sections))
        more = {**main, "labels": image.labels, "view": image.view}
        items.append(Prompt(image.key, image.subject, image.split, text, report, **more))
    return Prompts(items, mimic_cxr.LABELS, rejects)


def _report(path: str) -> str | RejectedRecord:
    try:
        return records.read_report(path)
    except RejectedRecord as error:
        return error
