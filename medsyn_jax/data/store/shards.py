"""Shards: TFDS data sets on ArrayRecord, written and read without TensorFlow.

`tfds.builder_from_directory(directory).as_data_source(split)` reads what is written here without
this package. `medsyn.json`, written last, tells what TFDS does not keep: label names, the sizes
that prove the files whole, hashes of the split files, and what the set was made from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from array_record.python.array_record_data_source import ArrayRecordDataSource
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.core.example_serializer import ExampleSerializer
from tensorflow_datasets.proto import tf_example_pb2

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.data.store import description, splits
from medsyn_jax.data.text import reports

FORMAT = 1
RECORDS_VERSION = 2  # raised by hand when the same source and settings give other records
INFO = "medsyn.json"
TEXTS = ("key", "subject", "report", "findings", "impression", "view")
ORIGIN = ("prompt", "seed", "generator")  # texts: what a synthetic image was made from
OPTIONAL = ("boxes", "latents", *ORIGIN)  # and any mask_<name>
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclasses.dataclass(frozen=True)
class Shard:
    """What one finished shard file holds."""

    name: str
    split: str
    keys: list[str]
    rejects: list[tuple[str, str]]  # (key, reason) of records that cannot be used
    left_out: list[tuple[str, str]]  # (key, reason) of records that a rule of selection drops
    optional: Sequence[str] | None  # the optional fields of its records; None when it has no record
    payload: int  # bytes of the records
    size: int  # bytes of the file


def is_mask(name: str) -> bool:
    """Whether a field of a record is a mask: any `mask_<name>`, 0 or 255."""
    return re.fullmatch(r"mask_\w+", name) is not None


def is_image(name: str) -> bool:
    """Whether a field of a record holds pixels."""
    return name == "image" or is_mask(name)


def shard_name(dataset: str, split: str, index: int, count: int) -> str:
    """The file name that TFDS expects."""
    return f"{dataset}-{split}.array_record-{index:05d}-of-{count:05d}"


def features(
    label_names: Sequence[str], optional: Sequence[str] = ()
) -> tfds.features.FeaturesDict:
    """The TFDS features of the record schema, with the `optional` fields that this set has."""
    t = tfds.features
    grey = functools.partial(t.Image, shape=(None, None, 1), dtype=np.uint8, encoding_format="png")
    labels = f"1 positive, 0 negative, -1 uncertain, -2 unknown: {', '.join(label_names)}"
    boxes = t.Sequence({"bbox": t.Tensor(shape=(4,), dtype=np.float32), "label": t.Text()})
    moments = "mean and log-variance of an autoencoder's latents, one behind the other"
    latents = t.Tensor(shape=(None,) * 3, dtype=np.float16, encoding="bytes", doc=moments)
    kinds = {"boxes": boxes, "latents": latents} | {name: t.Text() for name in ORIGIN}
    return t.FeaturesDict(
        {name: t.Text() for name in TEXTS}
        | {"image": grey(doc="grey, high is bright as on a viewing screen")}
        | {"labels": t.Tensor(shape=(len(label_names),), dtype=np.int8, doc=labels)}
        | {name: grey() if is_image(name) else kinds[name] for name in sorted(optional)}
    )


def write_shard(
    path: Path,
    split: str,
    examples: Iterable[Mapping[str, Any]],
    label_names: Sequence[str],
    rejects: Sequence[tuple[str, str]] = (),
    left_out: Sequence[tuple[str, str]] = (),
) -> Shard:
    """Writes one shard under a temporary name, checks it, notes what it holds, and renames it.

    Args:
        path: the final name.
        split: of the records.
        examples: records of the schema, images as PNG bytes.
        label_names: one for each entry of `labels`.
        rejects: (key, reason) of records that could not be used,
        left_out: and of those not wanted; both complete once `examples` has been consumed.

    Returns:
        What the shard holds; `finished(path)` gives it again later.

    Raises:
        OSError: with errno ENOSPC and the like when the disk is full; nothing is left at `path`.
    """
    with replaced(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1")
        try:
            keys, optional, payload = _write_records(writer, examples, label_names)
            writer.close()
            _check_written(temporary, len(keys))
        except RuntimeError as error:  # array_record tells of a full disk in words only, at the end
            for number in _DISK_FULL:
                if os.strerror(number) in str(error):
                    raise OSError(number, os.strerror(number), str(path)) from error
            raise
        finally:
            if writer.is_open():
                _close_quietly(writer)
        size, lists = temporary.stat().st_size, (list(rejects), list(left_out))
        shard = Shard(path.name, split, keys, *lists, optional, payload, size)
        write_text(_note(path), json.dumps(dataclasses.asdict(shard)))
    return shard


def finished(path: Path) -> Shard | None:
    """What the shard at `path` holds; None when it, or the note of what it holds, is not whole."""
    try:
        shard = Shard(**json.loads(_note(path).read_text()))
        lists = {n: [(k, why) for k, why in getattr(shard, n)] for n in ("rejects", "left_out")}
        texts = [text for pairs in lists.values() for pair in pairs for text in pair]
        sound = all(isinstance(text, str) for text in (*texts, *shard.keys))
        sound &= isinstance(shard.keys, list) and description.is_count(shard.payload)
        sound &= shard.name == path.name and f"-{shard.split}.array_record-" in path.name
        if not sound or shard.size != path.stat().st_size:
            return None
        count, first = _look(path)
        begun = [value(first, "key")] if first else []
        sound = (len(shard.keys), shard.keys[:1]) == (count, begun)
        if not sound or _optional(first) != shard.optional:
            return None
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, DecodeError):
        return None
    return dataclasses.replace(shard, **lists)


def write_text(path: Path, text: str) -> None:
    """Writes a file so that readers see the old one or the new one, never a part."""
    with replaced(path) as temporary:
        temporary.write_text(text)


def write_tfds_info(directory: Path, shards: Sequence[Shard], label_names: Sequence[str]) -> None:
    """Writes `dataset_info.json` and `features.json` for all `shards`, given in file order."""
    optional = {tuple(shard.optional) for shard in shards if shard.optional is not None}
    if len(optional) > 1:
        raise ValueError(f"{directory}: shards differ in their optional fields: {optional}")
    infos = []
    for split in dict.fromkeys(shard.split for shard in shards):
        members = [shard for shard in shards if shard.split == split]
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard.keys) for shard in members],
                num_bytes=sum(shard.payload for shard in members),
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=features(label_names, optional.pop() if optional else ()),
        split_infos=infos,
        check_data=False,  # that check reads through TensorFlow
        description="Radiographs with reports, written by medsyn_jax",
    )


def describe(directory: Path | str) -> dict[str, Any]:
    """Reads `medsyn.json`, and checks that what else describes the set agrees with it and that the
    files it lists are whole, by name and size.

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
    info = description.read_object(directory / INFO)
    if info.get("format") != FORMAT:
        raise UserError(
            f"data: {directory}: has format {str(info.get('format'))[:40]}, this version reads "
            f"{FORMAT}: ingest again into another directory"
        )
    description.check(directory, info, _stored_features)
    return info


