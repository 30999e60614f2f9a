"""From a source to a shard directory: plan, write in parallel, sum up; restartable."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NoReturn

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import ImagesBar, full_disk_is_user_error
from medsyn_jax.data.store import directory as folders
from medsyn_jax.data.store import shards, workers
from medsyn_jax.data.store.plan import Part, Plan, make_plan

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
        folders.say(f"ingest: {directory} is of an earlier version: settings and keys agree, kept")
        plan = earlier
    if folders.is_complete(directory, plan.fingerprint):
        return directory
    others = "the records or files of the source"
    with full_disk_is_user_error(directory), folders.only_writer(directory):
        folders.accept(directory, plan.fingerprint, plan.settings, others)
        if not folders.is_complete(directory, plan.fingerprint):
            (directory / shards.INFO).unlink(missing_ok=True)
            for note in plan.notes:
                folders.say(f"ingest: {note}")
            texts = workers.Texts()
            _finish(directory, plan, _write_parts(plan, config, directory, texts), texts)
    return directory


def _write_parts(
    plan: Plan, config: Any, directory: Path, texts: workers.Texts
) -> list[shards.Shard]:
    """Writes the parts that are not there yet, and counts the texts of all.

    Returns:
        All shards in the order of the plan.
    """
    written: dict[str, shards.Shard | None] = {}
    for part in plan.parts:
        known = workers.read_texts(directory / part.name)
        written[part.name] = part.finished(directory) if known else None
        if known and written[part.name]:
            texts.add(known)
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
    results, stopped, common = [], False, ""
    with ImagesBar("ingest", plan.total, worker.seen.value) as progress:
        for result in _results(worker, todo, processes, context):
            if result is not None:
                results.append(result)
                if result[0] and (known := workers.read_texts(directory / result[0].name)):
                    texts.add(known)
                if common := common or texts.too_common(sure=False):
                    worker.stop.value = 1
            progress.show(worker.seen.value)
            seen, listed = (worker.rejected.value, worker.seen.value), len(plan.rejects)
            if _too_many(*seen, plan.total, limit, listed):
                worker.stop.value, stopped = 1, True
    for shard, found in results:
        rejects += found
        if shard is not None:
            written[shard.name] = shard
    if stopped or _too_many(len(rejects), plan.total, plan.total, limit):
        _refuse(directory, rejects, worker.seen.value, limit)
    if common := common or texts.too_common(sure=True):
        what = " and ".join(config.sections)
        raise UserError(
            f"ingest: {common}, more than one in five: probably a closing line taken for {what}: "
            "mend the reports or choose other ingest.sections, and ingest into another directory"
        )
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


def _too_many(rejected: int, seen: int, total: int, limit: float, listed: int = 0) -> bool:
    """Whether the run will, or with near certainty would, end above the limit.

    Records come in the order of a hash, so what has been seen is a fair sample of the rest, but for
    the `listed` ones, which the listing rejected before; the sure sign waits for the limit to be
    reached, the likely one for 4 standard deviations.
    """
    sample = seen - listed
    spread = 4 * (sample * limit * (1 - limit)) ** 0.5
    return rejected > limit * total or rejected - listed > limit * sample + spread + 1


def _refuse(
    directory: Path, rejects: Sequence[tuple[str, str]], seen: int, limit: float
) -> NoReturn:
    folders.write_rejects(directory, rejects)
    key, reason = rejects[0]
    raise UserError(
        f"ingest: {len(rejects)} of {seen} records were rejected, more than "
        f"ingest.max_reject_share={limit:g} allows; the first is {key} ({reason}); all are in "
        f"{directory / folders.REJECTS}: mend the source, or allow more and run again"
    )


def _finish(directory: Path, plan: Plan, written: list[shards.Shard], texts: workers.Texts) -> None:
    """Writes all that describes the set."""
    rejects = plan.rejects + [reject for shard in written for reject in shard.rejects]
    left_out = [record for shard in written for record in shard.left_out]
    if not any(shard.keys for shard in written):
        raise UserError(
            f"ingest: {directory}: no usable record: {len(rejects)} rejected, {len(left_out)} left "
            f"out, the first: {(rejects + left_out)[0][1]}: mend the source, or set other "
            "ingest.sections or ingest.min_tokens, and ingest into another directory"
        )
    dropped = plan.dropped | ({"report too short": len(left_out)} if left_out else {})
    info = {
        "source": plan.settings["source"],
        "fingerprint": plan.fingerprint,
        "settings": plan.settings,
        "rejects": len(rejects),
        "left_out": dropped,
    }
    whole = folders.finish(directory, written, plan.label_names, [*rejects, *left_out], info)
    others = "".join(f", {count} left out ({reason})" for reason, count in dropped.items())
    counts = ", ".join(f"{split} {d['records']}" for split, d in whole["splits"].items())
    folders.say(f"ingest: {directory}: {counts}, {len(rejects)} rejected{others}")
    if texts.counts:
        marks = f", marks of de-identification taken out of {texts.marked}" if texts.marked else ""
        reports = f"{len(texts.counts)} distinct texts in {texts.counts.total()} reports"
        folders.say(f"ingest: {directory}: {reports}{marks}")
