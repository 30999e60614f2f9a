"""The cells of a study: their files, and what they say of a task.

A value is the mean over seeds, with Student's 95 % interval over the seeds; a difference of two
arms is that of the same seeds (the same labelled records). An interval with 0 in it marks a tie.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.log import number
from medsyn_jax.tables import examples

# Pairs of arms whose difference answers a question.
DIFFERENCES = (
    ("synthetic", "real"),
    ("mixed", "real"),
    ("mixed", "duplicated"),
    ("synthetic_then_real", "real"),
)


Encoder = tuple[str, str]  # method and arm


@dataclass(frozen=True)
class Cell:
    """One figure of a study: what was pre-trained on what, the task, its labels, and the seed."""

    method: str
    arm: str
    task: str
    fraction: float
    seed: int

    @property
    def name(self) -> str:
        """Of the cell's file, without its suffix."""
        percent = f"{100 * self.fraction:g}"
        return f"{self.method}_{self.arm}_{self.task}_{percent}pct_seed{self.seed}"

    @property
    def encoder(self) -> Encoder:
        """Method and arm: a row of the table."""
        return self.method, self.arm


class Value(NamedTuple):
    """A mean over seeds, its interval (None for one seed), and their number."""

    mean: float
    interval: tuple[float, float] | None
    seeds: int

    @property
    def tie(self) -> bool:
        """Whether a difference cannot be told from 0; True for one seed."""
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]


Entries = dict[Cell, dict[str, Any]]


def read(folder: Path, cells: Iterable[Cell]) -> Entries:
    """The finished cells among `cells`, in their order; UserError for a file that is no cell."""
    entries: Entries = {}
    for cell in cells:
        path = folder / f"{cell.name}.json"
        if not path.exists():
            continue
        try:
            entry = json.loads(path.read_text())
            own = entry["metrics"][entry["metric"]]
            value = own["value"]
            if Cell(**entry["cell"]) != cell or not isinstance(value, float | int | None):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: is no finished cell of this study: delete the file, and run the same "
                "command again"
            ) from None
        entries[cell] = entry | {"picture": examples.read(path.with_suffix(".png"))}
    return entries


class Part:
    """The cells of one task."""

    def __init__(self, task: str, entries: Entries):
        self.task, self.entries = task, entries
        self.encoders = list(dict.fromkeys(cell.encoder for cell in entries))
        self.fractions = sorted({cell.fraction for cell in entries})
        self.metric = next((e["metric"] for e in entries.values()), "")
        self.values: dict[tuple[Encoder, float], dict[int, float]] = {}
        for cell, entry in entries.items():
            value = entry["metrics"][entry["metric"]]["value"]
            if value is not None:
                self.values.setdefault((cell.encoder, cell.fraction), {})[cell.seed] = value

    def value(self, encoder: Encoder, fraction: float) -> Value | None:
        """The value of an encoder, None without a finished cell."""
        values = self.values.get((encoder, fraction), {})
        return _over_seeds(list(values.values()))

    def difference(self, method: str, arms: tuple[str, str], fraction: float) -> Value | None:
        """The first arm minus the second, over the seeds that both have."""
        return self.gap((method, arms[0]), (method, arms[1]), fraction)

    def gap(self, a: Encoder, b: Encoder, fraction: float) -> Value | None:
        """The first encoder minus the second, over the seeds that both have."""
        first, second = (self.values.get((encoder, fraction), {}) for encoder in (a, b))
        return _over_seeds([first[seed] - second[seed] for seed in first if seed in second])

    @property
    def differences(self) -> list[tuple[str, list[Value | None]]]:
        """A row of differences for each method and pair of arms that it has."""
        rows = []
        for method, arms in product(self.methods, DIFFERENCES):
            row = [self.difference(method, arms, fraction) for fraction in self.fractions]
            if any(row):
                rows.append((f"{method}: {' minus '.join(arms)}".replace("_", " "), row))
        return rows

    @property
    def rows(self) -> list[tuple[str, list[Value | None]]]:
        """A row of values for each encoder."""
        return [
            (label(encoder), [self.value(encoder, fraction) for fraction in self.fractions])
            for encoder in self.encoders
        ]

    @property
    def head(self) -> list[str]:
        """The fractions of the labels, as text."""
        return [f"{100 * fraction:g} %" for fraction in self.fractions]

    @property
    def methods(self) -> list[str]:
        """Of pre-training, without "none"."""
        return list(dict.fromkeys(method for method, _ in self.encoders if method != "none"))

    @property
    def shown(self) -> dict[Encoder, dict[str, Any]]:
        """The entry of each encoder whose picture and ROC curve are shown: with the most labels, of
        the first seed."""
        seed = min((cell.seed for cell in self.entries), default=0)
        return {
            cell.encoder: entry
            for cell, entry in self.entries.items()
            if (cell.fraction, cell.seed) == (self.fractions[-1], seed)
        }


def _over_seeds(values: Sequence[float]) -> Value | None:
    """Mean and Student's interval of values, one a seed."""
    count = len(values)
    if not count:
        return None
    center = float(np.mean(values))
    if count == 1:
        return Value(center, None, 1)
    from scipy import stats  # takes more than a second to import

    half = float(stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / math.sqrt(count))
    return Value(center, (center - half, center + half), count)


def label(encoder: Encoder) -> str:
    """An encoder in words."""
    method, arm = encoder
    name = arm.replace("_", " ")
    return f"{name} start" if method == "none" else f"{method}, {name}"


def as_text(value: Value | None, signed: bool = False) -> str:
    """0.812 [0.790, 0.834]; a difference has its sign, and "=" where it is a tie."""
    if value is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    ends = value.interval
    interval = f" [{', '.join(number(end, form) for end in ends)}]" if ends else ""
    return f"{number(value.mean, form)}{interval}{' =' if signed and value.tie else ''}"