def _stored_features(label_names: Sequence[str], fields: Sequence[str]) -> dict[str, Any]:
    """What `features.json` holds for records of these fields."""
    optional = sorted({*fields} - {*TEXTS, "image", "labels"})
    return MessageToDict(features(label_names, optional).to_proto())


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
        # With the number of records, no file is opened before it is read from.
        paths = [
            f"{self.directory / name}[0:{file['records']}]"
            for name, file in self.info["files"].items()
            if f"-{split}.array_record-" in name
        ]
        self.source = ArrayRecordDataSource(paths)
        self.label_names: list[str] = list(self.info["label_names"])

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self.features(index)
        names = ("image", *sorted(filter(is_mask, features)), *OPTIONAL)
        return {name: value(features, name) for name in (*TEXTS, "labels")} | {
            name: value(features, name) for name in names if _present(features, name)
        }

    def features(self, index: int) -> Mapping[str, Any]:
        """The stored fields of a record, to be decoded by `value` one by one."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            stored = _parsed(self.source[index])
            if value(stored, "key") != self.keys[index]:
                raise ValueError(f"its key is not that of splits/{self.split}.txt")
            return stored
        except (RuntimeError, ValueError, LookupError, DecodeError) as error:
            raise UserError(
                f"data: record {index} of {self.split} cannot be read, {self._file_of(index)} is "
                f"damaged ({str(error)[:80]}): restore it, or delete it and ingest again"
            ) from error

    def _file_of(self, index: int) -> Path:
        for name, file in self.info["files"].items():
            if f"-{self.split}.array_record-" in name:
                if index < file["records"]:
                    return self.directory / name
                index -= file["records"]
        raise IndexError(index)

    def texts(self, sections: Sequence[str]) -> list[str]:
        """What a model reads of every record, in order; see `text`."""
        return [text(self.features(index), sections) for index in range(len(self))]

    def subjects(self) -> list[str]:
        """The subject of every record, in order."""
        return [value(self.features(index), "subject") for index in range(len(self))]

    @functools.cached_property
    def keys(self) -> list[str]:
        """The key of every record, in order, from the split file, whose hash is checked."""
        sha256 = self.info["splits"][self.split]["sha256"]
        return splits.read_keys(self.directory / "splits" / f"{self.split}.txt", sha256)


def text(features: Mapping[str, Any], sections: Sequence[str]) -> str:
    """What a model reads of a stored record: its `sections`, or the whole report without them."""
    findings, impression, report = (
        value(features, n) for n in ("findings", "impression", "report")
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
    return decode_png(data) if is_image(name) else data.decode()


def decode_png(data: bytes) -> np.ndarray:
    """PNG bytes to uint8[h, w]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.array(image if image.mode == "L" else image.convert("L"))


