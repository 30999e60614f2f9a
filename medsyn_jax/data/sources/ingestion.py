"""Ingestion: from a source to a shard directory, in parallel; restartable."""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord, UserError
from medsyn_jax.core.log import ImagesBar
from medsyn_jax.data.sources import repeats
from medsyn_jax.data.sources.plan import SOURCES, make_plan
from medsyn_jax.data.sources.repeats import Texts
from medsyn_jax.data.store import build, shards, writer
from medsyn_jax.data.store.build import Part, Plan, say

_POLL_S = 0.2


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
        UserError: for a source that cannot be used, more than `max_reject_share` rejects, one text
            that too many records share, a full disk, or a directory that holds something else.
            What was complete is kept.
    """
    directory = Path(directory)
    plan = plan or make_plan(config)
    if earlier := plan.of_earlier_version(directory):
        say(f"ingest: {directory} is of an earlier version: settings and keys agree, kept")
        plan = earlier
    texts = Texts()
    make = functools.partial(_write_parts, plan, config, directory, texts)
    if build.write(directory, plan, make):
        info = shards.describe(directory)
        others = "".join(f", {n} left out ({reason})" for reason, n in info["left_out"].items())
        counts = ", ".join(f"{split} {d['records']}" for split, d in info["splits"].items())
        say(f"ingest: {directory}: {counts}, {info['rejects']} rejected{others}")
        if texts.counts:
            marked = texts.marked
            marks = f", marks of de-identification taken out of {marked}" if marked else ""
            reports = f"{len(texts.counts)} distinct texts in {texts.counts.total()} reports"
            say(f"ingest: {directory}: {reports}{marks}")
    return directory


def _write_parts(
    plan: Plan, config: Any, directory: Path, texts: Texts, parts: Sequence[Part]
) -> None:
    """Writes the parts that are not finished, and counts the texts of all in `texts`."""
    for note in plan.notes:
        say(f"ingest: {note}")
    rejects, todo = [*plan.rejects], []
    for part in parts:
        counts = repeats.read(directory / part.name)
        shard = part.finished(directory) if counts else None
        if counts and shard:
            texts.add(counts)
            rejects += shard.rejects
        else:
            todo.append(part)
    context = multiprocessing.get_context("forkserver")
    worker = Worker(
        config,
        directory,
        plan.label_names,
        tried=context.Value("q", plan.total - sum(len(part.items) for part in todo)),
        rejected=context.Value("q", len(rejects)),
        stop=context.Value("q", 0),
    )
    limit, too_many, common = config.max_reject_share, False, ""
    if _too_many(len(rejects), plan.total, plan.total, limit):
        _refuse(directory, rejects, plan.total, limit)
    with ImagesBar("ingest", plan.total, worker.tried.value) as progress:
        for result in _results(worker, todo, context):
            if result is not None:
                rejects += result[0]
                texts.add(result[1] or Texts())
                common = common or texts.too_common(sure=False)
            progress.show(worker.tried.value)
            counts = (worker.rejected.value, worker.tried.value, plan.total)
            too_many |= _too_many(*counts, limit, listed=len(plan.rejects))
            if too_many or common:
                worker.stop.value = 1
    if too_many or _too_many(len(rejects), plan.total, plan.total, limit):
        _refuse(directory, rejects, worker.tried.value, limit)
    if common := common or texts.too_common(sure=True):
        what = " and ".join(config.sections)
        raise UserError(
            f"ingest: {common}, more than one in five: probably a closing line taken for {what}: "
            "mend the reports or choose other ingest.sections, and ingest into another directory"
        )


def _too_many(rejected: int, tried: int, total: int, limit: float, listed: int = 0) -> bool:
    """Whether the run will, or with near certainty would, end above the limit.

    Records come in the order of a hash, so those tried are a fair sample of the rest, but for the
    `listed` ones, which the listing rejected before; the sure sign waits for the limit to be
    reached, the likely one for 4 standard deviations.
    """
    sample = tried - listed
    spread = 4 * (sample * limit * (1 - limit)) ** 0.5
    return rejected > limit * total or rejected - listed > limit * sample + spread + 1


def _refuse(
    directory: Path, rejects: Sequence[tuple[str, str]], tried: int, limit: float
) -> NoReturn:
    build.write_rejects(directory, rejects)
    key, reason = rejects[0]
    raise UserError(
        f"ingest: {len(rejects)} of {tried} records were rejected, more than "
        f"ingest.max_reject_share={limit:g} allows; the first is {key} ({reason}); all are in "
        f"{directory / build.REJECTS}: mend the source, or allow more and run again"
    )


class Stopped(Exception):
    """The part was left unfinished because the run is to stop."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """Writes parts; one for each process, with three numbers that all processes share."""

    config: Any
    directory: Path
    label_names: Sequence[str]
    tried: Any  # multiprocessing.Value: records, good or bad
    rejected: Any  # multiprocessing.Value: those of them that were rejected
    stop: Any  # multiprocessing.Value: not 0 once all processes are to stop

    def write(self, part: Part) -> tuple[list[tuple[str, str]], Texts | None]:
        """Writes the shard of `part`.

        Returns:
            The rejects (key, reason), and the counts of texts, None when stopped on the way.
        """
        path = self.directory / part.name
        texts = Texts()
        rejects: list[tuple[str, str]] = []
        left_out: list[tuple[str, str]] = []
        records = self._records(path, part, texts, rejects, left_out)
        try:
            writer.write_shard(path, records, self.label_names, rejects, left_out)
        except Stopped:
            return rejects, None
        return rejects, texts

    def _records(
        self, path: Path, part: Part, texts: Texts, rejects: list, left_out: list
    ) -> Iterator[dict[str, Any]]:
        source = SOURCES[self.config.source]
        for item in part.items:
            if self.stop.value:
                raise Stopped
            try:
                record = source.make(item, self.config)
                texts.count(record, self.config.sections)
                yield record
            except LeftOutRecord as reason:
                left_out.append((item.key, str(reason)))
            except RejectedRecord as reason:
                rejects.append((item.key, str(reason)))
                with self.rejected.get_lock():
                    self.rejected.value += 1
            with self.tried.get_lock():
                self.tried.value += 1
        texts.write(path)  # before the shard is complete: a complete one has it


def _results(
    worker: Worker, parts: Sequence[Part], context: Any
) -> Iterator[tuple[list[tuple[str, str]], Texts | None] | None]:
    """Writes the parts, yielding each result as it comes and None every now and then meanwhile."""
    processes = min(worker.config.workers or os.cpu_count() or 1, len(parts))
    if processes <= 1:
        yield from map(worker.write, parts)
        return
    pool = futures.ProcessPoolExecutor(processes, context, initializer=_start, initargs=(worker,))
    try:
        waiting = {pool.submit(_write, part) for part in parts}
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


_worker: Worker | None = None  # of this process


def _start(worker: Worker) -> None:
    """Sets up a process: deaf to Ctrl-C, which the parent handles, and dead with the parent."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _write(part: Part) -> tuple[list[tuple[str, str]], Texts | None]:
    assert _worker is not None
    return _worker.write(part)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
