"""What an ingestion is to write: which record goes to which shard, in which order.

The plan depends on the listing and the settings alone, so a run that was cut off finds its complete
shards again and writes only the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources import records
from medsyn_jax.data.store import directory as folders
from medsyn_jax.data.store import shards, splits
from medsyn_jax.data.store.items import label_counts

# Settings that do not change what is written.
_NOT_CONTENT = ("path", "workers", "max_reject_share")
_END = 4096  # bytes
# Settings that are newer than RECORDS_VERSION -> the value with which records are as before.
_LATER: dict[str, Any] = {}


@dataclasses.dataclass(frozen=True)
class Part:
    """The records of one shard, before they are made."""

    name: str
    split: str
    items: tuple[records.Item, ...]

    def finished(self, directory: Path) -> shards.Shard | None:
        """The shard in `directory`; None when it is missing, not whole, or not of these items."""
        shard = shards.finished(directory / self.name)
        if shard is None:
            return None
        others = [key for key, _ in (*shard.rejects, *shard.left_out)]
        keys = [item.key for item in self.items]
        same = sorted((*shard.keys, *others)) == sorted(keys) and shard.split == self.split
        return shard if same and shard.keys == [k for k in keys if k not in {*others}] else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is to be written."""

    parts: list[Part]
    label_names: tuple[str, ...]
    rejects: list[tuple[str, str]]  # those known from the listing
    dropped: dict[str, int]
    settings: dict[str, Any]
    fingerprint: str
    notes: list[str]  # lines for the user

    @property
    def total(self) -> int:
        """Records listed, good or bad."""
        return sum(len(part.items) for part in self.parts) + len(self.rejects)

    def of_earlier_version(self, directory: Path) -> Plan | None:
        """This plan under the name of the set in `directory`, if an earlier version of the package
        wrote that set with the same settings and records; None otherwise.

        Earlier versions named a set by their own code, too, so their name cannot be computed.
        """
        stored = folders.read_plan(directory)
        if stored is None or "records_version" in stored["settings"]:
            return None
        parts = {part.name: part for part in self.parts}
        files = [path.name for path in directory.glob("*.array_record-*")]
        same = {**stored["settings"], "records_version": shards.RECORDS_VERSION} == self.settings
        if not files or not same:
            return None
        if not all(name in parts and parts[name].finished(directory) for name in files):
            return None
        return dataclasses.replace(self, **stored)


def make_plan(config: Any) -> Plan:
    """Lists the source and decides where every record goes; no pixel is read."""
    listing = _list(config)
    seen: set[str] = set()
    items, rejects = [], list(listing.rejects)
    for item in listing.items:
        if item.key in seen:
            rejects.append((item.key, f"{item.image}: key {item.key} was listed before"))
        else:
            seen.add(item.key)
            items.append(item)
    if not items:
        left = "".join(f"; {n} left out ({why})" for why, n in listing.dropped.items())
        raise UserError(
            f"ingest: {config.path or config.source}: no usable record "
            f"({len(rejects)} rejected{', first: ' + rejects[0][1] if rejects else ''}{left})"
        )
    given = [(item.key, item.subject or item.key, item.split) for item in items]
    homes = splits.assign(given, config.split_shares, config.seed)
    notes = [*listing.notes, *splits.remarks(given, homes)]
    counts = label_counts(items, homes, listing.label_names)
    notes += [f"positive for {counts}"] if counts else []
    # In the order of a hash, so that any run of records is a fair sample of its split.
    items.sort(key=lambda item: splits.unit(config.seed, f"order/{item.key}"))
    parts = []
    for split in splits.SPLITS:
        members = [item for item in items if homes[item.key] == split]
        count = -(-len(members) // config.records_per_shard)
        for index in range(count):
            name = shards.shard_name(config.source, split, index, count)
            chunk = members[index * config.records_per_shard :][: config.records_per_shard]
            parts.append(Part(name, split, tuple(chunk)))
    settings = _settings(config)
    return Plan(
        parts,
        listing.label_names,
        rejects,
        listing.dropped,
        settings,
        _fingerprint(settings, parts),
        notes,
    )


def _list(config: Any) -> records.Listing:
    if config.source not in records.SOURCES:
        raise UserError(
            f"ingest.source: {config.source!r}: unknown, use one of {', '.join(records.SOURCES)}"
        )
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
    return records.SOURCES[config.source](config)


def _settings(config: Any) -> dict[str, Any]:
    """What of the config shapes the records: all but where they lie and how fast they are made."""
    values = json.loads(config.to_json())
    values.get("mimic_cxr", {}).pop("reports", None)
    without = {*records.SOURCES, *_NOT_CONTENT} - {config.source}
    without |= {name for name, value in _LATER.items() if values.get(name) == value}
    settings = {k: v for k, v in sorted(values.items()) if k not in without}
    return settings | {"records_version": shards.RECORDS_VERSION}


def _fingerprint(settings: dict[str, Any], parts: Sequence[Part]) -> str:
    """A hash of what decides what the shards hold; the same after the source is moved.

    Noticed: the settings, the version of the records, which record goes where, what the table or
    folder says of each, the size and the first and last 4 KiB of every image and report file.
    Not noticed: a change farther inside a file that keeps its size (to read all of a large source
    takes as long as to ingest it), and another version of Pillow, pydicom or ArrayRecord.
    """
    digest = hashlib.sha256(json.dumps([shards.FORMAT, settings], sort_keys=True).encode())
    with futures.ThreadPoolExecutor(32) as pool:  # a network disk may take its time for each
        for part in parts:
            digest.update(part.name.encode())
            for item, files in zip(part.items, pool.map(_files, part.items), strict=True):
                texts = (item.report, item.sections, [name for name, _ in item.masks])
                line = (item.key, item.subject, texts, item.labels, item.view, files)
                digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _files(item: records.Item) -> list:
    """The phantom's numbers, or size and hash of both ends of each file that the item names."""
    if not isinstance(item.image, str):
        return list(item.image)
    masks = [path for _, path in item.masks]
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
