"""What the processes of an ingestion do: make the examples of one part and write its shard."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord
from medsyn_jax.data import records, shards
from medsyn_jax.data.plan import Part


class Stopped(Exception):
    """The part was left unfinished because the run is to stop."""


@dataclasses.dataclass(frozen=True)
class Worker:
    """Writes parts; one for each process, with three numbers that all processes share."""

    config: Any
    directory: Path
    label_names: Sequence[str]
    seen: Any  # multiprocessing.Value: records tried
    rejected: Any  # multiprocessing.Value: those of them that were rejected
    stop: Any  # multiprocessing.Value: not 0 once everybody is to stop

    def write(self, part: Part) -> tuple[shards.Shard | None, list[tuple[str, str]]]:
        """Writes the shard of `part`.

        Returns:
            The shard, or None when told to stop on the way; and the rejects (key, reason) so far.
        """
        rejects: list[tuple[str, str]] = []
        left_out: list[tuple[str, str]] = []
        examples = self._examples(part.items, rejects, left_out)
        path = self.directory / part.name
        try:
            shard = shards.write_shard(
                path, part.split, examples, self.label_names, rejects, left_out
            )
        except Stopped:
            return None, rejects
        return shard, rejects

    def _examples(
        self, items: Sequence[records.Item], rejects: list, left_out: list
    ) -> Iterator[dict]:
        for item in items:
            if self.stop.value:
                raise Stopped
            try:
                yield records.example(item, self.config)
            except LeftOutRecord as reason:
                left_out.append((item.key, str(reason)))
            except RejectedRecord as reason:
                rejects.append((item.key, str(reason)))
                with self.rejected.get_lock():
                    self.rejected.value += 1
            with self.seen.get_lock():
                self.seen.value += 1


_worker: Worker | None = None


def start(worker: Worker) -> None:
    """Sets up this process: deaf to Ctrl-C, which the parent handles, and dead with the parent."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def write(part: Part) -> tuple[shards.Shard | None, list[tuple[str, str]]]:
    """`Worker.write` in a process set up by `start`."""
    assert _worker is not None
    return _worker.write(part)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
