"""What the processes of an ingestion do: make the examples of one part and write its shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord
from medsyn_jax.data.sources import records
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.plan import Part
from medsyn_jax.data.text import reports

_FEW_WORDS = 5  # a text of so many may well be that of many reports
_COMMON = 0.2  # share of the records that no longer text may have
_ENOUGH = 50  # records to tell by


@dataclasses.dataclass
class Texts:
    """What the records of one part, or of several, read like in the configured sections."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # by hash; short ones as is
    starts: dict[str, str] = dataclasses.field(default_factory=dict)  # of the common ones, by hash
    marked: int = 0  # reports with marks of de-identification

    def count(self, example: dict, sections: Sequence[str]) -> None:
        """Counts one record."""
        findings, impression, report = (example[n] for n in ("findings", "impression", "report"))
        text = reports.select_text(findings, impression, report, tuple(sections))
        self.marked += reports.has_marks(report)
        if not text:
            return
        long = reports.token_count(text) > _FEW_WORDS
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest() if long else text
        self.counts[name] += 1
        if long:
            self.starts.setdefault(name, text[:80])

    def add(self, other: Texts) -> None:
        """Adds the counts of another part."""
        self.counts.update(other.counts)
        self.starts |= other.starts
        self.marked += other.marked

    def too_common(self, sure: bool) -> str:
        """The start of a text that too many records share, with their number; '' if none is.

        sure: all records have been counted; else the share has to lie 4 standard deviations above
        the limit, as records come in the order of a hash.
        """
        total = self.counts.total()
        limit = _COMMON * total
        if not sure:
            limit += 4 * (limit * (1 - _COMMON)) ** 0.5
        for name, start in self.starts.items():
            if total >= _ENOUGH and self.counts[name] > limit:
                return f"{self.counts[name]} of {total} records read {start!r}"
        return ""

    def write(self, shard: Path) -> None:
        """Writes the counts of a part beside the note of its shard."""
        least = _COMMON * self.counts.total()  # what is common in all is so in one of the parts
        starts = {name: start for name, start in self.starts.items() if self.counts[name] > least}
        values = {"counts": self.counts, "starts": starts, "marked": self.marked}
        shards.write_text(_note(shard), json.dumps(values))


def read_texts(shard: Path) -> Texts | None:
    """What `Texts.write` wrote for the shard at this path; None when it is missing or not whole."""
    try:
        values = json.loads(_note(shard).read_text())
        if not all(type(count) is int for count in values["counts"].values()):
            return None
        return Texts(Counter(values["counts"]), dict(values["starts"]), int(values["marked"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def _note(shard: Path) -> Path:
    return shard.parent / "parts" / f"{shard.name}.texts.json"


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
        path = self.directory / part.name
        examples = self._examples(path, part.items, rejects, left_out)
        try:
            shard = shards.write_shard(
                path, part.split, examples, self.label_names, rejects, left_out
            )
        except Stopped:
            return None, rejects
        return shard, rejects

    def _examples(
        self, path: Path, items: Sequence[records.Item], rejects: list, left_out: list
    ) -> Iterator[dict]:
        texts = Texts()
        for item in items:
            if self.stop.value:
                raise Stopped
            try:
                example = records.example(item, self.config)
                texts.count(example, self.config.sections)
                yield example
            except LeftOutRecord as reason:
                left_out.append((item.key, str(reason)))
            except RejectedRecord as reason:
                rejects.append((item.key, str(reason)))
                with self.rejected.get_lock():
                    self.rejected.value += 1
            with self.seen.get_lock():
                self.seen.value += 1
        texts.write(path)  # before the shard is complete: a complete one has it


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
