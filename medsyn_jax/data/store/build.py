"""Writes sets of shards: ingested, generated, or copied with latents; restartable.

A set is planned as parts, one a shard, which any number of processes write. `medsyn.json` is
written last. A run that was cut off leaves finished shards, which the same plan completes.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import fcntl
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import full_disk_is_user_error, write_text
from medsyn_jax.core.log import console
from medsyn_jax.data.store import schema, shards, splits, writer
from medsyn_jax.data.store.writer import Shard

PLAN_FILE, REJECTS = "plan.json", "rejects.csv"
_HEAD = ["key", "reason"]
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclasses.dataclass(frozen=True)
class Part:
    """The items of one shard."""

    name: str  # of the file
    split: str
    items: Sequence[Any]  # each with a `key` and a `subject`

    def finished(self, directory: Path) -> Shard | None:
        """The shard in `directory`; None when it is missing, not whole, or not of these items."""
        shard = writer.finished(directory / self.name)
        if shard is None or shard.split != self.split:
            return None
        dropped = dict(shard.rejects + shard.left_out)
        keys = [item.key for item in self.items]
        kept = [key for key in keys if key not in dropped]
        count = len(shard.rejects) + len(shard.left_out)
        return shard if shard.keys == kept and len(kept) + count == len(keys) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A set to be written."""

    parts: Sequence[Part]
    label_names: Sequence[str]
    source: str
    settings: dict[str, Any]  # JSON
    fingerprint: str
    others: str  # what else decides what is stored, for a message: "the prompts"
    rejects: Sequence[tuple[str, str]] = ()  # (key, reason) of records that are in no part
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)  # reason -> records
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # more for `medsyn.json`
    notes: Sequence[str] = ()  # lines for the user

    @property
    def total(self) -> int:
        """The number of records in the parts and among the rejects."""
        return sum(len(part.items) for part in self.parts) + len(self.rejects)

    def of_earlier_version(self, directory: Path) -> Plan | None:
        """This plan under the name of the set in `directory`, if an earlier version of the package
        wrote that set with the same settings and records; None otherwise.

        Earlier versions named a set by their own code, too, so their name cannot be computed.
        """
        stored = _read_plan(directory)
        if stored is None or "records_version" in stored["settings"]:
            return None
        parts = {part.name: part for part in self.parts}
        files = [path.name for path in directory.glob("*.array_record-*")]
        version = {"records_version": self.settings.get("records_version")}
        if not files or stored["settings"] | version != self.settings:
            return None
        if not all(name in parts and parts[name].finished(directory) for name in files):
            return None
        settings, fingerprint = stored["settings"], stored["fingerprint"]
        return dataclasses.replace(self, settings=settings, fingerprint=fingerprint)


def divide(dataset: str, items: Mapping[str, Sequence[Any]], size: int) -> list[Part]:
    """Parts of at most `size` items each. dataset: in the names of files. items: by split."""
    parts = []
    for split in splits.SPLITS:
        members = items.get(split, ())
        starts = range(0, len(members), size)
        for i, start in enumerate(starts):
            name = shards.shard_name(dataset, split, i, len(starts))
            parts.append(Part(name, split, tuple(members[start : start + size])))
    return parts


def write(
    directory: Path,
    plan: Plan,
    make: Callable[[Sequence[Part]], None],
    process: int = 0,
    processes: int = 1,
    wait: Callable[[str], None] = lambda what: None,
) -> bool:
    """Writes the set of `plan`, or completes what an earlier run began.

    Args:
        directory: where to; made if missing.
        plan: of the set.
        make: writes by `write_shard` those of the given parts that are not finished.
        process: the number of this process, below `processes`; each takes its share of the parts.
        processes: how many see the directory and call this function.
        wait: waits until all of them have called it with the same text.

    Returns:
        Whether the set was not complete before.

    Raises:
        UserError: for a full disk, or a directory that holds something else or no record in the
            end. What was complete is kept.
    """
    if processes == 1 and is_complete(directory, plan):
        return False
    first = process == 0
    lock = _only_writer(directory) if first else contextlib.nullcontext()
    with full_disk_is_user_error(directory), lock:
        if first:
            _accept(directory, plan)
        wait(f"{directory}: plan")
        complete = is_complete(directory, plan)
        if not complete:
            if first:
                (directory / shards.INFO).unlink(missing_ok=True)
            make(plan.parts[process::processes])
            wait(f"{directory}: parts")
            if first:
                _finish(directory, plan)
    wait(f"{directory}: set")
    return not complete


