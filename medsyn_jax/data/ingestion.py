"""From a source to a shard directory: plan, write in parallel, sum up; restartable."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import console, full_disk_is_user_error
from medsyn_jax.data import shards, splits, workers
from medsyn_jax.data.plan import Part, Plan, make_plan

PLAN_FILE = "plan.json"
REJECTS = "rejects.csv"
_POLL_S = 0.2
_LINE_EVERY_S = 10.0


def ingest(config: Any, directory: Path | str, plan: Plan | None = None) -> Path:
    """Writes the source of `config` as a shard directory, or completes one begun earlier.

    Args:
        config: the ingest config (configs/ingest.py).
        directory: where to; made if missing. It may hold an earlier, unfinished run of the same
            source and settings, whose complete shards are kept.
        plan: `make_plan(config)`, if it has been made already.

    Returns:
        `directory`, holding a whole data set.

    Raises:
        UserError: for a source that cannot be used, more than `max_reject_share` rejects, a full
            disk, or a directory that holds something else. What was complete is kept.
    """
    directory = Path(directory)
    plan = plan or make_plan(config)
    if _is_complete(directory, plan):
        return directory
    with full_disk_is_user_error(directory):
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(f"ingest: {directory}: is not a directory") from error
        with _only_writer(directory):
            _accept(directory, plan)
            if not _is_complete(directory, plan):
                (directory / shards.INFO).unlink(missing_ok=True)
                written = _write_parts(plan, config, directory)
                _finish(directory, plan, written)
    return directory


@contextmanager
def _only_writer(directory: Path) -> Iterator[None]:
    """Waits until no other process writes into `directory`."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"ingest: waiting for another process that is writing {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            _say(f"ingest: {directory} has no file locks: start only one writer")
        yield


def _accept(directory: Path, plan: Plan) -> None:
    """Refuses a directory made from something else; else notes the plan and clears leftovers."""
    path = directory / PLAN_FILE
    if path.exists():
        try:
            before = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"ingest: {path}: is not valid JSON: use another directory") from error
        if before["fingerprint"] != plan.fingerprint and _forget_if_empty(directory):
            shards.write_text(path, plan.identity())
        elif before["fingerprint"] != plan.fingerprint:
            old, new = before["settings"], plan.settings
            names = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
            changed = (
                ", ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)
                or "the records or files of the source, or the code that reads them, have changed"
            )
            raise UserError(
                f"ingest: {directory}: holds another data set ({changed}): "
                "use another directory, or delete this one"
            )
    elif any(not file.name.startswith(".") for file in directory.iterdir()):
        raise UserError(f"ingest: {directory}: is not empty and holds no data set: use another one")
    else:
        shards.write_text(path, plan.identity())
    for leftover in directory.rglob(".*.tmp"):
        leftover.unlink(missing_ok=True)


def _forget_if_empty(directory: Path) -> bool:
    """Removes what a run left that wrote no record, as with a wrong folder of images."""
    files = list(directory.glob("*.array_record-*"))
    if any(shard.keys for file in files if (shard := shards.finished(file)) is not None):
        return False
    for file in files:
        file.unlink()
    return True


def _is_complete(directory: Path, plan: Plan) -> bool:
    try:
        return shards.describe(directory)["fingerprint"] == plan.fingerprint
    except UserError:
        return False


def _write_parts(plan: Plan, config: Any, directory: Path) -> list[shards.Shard]:
    """Writes the parts that are not there yet; returns all shards in the order of the plan."""
    written = {part.name: shards.finished(directory / part.name) for part in plan.parts}
    todo = [part for part in plan.parts if written[part.name] is None]
    known = [reject for shard in written.values() if shard for reject in shard.rejects]
    rejects = plan.rejects + known
    context = multiprocessing.get_context("forkserver")
    worker = workers.Worker(
        config,
        directory,
        plan.label_names,
        seen=context.Value("q", plan.total - sum(len(part.items) for part in todo)),
        rejected=context.Value("q", len(rejects)),
        stop=context.Value("q", 0),
    )
    processes = min(config.workers or os.cpu_count() or 1, len(todo))
    limit = config.max_reject_share
    if _too_many(len(rejects), plan.total, plan.total, limit):
        _refuse(directory, rejects, plan.total, limit)
    results, stopped = [], False
    with _Progress(plan.total, worker.seen) as progress:
        for result in _results(worker, todo, processes, context):
            if result is not None:
                results.append(result)
            progress.show()
            if _too_many(worker.rejected.value, worker.seen.value, plan.total, limit):
                worker.stop.value, stopped = 1, True
    for shard, found in results:
        rejects += found
        if shard is not None:
            written[shard.name] = shard
    if stopped or _too_many(len(rejects), plan.total, plan.total, limit):
        _refuse(directory, rejects, worker.seen.value, limit)
    return [shard for part in plan.parts if (shard := written[part.name]) is not None]


