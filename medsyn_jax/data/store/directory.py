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
from medsyn_jax.data.store import description, shards, splits

PLAN_FILE = "plan.json"
REJECTS = "rejects.csv"
HEAD = ["key", "reason"]


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
    """Whether it holds the whole set with this fingerprint, and all that describes it is sound.

    The records themselves are not read, nor the reasons in `rejects.csv`.
    """
    try:
        info = shards.describe(directory)
        plan = {"fingerprint": fingerprint, "settings": info["settings"]}
        if info["fingerprint"] != fingerprint or read_plan(directory) != plan:
            return False
        written = [shards.finished(directory / name) for name in info["files"]]
        left_out = sum(len(shard.left_out) for shard in written if shard)
        if _count_rejects(directory) != info["rejects"] + left_out:
            return False
        stored = json.loads((directory / "dataset_info.json").read_text())
        for split, part in info["splits"].items():
            own = [shard for shard in written if shard and shard.split == split]
            keys = splits.read_keys(directory / "splits" / f"{split}.txt", part["sha256"])
            if keys != [key for shard in own for key in shard.keys]:
                return False
            sizes = [int(s["numBytes"]) for s in stored["splits"] if s["name"] == split]
            if sum(sizes) != sum(shard.payload for shard in own):
                return False
        return None not in written and info.keys() >= {"rejects", "left_out"}
    except (UserError, OSError, ValueError, KeyError):
        return False


def read_plan(directory: Path) -> dict[str, Any] | None:
    """What `plan.json` holds; None where it is missing or damaged."""
    try:
        found = description.read_object(directory / PLAN_FILE)
    except UserError:
        return None
    known = isinstance(found.get("fingerprint"), str) and isinstance(found.get("settings"), dict)
    return found if known else None


def _count_rejects(directory: Path) -> int:
    try:
        with (directory / REJECTS).open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
    except (csv.Error, ValueError):
        return -1
    return len(rows) if head == HEAD and all(len(row) == 2 for row in rows) else -1


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
    identity = {"fingerprint": fingerprint, "settings": json.loads(json.dumps(settings))}
    before = read_plan(directory)
    if before is None and path.exists():
        if not (_is_of(directory, fingerprint) or _forget_if_empty(directory)):
            raise UserError(
                f"{path}: is damaged, so that nobody can tell which data set this is: restore it, "
                "use another directory, or delete this one"
            )
    elif before is None and any(not file.name.startswith(".") for file in directory.iterdir()):
        if not _is_of(directory, fingerprint):
            raise UserError(f"{directory}: is not empty and holds no data set: use another one")
    elif before and before["fingerprint"] != fingerprint and not _forget_if_empty(directory):
        changed = _changed(before["settings"], identity["settings"])
        raise UserError(
            f"{directory}: holds another data set ({changed or f'{others} have changed'}): "
            "use another directory, or delete this one"
        )
    if before != identity:
        shards.write_text(path, json.dumps(identity, indent=2))
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _is_of(directory: Path, fingerprint: str) -> bool:
    """Whether `medsyn.json` says that the directory is of this set."""
    try:
        return description.read_object(directory / shards.INFO).get("fingerprint") == fingerprint
    except UserError:
        return False


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return ", ".join(
        f"{name} was {str(old.get(name))[:80]}, is {str(new.get(name))[:80]}" for name in names
    )


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
    csv.writer(stream, lineterminator="\n").writerows([HEAD, *rejects])
    text = stream.getvalue().encode("utf-8", "backslashreplace").decode()  # of file names
    shards.write_text(directory / REJECTS, text)


def say(line: str) -> None:
    """One line on the terminal, from any process."""
    console.print(line, soft_wrap=True)