def _present(features: Mapping[str, Any], name: str) -> bool:
    return {"boxes": "boxes/bbox", "latents": "latents/value"}.get(name, name) in features


def _note(path: Path) -> Path:
    return path.parent / "parts" / f"{path.name}.json"


def _write_records(
    writer: Any, examples: Iterable[Mapping[str, Any]], label_names: Sequence[str]
) -> tuple[list[str], Sequence[str] | None, int]:
    keys: list[str] = []
    optional: Sequence[str] | None = None
    encode = _encoder(label_names, ())
    payload = 0
    for example in examples:
        present = sorted(name for name in example if is_mask(name) or name in OPTIONAL)
        if optional is None:
            optional, encode = present, _encoder(label_names, present)
        if present != optional:
            raise ValueError(f"record {example['key']} has {present}, those before have {optional}")
        data = encode(example)
        writer.write(data)
        keys.append(example["key"])
        payload += len(data)
    return keys, optional, payload


def _encoder(label_names: Sequence[str], optional: Sequence[str]) -> Callable[[Mapping], bytes]:
    schema = features(label_names, optional)
    serializer = ExampleSerializer(schema.get_serialized_info())  # pyright: ignore[reportArgumentType]

    def encode(example: Mapping[str, Any]) -> bytes:
        stored = serializer.get_tf_example(schema.encode_example(dict(example)))
        # Without it, the order of the fields, and so every byte of a shard, is by chance.
        return stored.SerializeToString(deterministic=True)

    return encode


def _check_written(path: Path, count: int) -> None:
    """A shard that cannot be read back is found now, not in the middle of a training."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    if (found := _look(path)[0]) != count:
        raise OSError(errno.EIO, f"only {found} of {count} records can be read back", str(path))


def _look(path: Path) -> tuple[int, Mapping[str, Any] | None]:
    """The number of records in a shard file, and the stored fields of the first."""
    reader = array_record_module.ArrayRecordReader(str(path))
    try:
        count = reader.num_records()
        return count, _parsed(reader.read([0])[0]) if count else None
    finally:
        reader.close()


def _parsed(data: bytes) -> Mapping[str, Any]:
    example = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
    return example.FromString(data).features.feature


def _optional(stored: Mapping[str, Any] | None) -> list[str] | None:
    """The optional fields of a stored record; None without one."""
    if stored is None:
        return None
    names = (*filter(is_mask, stored), *OPTIONAL)
    return sorted(name for name in names if _present(stored, name))


def _close_quietly(writer: array_record_module.ArrayRecordWriter) -> None:
    with contextlib.suppress(RuntimeError):  # the error that brought us here is the one to tell
        writer.close()
