"""Reads shard directories: TFDS data sets on ArrayRecord, without TensorFlow.

`tfds.builder_from_directory(directory).as_data_source(split)` reads the same directories without
this package. `medsyn.json`, written last, holds what TFDS does not keep: label names, the sizes
that prove the files whole, hashes of the split files, and the origin of the set.
"""

from __future__ import annotations

import functools
import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from PIL import Image

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import schema, splits
from medsyn_jax.data.text import reports

FORMAT = 1
INFO = "medsyn.json"
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    """The file name that TFDS expects."""
    return f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; UserError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _refusal(path, "is not valid JSON") from error
    if not isinstance(value, dict):
        raise _refusal(path, "holds no JSON object")
    return value


def describe(directory: Path | str) -> dict[str, Any]:
    """Reads `medsyn.json`, and checks that TFDS's own files agree with it and that all shards
    exist and have their sizes.

    Raises:
        UserError: naming the directory when it is no finished data set, or the file that is
            missing, cut short, or at odds with the others.
    """
    directory = Path(directory)
    if not (directory / INFO).is_file():
        if ((home := directory / "shards") / INFO).exists():
            raise UserError(f"data: {directory}: holds no data set, but {home} does: name that")
        what = f"has no {INFO}: its ingestion did not end, or another program wrote it"
        if not (directory / "dataset_info.json").exists():
            what = "holds no data set"
        raise UserError(f"data: {directory}: {what}: run the ingest command into it")
    info = read_object(directory / INFO)
    if info.get("format") != FORMAT:
        raise UserError(
            f"data: {directory}: has format {str(info.get('format'))[:40]}, this version reads "
            f"{FORMAT}: ingest again into another directory"
        )
    if field := _wrong_field(info):
        raise _refusal(directory / INFO, f"{field}: is not as it was written")
    _check_tfds_files(directory, info)
    for name, file in info["files"].items():
        path = directory / name
        if not path.exists():
            raise UserError(f"data: {path}: is missing: restore it, or ingest again")
        if path.stat().st_size != file["bytes"]:
            raise UserError(
                f"data: {path}: has {path.stat().st_size} bytes instead of {file['bytes']}, "
                "it was cut short or changed: restore it, or delete it and ingest again"
            )
    return info


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"data: {path}: {what}: restore the file, or ingest again")


def _wrong_field(info: dict[str, Any]) -> str:
    """The field that is missing, of another type, or at odds with another; "" for none."""

    def lengths_agree() -> bool:
        records = {split: part["records"] for split, part in info["splits"].items()}
        lengths = _lengths(info["files"])
        summed = {split: sum(lengths.get(split, ())) for split in records}
        return lengths.keys() <= records.keys() and summed == records

    rules = {
        "label_names": lambda: (
            isinstance(info["label_names"], list)
            and all(isinstance(name, str) for name in info["label_names"])
        ),
        "fingerprint": lambda: isinstance(info["fingerprint"], str),
        "source": lambda: isinstance(info["source"], str),
        "settings": lambda: isinstance(info["settings"], dict),
        "left_out": lambda: all(map(_is_count, info.get("left_out", {}).values())),
        "rejects": lambda: _is_count(info.get("rejects", 0)),
        "splits": lambda: all(
            split in splits.SPLITS and _is_count(part["records"]) and _hashes(part)
            for split, part in info["splits"].items()
        ),
        "files": lambda: (
            list(info["files"]) == _names(info["files"])
            and all(
                _is_count(file[n]) for file in info["files"].values() for n in ("records", "bytes")
            )
        ),
        "splits, files": lengths_agree,
    }
    for field, is_sound in rules.items():
        try:
            if not is_sound():
                return field
        except (AttributeError, KeyError, TypeError):
            return field
    return ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _hashes(part: dict[str, Any]) -> bool:
    return all(isinstance(part.get(name, ""), str) for name in ("sha256", "subjects"))


def split_of(name: str) -> str:
    """The split in the name of a shard file."""
    return name.partition(".array_record-")[0].rpartition("-")[2]


def _dataset(files: Mapping[str, Any]) -> str | None:
    return next((name.rpartition(f"-{split_of(name)}.array_record")[0] for name in files), None)


def _lengths(files: Mapping[str, Any]) -> dict[str, list[int]]:
    """The numbers of records of the shards of each split, in file order."""
    lengths: dict[str, list[int]] = {}
    for name, file in files.items():
        lengths.setdefault(split_of(name), []).append(file["records"])
    return lengths


def _names(files: Mapping[str, Any]) -> list[str]:
    """The names that the files of a set must have."""
    dataset = (_dataset(files) or "").replace("/", "")
    lengths = {split: len(counts) for split, counts in _lengths(files).items()}
    return [shard_name(dataset, s, i, count) for s, count in lengths.items() for i in range(count)]


