"""The files that describe a set, `medsyn.json` and TFDS's own: whether they are sound and agree."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import splits

_FIELDS = {"label_names": list, "splits": dict, "files": dict, "fingerprint": str, "source": str}
_FIELDS |= {"settings": dict}
_SHARD = re.compile(r"([^/]+)-(\w+)\.array_record-(\d{5})-of-(\d{5})")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "is not valid JSON") from error
    if not isinstance(found, dict):
        raise _refusal(path, "holds no JSON object")
    return found


def check(
    directory: Path,
    info: dict[str, Any],
    expected: Callable[[list[str], list[str]], dict[str, Any]],
) -> None:
    """Whether `info`, what `medsyn.json` holds, is sound, TFDS's files say the same, and the files
    it lists are whole, by name and size.

    TFDS itself tells of a file that is not as it should be in exceptions of every kind, or not at
    all, so it is not asked.

    Args:
        directory: of the set.
        info: a JSON object.
        expected: (label names, names of all fields of a record) -> what `features.json` holds;
            KeyError for a field that no record can have.

    Raises:
        UserError: naming the file and what of it is wrong.
    """
    if field := _wrong_field(info):
        raise _refusal(directory / "medsyn.json", f"{field}: is not as it was written")
    path = directory / "features.json"
    stored = read_object(path)
    try:
        same = expected(info["label_names"], list(stored["featuresDict"]["features"])) == stored
    except (KeyError, TypeError):
        same = False
    if not same:
        raise _refusal(path, "has other fields or label names than medsyn.json says")
    _check_dataset_info(directory / "dataset_info.json", info["files"])
    for name, file in info["files"].items():
        path = directory / name
        if not path.exists():
            raise UserError(f"data: {path}: is missing: restore it, or ingest again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"data: {path}: has {path.stat().st_size} bytes instead of {file['bytes']}, "
                "it was cut short or changed: restore it, or delete it and ingest again"
            )


def _check_dataset_info(path: Path, files: dict[str, Any]) -> None:
    stored, lengths = read_object(path), _lengths(files)
    dataset = next((match[1] for match in map(_SHARD.fullmatch, files) if match), None)
    wanted = {"fileFormat": "array_record", "name": dataset}
    for field in wanted if files else ():
        if stored.get(field) != wanted[field]:
            raise _refusal(path, f"{field}: is not as it was written")
    if not re.fullmatch(r"\d+\.\d+\.\d+", str(stored.get("version"))):
        raise _refusal(path, "version: is not as it was written")
    try:
        parts = stored.get("splits", [])
        counts = {part["name"]: list(map(int, part.get("shardLengths", []))) for part in parts}
        sound = {part.get("filepathTemplate") for part in parts} <= {_TEMPLATE}
        sound &= all(int(part.get("numBytes", 0)) >= 0 for part in parts)
        sound &= len(counts) == len(parts) and counts == lengths
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        raise _refusal(path, "has other splits or numbers of records than medsyn.json says")


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"data: {path}: {what}: restore the file, or ingest again")


def _wrong_field(info: dict[str, Any]) -> str:
    """The field that is missing, of another type, or at odds with another; "" for none."""
    for name, kind in _FIELDS.items():
        if not isinstance(info.get(name), kind):
            return name
    if not all(isinstance(name, str) for name in info["label_names"]):
        return "label_names"
    left_out = info.get("left_out", {})
    if not isinstance(left_out, dict) or not all(map(is_count, left_out.values())):
        return "left_out"
    if not is_count(info.get("rejects", 0)):
        return "rejects"
    for split, part in info["splits"].items():
        if split not in splits.SPLITS or not _has_counts(part, "records"):
            return "splits"
        if not isinstance(part.get("sha256"), str):
            return "splits"
    if not all(_has_counts(file, "records", "bytes") for file in info["files"].values()):
        return "files"
    named = [_SHARD.fullmatch(name) for name in info["files"]]
    if not all(named) or len({match[1] for match in named if match}) > 1:
        return "files"
    lengths = _lengths(info["files"])
    if not set(lengths) <= set(info["splits"]) or any(
        sum(lengths.get(split, ())) != part["records"] for split, part in info["splits"].items()
    ):
        return "splits, files"
    order = [(split, i, len(c)) for split, c in lengths.items() for i in range(len(c))]
    found = [(match[2], int(match[3]), int(match[4])) for match in named if match]
    return "" if found == order else "files"


def _has_counts(value: Any, *names: str) -> bool:
    return isinstance(value, dict) and all(is_count(value.get(name)) for name in names)


def _lengths(files: dict[str, Any]) -> dict[str, list[int]]:
    """The numbers of records of the shards of each split, in file order."""
    lengths: dict[str, list[int]] = {}
    for name, file in files.items():
        if match := _SHARD.fullmatch(name):
            lengths.setdefault(match[2], []).append(file["records"])
    return lengths


def is_count(value: Any) -> bool:
    """Whether JSON holds a number of things."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