def _results(
    worker: workers.Worker, todo: list[Part], processes: int, context: Any
) -> Iterator[tuple[shards.Shard | None, list] | None]:
    """Writes `todo`, yielding each result as it comes and None every now and then meanwhile."""
    if processes <= 1:
        for part in todo:
            yield worker.write(part)
        return
    pool = futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=workers.start, initargs=(worker,)
    )
    try:
        waiting = {pool.submit(workers.write, part) for part in todo}
        while waiting:
            done, waiting = futures.wait(waiting, _POLL_S, futures.FIRST_COMPLETED)
            for future in done:
                yield future.result()
            if not done:
                yield None
    except BrokenProcessPool as error:
        raise UserError(
            f"ingest: {worker.directory}: a worker process was killed, most likely for want of "
            "memory: run again with a smaller ingest.workers; complete shards are kept"
        ) from error
    finally:
        worker.stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


def _too_many(rejected: int, seen: int, total: int, limit: float) -> bool:
    """Whether the run will, or with near certainty would, end above the limit.

    Records come in the order of a hash, so what has been seen is a fair sample of the rest; the
    sure sign waits for the limit to be reached, the likely one for 4 standard deviations.
    """
    spread = 4 * (seen * limit * (1 - limit)) ** 0.5
    return rejected > limit * total or rejected > limit * seen + spread + 1


def _refuse(
    directory: Path, rejects: Sequence[tuple[str, str]], seen: int, limit: float
) -> NoReturn:
    _write_rejects(directory, rejects)
    key, reason = rejects[0]
    raise UserError(
        f"ingest: {len(rejects)} of {seen} records were rejected, more than "
        f"ingest.max_reject_share={limit:g} allows; the first is {key} ({reason}); all are in "
        f"{directory / REJECTS}: mend the source, or allow more and run again"
    )


def _write_rejects(directory: Path, rejects: Sequence[tuple[str, str]]) -> None:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([("key", "reason"), *rejects])
    shards.write_text(directory / REJECTS, stream.getvalue())


def _finish(directory: Path, plan: Plan, written: list[shards.Shard]) -> None:
    """Writes all that describes the set; `medsyn.json` last, for it says that the set is whole."""
    rejects = plan.rejects + [reject for shard in written for reject in shard.rejects]
    left_out = [record for shard in written for record in shard.left_out]
    _write_rejects(directory, [*rejects, *left_out])
    dropped = plan.dropped | ({"report too short": len(left_out)} if left_out else {})
    described = {}
    for split in splits.SPLITS:
        keys = [key for shard in written if shard.split == split for key in shard.keys]
        sha256 = splits.write_keys(directory / "splits" / f"{split}.txt", keys)
        described[split] = {"records": len(keys), "sha256": sha256}
    shards.write_tfds_info(directory, written, plan.label_names)
    info = {
        "format": shards.FORMAT,
        "source": plan.settings["source"],
        "label_names": list(plan.label_names),
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "splits": described,
        "rejects": len(rejects),
        "left_out": dropped,
        "files": {s.name: {"bytes": s.size, "records": len(s.keys)} for s in written},
    }
    shards.write_text(directory / shards.INFO, json.dumps(info, indent=2))
    others = "".join(f", {count} left out ({reason})" for reason, count in dropped.items())
    counts = ", ".join(f"{split} {d['records']}" for split, d in described.items())
    _say(f"ingest: {directory}: {counts}, {len(rejects)} rejected{others}")


class _Progress:
    """A bar on a terminal, a plain line now and then elsewhere; in records and records/s."""

    def __init__(self, total: int, seen: Any):
        self.total, self.seen = total, seen
        self.first = self.shown = seen.value
        self.began = self.last = time.monotonic()
        self.bar = Progress(
            TextColumn("ingest"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:.0f} images/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("ingest", total=total, rate=0.0, completed=self.first)

    def __enter__(self) -> _Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self) -> None:
        now, seen = time.monotonic(), self.seen.value
        rate = (seen - self.first) / max(now - self.began, 1e-9)
        self.bar.update(self.task, completed=seen, rate=rate)
        if console.is_terminal or seen == self.shown:
            return
        if now - self.last > _LINE_EVERY_S or seen == self.total:
            self.last, self.shown = now, seen
            _say(f"ingest: {seen}/{self.total} records, {rate:.0f} images/s")


def _say(line: str) -> None:
    console.print(line, soft_wrap=True)