def _check_tfds_files(directory: Path, info: dict[str, Any]) -> None:
    """Raises UserError unless `features.json` and `dataset_info.json` agree with `medsyn.json`.

    TFDS reports damage in exceptions of every kind, or not at all, so its reader is not used.
    """
    path = directory / "features.json"
    stored = read_object(path)
    try:
        optional = {*stored["featuresDict"]["features"]} - {*schema.TEXTS, "image", "labels"}
        features = schema.features(info["label_names"], sorted(optional))
        agrees = MessageToDict(features.to_proto()) == stored
    except (KeyError, TypeError):
        agrees = False
    if not agrees:
        raise _refusal(path, "has other fields or label names than medsyn.json says")
    path, files = directory / "dataset_info.json", info["files"]
    stored = read_object(path)
    try:
        parts = stored.get("splits", [])
        lengths = {part["name"]: [int(n) for n in part.get("shardLengths", [])] for part in parts}
        agrees = len(parts) == len(lengths) and lengths == _lengths(files)
        agrees &= all(part["filepathTemplate"] == _TEMPLATE for part in parts)
        agrees &= all(int(part.get("numBytes", 0)) >= 0 for part in parts)
        agrees &= re.fullmatch(r"\d+\.\d+\.\d+", stored["version"]) is not None
        kind = (stored["fileFormat"], stored["name"]) if files else ()
        agrees &= kind == (("array_record", _dataset(files)) if files else ())
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
        agrees = False
    if not agrees:
        what = "has other splits, numbers of records, name, fileFormat or version"
        raise _refusal(path, f"{what} than medsyn.json says")


class Records:
    """Random access to the records of one split of a shard directory.

    `records[i]` is a dict: texts as str, images and masks as uint8[h, w], labels as int8[l],
    latents as float16[p, q, 2 z], boxes as a list of {"bbox": float32[4], "label": str}; of the
    optional fields those it has.

    Raises:
        UserError: for a directory that is not whole, or a split that it lacks.
    """

    def __init__(self, directory: Path | str, split: str):
        self.directory, self.split = Path(directory), split
        self.info = describe(directory)
        if not self.info["splits"].get(split, {}).get("records"):
            have = [name for name, s in self.info["splits"].items() if s["records"]]
            raise UserError(f"data: {directory}: split {split} has no record, it has {have}")
        files = self.info["files"].items()
        self._files = {name: file["records"] for name, file in files if split_of(name) == split}
        # With the number of records, no file is opened before it is read from.
        self.source = ArrayRecordDataSource(
            [f"{self.directory / name}[0:{count}]" for name, count in self._files.items()]
        )
        self.label_names: list[str] = list(self.info["label_names"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        stored = self.features(index)
        names = (*schema.TEXTS, "labels", "image", *schema.optional_fields(stored))
        return {name: value(stored, name) for name in names}

    def features(self, index: int) -> Mapping[str, Any]:
        """The stored fields of a record, to be decoded by `value` one by one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            stored = schema.parse(self.source[index])
            if value(stored, "key") != self.keys[index]:
                raise ValueError(f"its key is not that of splits/{self.split}.txt")
            return stored
        except (RuntimeError, ValueError, LookupError, DecodeError) as error:
            bounds = np.cumsum([*self._files.values()])
            name = [*self._files][int(np.searchsorted(bounds, index, "right"))]
            raise UserError(
                f"data: record {index} of {self.split} cannot be read, {self.directory / name} is "
                f"damaged ({str(error)[:80]}): restore it, or delete it and ingest again"
            ) from error

    def texts(self, sections: Sequence[str]) -> list[str]:
        """What a model reads of every record, in order; see `text`."""
        return [text(self.features(index), sections) for index in range(len(self))]

    @functools.cached_property
    def keys(self) -> list[str]:
        """The key of every record, in order, from the split file, whose hash is checked."""
        part = self.info["splits"][self.split]
        return splits.read_keys(splits.keys_path(self.directory, self.split), part["sha256"])

    def subjects(self) -> list[str]:
        """The subject of every record, in order. Sets of earlier versions have no file of
        subjects: there, every record is read."""
        return self._subjects

    @functools.cached_property
    def _subjects(self) -> list[str]:
        sha256 = self.info["splits"][self.split].get("subjects")
        if sha256 is None:
            return [value(self.features(index), "subject") for index in range(len(self))]
        return splits.read_subjects(splits.subjects_path(self.directory, self.split), sha256)


def text(features: Mapping[str, Any], sections: Sequence[str]) -> str:
    """What a model reads of a stored record: its `sections`, or the whole report without them."""
    findings, impression, report = (
        value(features, name) for name in ("findings", "impression", "report")
    )
    return reports.select_text(findings, impression, report, tuple(sections))


def open_split(directory: Path | str, split: str) -> Records:
    """Random access to the records of one split; see `Records`."""
    return Records(directory, split)


def value(features: Mapping[str, Any], name: str) -> Any:
    """Decodes one field of a stored record; the type is as in `Records`."""
    if name == "labels":
        return np.array(features["labels"].int64_list.value, np.int8)
    if name == "boxes":
        corners = np.array(features["boxes/bbox"].float_list.value, np.float32).reshape(-1, 4)
        names = features["boxes/label"].bytes_list.value
        return [{"bbox": c, "label": n.decode()} for c, n in zip(corners, names, strict=True)]
    if name == "latents":
        shape = features["latents/shape"].int64_list.value
        return np.frombuffer(features["latents/value"].bytes_list.value[0], "<f2").reshape(shape)
    data = features[name].bytes_list.value[0]
    return decode_png(data) if schema.is_image(name) else data.decode()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes to uint8[h, w]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image if image.mode == "L" else image.convert("L"))
