"""Counts of the texts of records: one text that many records share is no report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsyn_jax.core.files import write_text
from medsyn_jax.data.text import reports

_FEW_WORDS = 5  # a text of so many may well be that of many reports
_COMMON = 0.2  # share of the records that no longer text may have
_ENOUGH = 50  # records to tell by


@dataclasses.dataclass
class Texts:
    """The texts of one part, or of several, in the configured sections."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)  # by hash; short ones as is
    starts: dict[str, str] = dataclasses.field(default_factory=dict)  # of the common ones, by hash
    marked: int = 0  # reports with marks of de-identification

    def count(self, record: Mapping[str, Any], sections: Sequence[str]) -> None:
        """Counts one record."""
        findings, impression, report = (record[n] for n in ("findings", "impression", "report"))
        text = reports.select_text(findings, impression, report, tuple(sections))
        self.marked += reports.has_marks(report)
        if not text:
            return
        name = text
        if reports.token_count(text) > _FEW_WORDS:
            name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
            self.starts.setdefault(name, text[:80])
        self.counts[name] += 1

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
        """Writes the counts of a part beside the note of its shard; rare texts lose their starts,
        as a text that is common in all parts is so in one of them."""
        least = _COMMON * self.counts.total()
        self.starts = {name: s for name, s in self.starts.items() if self.counts[name] > least}
        write_text(_note(shard), json.dumps(vars(self)))


def read(shard: Path) -> Texts | None:
    """What `Texts.write` wrote for the shard at this path; None when it is missing or damaged."""
    try:
        values = json.loads(_note(shard).read_text())
        if not all(type(count) is int for count in values["counts"].values()):
            return None
        return Texts(Counter(values["counts"]), dict(values["starts"]), int(values["marked"]))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def _note(shard: Path) -> Path:
    return shard.parent / "parts" / f"{shard.name}.texts.json"
