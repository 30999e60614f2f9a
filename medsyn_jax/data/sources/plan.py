"""The plan of an ingestion: which record goes to which shard, in which order.

The plan depends on the listing and the settings alone, so a run that was cut off finds its complete
shards again and writes only the others.

Fields of the ingest config, besides those of the sources (`ingest.<source>`):
  source: a name in SOURCES; path: its files,
  splits: a published split list (`names.read_split_list`), or "",
  size (pixels), sections, min_tokens, frontal_only, seed, split_shares, records_per_shard,
  bits: used in the images of 16, 0 = each image's own (`decode.decode_grey`),
  display: of DICOM files (`dicom.decode`),
  inverted: whether bone is dark in the files of this source, although they do not say so,
  square: how images become square (`decode.square`),
  workers: processes, 0 = one a core; max_reject_share: of the records.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources import (
    chexpert,
    chexpert_plus,
    coco,
    covidx,
    folder,
    masks,
    medmnist,
    mimic_cxr,
    names,
    nih,
    object_cxr,
    openi,
    pairs,
    phantom,
    rsna,
    siim,
    vindr,
)
from medsyn_jax.data.store import shards, splits
from medsyn_jax.data.store.build import Part, Plan, divide
from medsyn_jax.data.store.items import Item, Runs, annotation_counts

# A source is a module, called as in the config, with `list_items(config) -> Listing` and
# `make(item, config) -> record`.
_MODULES: tuple[ModuleType, ...] = (
    phantom,
    pairs,
    mimic_cxr,
    folder,
    covidx,
    object_cxr,
    nih,
    vindr,
    chexpert,
    chexpert_plus,
    rsna,
    siim,
    openi,
    medmnist,
    coco,
    masks,
)
SOURCES = {module.__name__.rpartition(".")[2]: module for module in _MODULES}
RECORDS_VERSION = 2  # raised by hand when the same source and settings give other records

# Settings that do not change what is written.
_NOT_CONTENT = ("path", "splits", "workers", "max_reject_share")
_END = 4096  # bytes
# Settings that are newer than RECORDS_VERSION -> the value with which records are as before.
_LATER: dict[str, Any] = {"splits": ""}


def make_plan(config: Any) -> Plan:
    """Lists the source and decides where every record goes; no pixel is read.

    Raises:
        UserError: for invalid settings, a source that cannot be listed or lists no usable record,
            and splits that make no sense.
    """
    _check(config)
    path = config.get("splits", "")
    split_list = names.read_split_list(Path(path)) if path else None  # before a long listing
    listing = SOURCES[config.source].list_items(config)
    by_key: dict[str, Item] = {}
    rejects = [*listing.rejects]
    for item in listing.items:
        if item.key in by_key:
            rejects.append((item.key, f"{item.image}: key {item.key} was listed before"))
        else:
            by_key[item.key] = item
    items = [*by_key.values()]
    if not items:
        left = "".join(f"; {n} left out ({why})" for why, n in listing.dropped.items())
        raise UserError(
            f"ingest: {config.path or config.source}: no usable record "
            f"({len(rejects)} rejected{', first: ' + rejects[0][1] if rejects else ''}{left})"
        )
    notes, left_out = [*listing.notes], {**listing.dropped}
    if split_list:
        count = len(items)
        items, lines = split_list.assign(items)
        notes += lines
        left_out |= {names.NOT_IN_LIST: count - len(items)} if count > len(items) else {}
    listed = [(item.key, item.subject or item.key, item.split) for item in items]
    homes = splits.assign(listed, config.split_shares, config.seed)
    notes += splits.remarks(listed, homes)
    notes += annotation_counts(items, homes, listing.label_names)
    # In the order of a hash, so that any run of records is a fair sample of its split.
    items.sort(key=lambda item: splits.unit(config.seed, f"order/{item.key}"))
    members = {s: [item for item in items if homes[item.key] == s] for s in splits.SPLITS}
    parts = divide(config.source, members, config.records_per_shard)
    settings = _settings(config) | ({"splits": split_list.sha256} if split_list else {})
    return Plan(
        parts=parts,
        label_names=listing.label_names,
        source=config.source,
        settings=settings,
        fingerprint=_fingerprint(settings, parts),
        others="the records or files of the source",
        rejects=rejects,
        left_out=left_out,
        notes=notes,
    )


def _check(config: Any) -> None:
    """Raises UserError for settings that no source can use."""
    if config.source not in SOURCES:
        names = ", ".join(SOURCES)
        raise UserError(f"ingest.source: {config.source!r}: unknown, use one of {names}")
    if config.records_per_shard < 1 or config.size < 1:
        raise UserError("ingest: size and records_per_shard must be at least 1")
    if not 0 <= config.max_reject_share <= 1:
        raise UserError(
            f"ingest.max_reject_share: {config.max_reject_share}: give a share from 0 to 1"
        )
    if config.bits not in (0, *range(8, 17)):
        raise UserError(f"ingest.bits: {config.bits}: use 8 to 16, or 0 to ask every image")
    for field, choices in (("display", decode.DISPLAYS), ("square", decode.SQUARES)):
        if config[field] not in choices:
            raise UserError(f"ingest.{field}: {config[field]!r}: use one of {', '.join(choices)}")


def _settings(config: Any) -> dict[str, Any]:
    """The settings that shape the records: all but the places of files and the speed."""
    values = json.loads(config.to_json())
    values.get("mimic_cxr", {}).pop("reports", None)
    without = {*SOURCES, *_NOT_CONTENT} - {config.source}
    without |= {name for name, value in _LATER.items() if values.get(name) == value}
    settings = {k: v for k, v in sorted(values.items()) if k not in without}
    return settings | {"records_version": RECORDS_VERSION}


def _fingerprint(settings: dict[str, Any], parts: Sequence[Part]) -> str:
    """A hash of what decides the contents of the shards; the same after the source is moved.

    It covers the settings, which record goes where, what the table or folder says of each, and the
    size and the first and last 4 KiB of every image and report file. It does not cover a change
    farther inside a file that keeps its size (to read all of a large source takes as long as to
    ingest it), nor the versions of Pillow, pydicom and ArrayRecord.
    """
    digest = hashlib.sha256(json.dumps([shards.FORMAT, settings], sort_keys=True).encode())
    with futures.ThreadPoolExecutor(32) as pool:  # a network disk may take its time for each
        for part in parts:
            digest.update(part.name.encode())
            for item, files in zip(part.items, pool.map(_files, part.items), strict=True):
                texts = (item.report or "", item.sections, [name for name, _ in item.masks])
                line = (item.key, item.subject, texts, item.labels, item.view, files)
                line += (item.boxes,) if item.boxes is not None else ()
                line += (item.size,) if item.size else ()
                runs = [mask for _, mask in item.masks if isinstance(mask, Runs)]
                line += tuple((r.height, r.width, r.counts) for r in runs)
                digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _files(item: Item) -> list:
    """The phantom's numbers, or size and hash of both ends of each file that the item names."""
    if not isinstance(item.image, str):
        return [*item.image]
    masks = [mask for _, mask in item.masks if isinstance(mask, str)]
    return [_ends(path) for path in (item.image, item.report_path, *masks) if path]


def _ends(path: str) -> tuple[int, str]:
    try:
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(_END)
            if size > 2 * _END:
                file.seek(-_END, os.SEEK_END)
            ends += file.read(_END)
    except (OSError, ValueError):  # the latter of a NUL in the path
        return -1, ""
    return size, hashlib.sha256(ends).hexdigest()
