"""Writes one shard file, with a note of its contents in `parts/`."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from google.protobuf.message import DecodeError

from medsyn_jax.core.files import replaced, write_text
from medsyn_jax.data.store import schema, shards


@dataclasses.dataclass(frozen=True)
class Shard:
    """Contents of a finished shard file."""

    name: str
    split: str
    keys: list[str]
    rejects: list[Any]  # (key, reason) of records that cannot be used
    left_out: list[Any]  # (key, reason) of records that a rule of selection drops
    optional: list[str] | None  # the optional fields of its records; None without a record
    payload: int  # bytes of the records
    size: int  # bytes of the file


def write_shard(
    path: Path,
    records: Iterable[Mapping[str, Any]],
    label_names: Sequence[str],
    rejects: Sequence[tuple[str, str]] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> Shard:
    """Writes one shard under a temporary name, checks it, notes what it holds, and renames it.

    Args:
        path: the final name.
        records: of the schema, images as PNG bytes.
        label_names: one for each entry of `labels`.
        rejects: (key, reason) of records that could not be used,
        left_out: and of those not wanted; both complete once `records` has been consumed.

    Raises:
        UserError: for a full disk; nothing is left at `path`.
    """
    with replaced(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            keys, optional, payload = _write_records(writer, records, label_names)
            writer.close()
            _check_written(temporary, len(keys))
        finally:
            if writer.is_open():
                with contextlib.suppress(RuntimeError):  # the first error is the one to report
                    writer.close()
        size = temporary.stat().st_size
        split, lists = shards.split_of(path.name), (list(rejects), list(left_out))
        shard = Shard(path.name, split, keys, *lists, optional, payload, size)
        write_text(_note(path), json.dumps(dataclasses.asdict(shard)))
    return shard


def _write_records(
    writer: Any, records: Iterable[Mapping[str, Any]], label_names: Sequence[str]
) -> tuple[list[str], list[str] | None, int]:
    keys: list[str] = []
    optional: list[str] | None = None
    encode = schema.encoder(label_names, ())
    payload = 0
    for record in records:
        fields = schema.optional_fields(record)
        if optional is None:
            optional, encode = fields, schema.encoder(label_names, fields)
        if fields != optional:
            raise ValueError(f"record {record['key']} has {fields}, those before have {optional}")
        data = encode(record)
        writer.write(data)
        keys.append(record["key"])
        payload += len(data)
    return keys, optional, payload


def _check_written(path: Path, count: int) -> None:
    """Raises OSError for a shard that cannot be read back: now, not in the middle of a training."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if (readable := _look(path)[0]) != count:
        raise OSError(errno.EIO, f"only {readable} of {count} records can be read back", str(path))


def _look(path: Path) -> tuple[int, Mapping[str, Any] | None]:
    """The number of records in a shard file, and the stored fields of the first."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        return count, schema.parse(reader.read([0])[0]) if count else None
    finally:
        reader.close()


def _note(path: Path) -> Path:
    return path.parent / "parts" / f"{path.name}.json"


def finished(path: Path) -> Shard | None:
    """The contents of the shard at `path`; None when the shard or its note is not whole."""
    try:
        shard = Shard(**json.loads(_note(path).read_text()))
        lists = {n: [(k, why) for k, why in getattr(shard, n)] for n in ("rejects", "left_out")}
        texts = [text for pairs in lists.values() for pair in pairs for text in pair]
        count, first = _look(path)
        sound = (
            all(isinstance(text, str) for text in (*texts, *shard.keys))
            and isinstance(shard.keys, list)
            and type(shard.payload) is int
            and shard.payload >= 0
            and shard.name == path.name
            and shard.split == shards.split_of(path.name)
            and shard.size == path.stat().st_size
            and len(shard.keys) == count
            and shard.keys[:1] == ([shards.value(first, "key")] if first else [])
            and shard.optional == (schema.optional_fields(first) if first else None)
        )
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, DecodeError):
        return None
    return dataclasses.replace(shard, **lists) if sound else None
