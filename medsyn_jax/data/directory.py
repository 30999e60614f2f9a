"""A shard directory while it is being written: whose it is, and whether it is whole."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import console
from medsyn_jax.data import shards, splits

PLAN_FILE = "plan.json"
REJECTS = "rejects.csv"


@contextmanager
def only_writer(directory: Path) -> Iterator[None]:
    """Waits until no other run writes into `directory`, which is made if missing.

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
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            say(f"{directory} has no file locks: start only one writer")
        yield


def is_complete(directory: Path, fingerprint: str) -> bool:
    """Whether it holds the whole set with this fingerprint."""
    try:
        return shards.describe(directory)["fingerprint"] == fingerprint
    except UserError:
        return False


def accept(directory: Path, fingerprint: str, settings: Mapping[str, Any], others: str) -> None:
    """Takes a directory that is new, or holds a part of this very set; clears leftovers.

    Args:
        directory: which the caller alone writes.
        fingerprint: of what is to be written.
        settings: that led to it, JSON; named in the error if it was another value before.
        others: what else decides about a set, for the error where no setting has changed.

    Raises:
        UserError: when it holds something else.
    """
    path = directory / PLAN_FILE
    identity = json.dumps({"fingerprint": fingerprint, "settings": settings}, indent=2)
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: is not valid JSON: use another directory") from error
        if before["fingerprint"] != fingerprint:
            if not _forget_if_empty(directory):
                changed = _changed(before["settings"], json.loads(identity)["settings"])
                raise UserError(
                    f"{directory}: holds another data set ({changed or f'{others} have changed'}): "
                    "use another directory, or delete this one"
                )
            shards.write_text(path, identity)
    elif any(not file.name.startswith(".") for file in directory.iterdir()):
        raise UserError(f"{directory}: is not empty and holds no data set: use another one")
    else:
        shards.write_text(path, identity)
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def _forget_if_empty(directory: Path) -> bool:
    """Removes what a run left that wrote no record."""
    files = list(directory.glob("*.array_record-*"))
    if any(shard.keys for file in files if (shard := shards.finished(file)) is not None):
        return False
    for file in files:
        file.unlink()
    return True


def finish(
    directory: Path,
    written: Sequence[shards.Shard],
    label_names: Sequence[str],
    rejects: Sequence[tuple[str, str]],
    info: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes all that describes the set; `medsyn.json` last, for it says that the set is whole.

    Args:
        directory: that holds the shards.
        written: the shards, in file order.
        label_names: one for each entry of `labels`.
        rejects: (key, reason) of all records that are not in it.
        info: what else belongs into `medsyn.json`: `source`, `fingerprint`, `settings`, ...

    Returns:
        What `medsyn.json` holds.
    """
    write_rejects(directory, rejects)
    described = {}
    for split in splits.SPLITS:
        keys = [key for shard in written if shard.split == split for key in shard.keys]
        sha256 = splits.write_keys(directory / "splits" / f"{split}.txt", keys)
        described[split] = {"records": len(keys), "sha256": sha256}
    shards.write_tfds_info(directory, written, label_names)
    whole = {
        "format": shards.FORMAT,
        "label_names": list(label_names),
        "splits": described,
        "rejects": len(rejects),
        **info,
        "files": {s.name: {"bytes": s.size, "records": len(s.keys)} for s in written},
    }
    shards.write_text(directory / shards.INFO, json.dumps(whole, indent=2))
    return whole


def write_rejects(directory: Path, rejects: Sequence[tuple[str, str]]) -> None:
    """Writes (key, reason) of records that are not in the set."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("key", "reason"), *rejects])
    text = stream.getvalue().encode("utf-8", "backslashreplace").decode()  # of file names
    shards.write_text(directory / REJECTS, text)


def say(line: str) -> None:
    """One line on the terminal, from any process."""
    console.print(line, soft_wrap=True)