@contextlib.contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Makes `directory`, and waits until no other run writes into it.

    Raises:
        UserError: when it is no directory.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{directory}: is not a directory: name another one") from error
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that is writing {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            say(f"{directory} has no file locks: start only one writer")
        yield


def _accept(directory: Path, plan: Plan) -> None:
    """Takes a directory that is new, or holds a part of this very set; clears leftovers.

    Raises:
        UserError: when it holds something else.
    """
    path, wanted = directory / PLAN_FILE, _identity(plan)
    stored = _read_plan(directory)
    held = stored or _identity_in(directory / shards.INFO)
    is_new = all(file.name.startswith(".") for file in directory.iterdir())
    if not is_new and (held is None or held["fingerprint"] != plan.fingerprint):
        if held is None and not path.exists():
            raise UserError(f"{directory}: is not empty and holds no data set: use another one")
        if not _forget_if_empty(directory):
            if held is None:
                raise UserError(
                    f"{path}: is damaged, so that nobody can tell which data set this is: restore "
                    "it, use another directory, or delete this one"
                )
            changed = _changed(held["settings"], plan.settings) or f"{plan.others} have changed"
            raise UserError(
                f"{directory}: holds another data set ({changed}): use another directory, or "
                "delete this one"
            )
    if stored != wanted:
        write_text(path, json.dumps(wanted, indent=2))
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _identity(plan: Plan) -> dict[str, Any]:
    return {"fingerprint": plan.fingerprint, "settings": plan.settings}


def _identity_in(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file with a fingerprint and settings; None without one."""
    try:
        value = shards.read_object(path)
    except UserError:
        return None
    kinds = [type(value.get(name)) for name in ("fingerprint", "settings")]
    return value if kinds == [str, dict] else None


def _read_plan(directory: Path) -> dict[str, Any] | None:
    return _identity_in(directory / PLAN_FILE)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} was {str(old.get(name))[:80]}, is {str(new.get(name))[:80]}" for name in names
    )


def _forget_if_empty(directory: Path) -> bool:
    """Removes the shards of a run that wrote no record, and tells whether there was none."""
    files = list(directory.glob("*.array_record-*"))
    if any(shard.keys for file in files if (shard := writer.finished(file)) is not None):
        return False
    for file in files:
        file.unlink()
    return True


def is_complete(directory: Path, plan: Plan) -> bool:
    """Whether `directory` holds the whole set of `plan`, and all that describes the set is sound.

    Records themselves are not read, nor the reasons in `rejects.csv`.
    """
    try:
        info = shards.describe(directory)
        written = [shard for part in plan.parts if (shard := part.finished(directory))]
        left_out = sum(len(shard.left_out) for shard in written)
        sound = (
            len(written) == len(plan.parts)
            and _read_plan(directory) == _identity(plan)
            and (info["fingerprint"], info["settings"]) == (plan.fingerprint, plan.settings)
            and info["label_names"] == list(plan.label_names)
            and info["files"] == _files(written)
            and "left_out" in info
            and _count_rejects(directory) == info["rejects"] + left_out
        )
        stored = shards.read_object(directory / "dataset_info.json")["splits"]
        sizes = {split["name"]: int(split.get("numBytes", 0)) for split in stored}
        for split, part in info["splits"].items():
            own = [shard for shard in written if shard.split == split]
            keys = splits.read_keys(splits.keys_path(directory, split), part["sha256"])
            sound &= keys == [key for shard in own for key in shard.keys]
            sound &= sizes.get(split, 0) == sum(shard.payload for shard in own)
            if "subjects" in part:
                splits.read_subjects(splits.subjects_path(directory, split), part["subjects"])
            elif "records_version" in plan.settings:  # only earlier versions wrote no subjects
                return False
        return sound
    except (UserError, OSError, ValueError, KeyError):
        return False


def _count_rejects(directory: Path) -> int:
    try:
        with (directory / REJECTS).open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
    except (csv.Error, ValueError):
        return -1
    return len(rows) if head == _HEAD and all(len(row) == 2 for row in rows) else -1


def _files(written: Sequence[Shard]) -> dict[str, dict[str, int]]:
    return {s.name: {"bytes": s.size, "records": len(s.keys)} for s in written}


def _finish(directory: Path, plan: Plan) -> None:
    """Writes all that describes the set; `medsyn.json` last, for it says that the set is whole."""
    written: list[Shard] = []
    for part in plan.parts:
        if (shard := part.finished(directory)) is None:
            path = directory / part.name
            raise UserError(f"{path}: is not there: do all processes see {directory}?")
        written.append(shard)
    rejects = [*plan.rejects, *(reject for shard in written for reject in shard.rejects)]
    left_out = [record for shard in written for record in shard.left_out]
    if not any(shard.keys for shard in written):
        raise UserError(
            f"{directory}: no usable record: {len(rejects)} rejected, {len(left_out)} left out, "
            f"the first: {(rejects + left_out)[0][1]}: mend the source, or set other "
            "ingest.sections or ingest.min_tokens, and ingest into another directory"
        )
    write_rejects(directory, rejects + left_out)
    subjects = {item.key: item.subject for part in plan.parts for item in part.items}
    described = {}
    for split in splits.SPLITS:
        keys = [key for shard in written if shard.split == split for key in shard.keys]
        own = [subjects[key] for key in keys]
        described[split] = {
            "records": len(keys),
            "sha256": splits.write_keys(splits.keys_path(directory, split), keys),
            "subjects": splits.write_subjects(splits.subjects_path(directory, split), own),
        }
    _write_tfds_files(directory, written, plan.label_names)
    short = {"report too short": len(left_out)} if left_out else {}
    info = {
        "format": shards.FORMAT,
        "label_names": list(plan.label_names),
        "splits": described,
        "rejects": len(rejects),
        "source": plan.source,
        **_identity(plan),
        "left_out": {**plan.left_out, **short},
        **plan.info,
        "files": _files(written),
    }
    write_text(directory / shards.INFO, json.dumps(info, indent=2))


def write_rejects(directory: Path, rejects: Sequence[tuple[str, str]]) -> None:
    """Writes (key, reason) of records that are not in the set."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([_HEAD, *rejects])
    text = stream.getvalue().encode("utf-8", "backslashreplace").decode()  # of file names
    write_text(directory / REJECTS, text)


def _write_tfds_files(
    directory: Path, written: Sequence[Shard], label_names: Sequence[str]
) -> None:
    """Writes `dataset_info.json` and `features.json`."""
    optional = {tuple(shard.optional) for shard in written if shard.optional is not None}
    if len(optional) > 1:
        raise ValueError(f"{directory}: shards differ in their optional fields: {optional}")
    infos = []
    for split in dict.fromkeys(shard.split for shard in written):
        own = [shard for shard in written if shard.split == split]
        lengths, size = [len(shard.keys) for shard in own], sum(shard.payload for shard in own)
        infos.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size))
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=schema.features(label_names, optional.pop() if optional else ()),
        split_infos=infos,
        check_data=False,  # that check reads through TensorFlow
        description="Radiographs with reports, written by medsyn_jax",
    )


def say(line: str) -> None:
    """One line on the terminal, from any process."""
    console.print(line, soft_wrap=True)
