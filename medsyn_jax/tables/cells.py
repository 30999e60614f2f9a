"""The tables of a study: a pure function of its cells.

A value is the mean over seeds, with Student's 95 % interval over the seeds; a difference of two
arms is that of the same seeds (the same labelled records). An interval with 0 in it marks a tie.
"""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import write_text
from medsyn_jax.core.log import number
from medsyn_jax.tables.page import TEMPLATES

# Pairs of arms whose difference answers a question.
DIFFERENCES = (
    ("synthetic", "real"),
    ("mixed", "real"),
    ("mixed", "duplicated"),
    ("synthetic_then_real", "real"),
)
_COLUMNS = ("task", "metric", "method", "arm", "fraction", "seed", "value", "low", "high", "n")
_WIDE, _HIGH, _LEFT = 560, 260, 44  # pixels of a plot, and of its left margin
_COLORS = {
    "random": "#8a94a0",
    "imagenet": "#4a5568",
    "real": "#2b6cb0",
    "synthetic": "#c2571a",
    "mixed": "#2f855a",
    "synthetic_then_real": "#805ad5",
    "duplicated": "#b7791f",
}
_DASHES = ("", "6 4", "2 3")  # one a method


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
    def encoder(self) -> tuple[str, str]:
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
        entries[cell] = entry
    return entries


def write(workdir: Path, entries: Entries, tasks: Sequence[str], planned: int) -> dict[str, Any]:
    """Write table.md, table.tex, table.csv and report.html; returns the means for results.json.

    planned: number of cells of the whole study. Raises UserError if no cell is finished.
    """
    if not entries:
        raise UserError(f"{workdir}: no cell is finished, so there is no table yet")
    parts = [_Part(task, {c: e for c, e in entries.items() if c.task == task}) for task in tasks]
    parts = [part for part in parts if part.entries]
    note = "" if len(entries) == planned else f"{len(entries)} of {planned} cells are finished."
    write_text(workdir / "table.md", _markdown(parts, note))
    write_text(workdir / "table.tex", _latex(parts, note))
    write_text(workdir / "table.csv", _csv(entries))
    page = TEMPLATES.get_template("study.html.j2").render(parts=parts, note=note)
    write_text(workdir / "report.html", page)
    return {
        f"{part.task}/{method}/{arm}/{100 * fraction:g}%": {
            "value": value.mean,
            "n": value.seeds,
            **({"ci95": list(value.interval)} if value.interval else {}),
        }
        for part in parts
        for (method, arm), fraction in product(part.encoders, part.fractions)
        if (value := part.value((method, arm), fraction))
    }


class _Part:
    """The cells of one task."""

    def __init__(self, task: str, entries: Entries):
        self.task, self.entries = task, entries
        self.encoders = list(dict.fromkeys(cell.encoder for cell in entries))
        self.fractions = sorted({cell.fraction for cell in entries})
        self.metric = next((e["metric"] for e in entries.values()), "")
        self.values: dict[tuple[tuple[str, str], float], dict[int, float]] = {}
        for cell, entry in entries.items():
            value = entry["metrics"][entry["metric"]]["value"]
            if value is not None:
                self.values.setdefault((cell.encoder, cell.fraction), {})[cell.seed] = value

    def value(self, encoder: tuple[str, str], fraction: float) -> Value | None:
        """The value of an encoder, None without a finished cell."""
        values = self.values.get((encoder, fraction), {})
        return _over_seeds(list(values.values()))

    def difference(self, method: str, arms: tuple[str, str], fraction: float) -> Value | None:
        """The first arm minus the second, over the seeds that both have."""
        first, second = (self.values.get(((method, arm), fraction), {}) for arm in arms)
        return _over_seeds([first[seed] - second[seed] for seed in first if seed in second])

    @property
    def differences(self) -> list[tuple[str, list[Value | None]]]:
        """A row of differences for each method and pair of arms that it has."""
        rows = []
        for method, arms in product(dict.fromkeys(m for m, _ in self.encoders), DIFFERENCES):
            row = [self.difference(method, arms, fraction) for fraction in self.fractions]
            if any(row):
                rows.append((f"{method}: {' minus '.join(arms)}".replace("_", " "), row))
        return rows

    @property
    def rows(self) -> list[tuple[str, list[Value | None]]]:
        """A row of values for each encoder."""
        return [
            (_label(encoder), [self.value(encoder, fraction) for fraction in self.fractions])
            for encoder in self.encoders
        ]

    @property
    def head(self) -> list[str]:
        """The fractions of the labels, as text."""
        return [f"{100 * fraction:g} %" for fraction in self.fractions]

    @property
    def curves(self) -> "Curves":
        """The learning curves of the encoders, the fractions on a logarithmic axis."""
        return _curves(self)


class Line(NamedTuple):
    """A learning curve: its color is that of the arm, its dashes are those of the method."""

    label: str
    color: str
    dashes: str
    points: list[tuple[float, float]]  # pixels


class Curves(NamedTuple):
    """A plot in pixels: ticks (place, text), and curves."""

    width: int
    height: int
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[Line]


def _curves(part: _Part) -> Curves:
    means = [v.mean for _, row in part.rows for v in row if v] or [0.0]
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.25) if max(means) - min(means) < 5 * s)
    low = math.floor(min(means) / step) * step
    count = max(1, math.ceil((max(means) - low) / step))
    ticks = [low + step * n for n in range(count + 1)]
    logs = [math.log10(fraction) for fraction in part.fractions]
    width = max(logs[-1] - logs[0], 1e-3)

    def x(log: float) -> float:
        return round(_LEFT + 10 + (_WIDE - _LEFT - 50) * (log - logs[0]) / width, 1)

    def y(value: float) -> float:
        return round(10 + (_HIGH - 50) * (ticks[-1] - value) / (ticks[-1] - low), 1)

    lines, methods = [], list(dict.fromkeys(m for m, _ in part.encoders if m != "none"))
    for (method, arm), (label, row) in zip(part.encoders, part.rows, strict=True):
        points = [(x(log), y(v.mean)) for log, v in zip(logs, row, strict=True) if v]
        number = methods.index(method) if method in methods else 0
        lines.append(Line(label, _COLORS[arm], _DASHES[number % len(_DASHES)], points))
    y_ticks = [(y(value), f"{value:.2f}") for value in ticks]
    return Curves(_WIDE, _HIGH, list(zip(map(x, logs), part.head, strict=True)), y_ticks, lines)


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


def _label(encoder: tuple[str, str]) -> str:
    method, arm = encoder
    name = arm.replace("_", " ")
    return f"{name} start" if method == "none" else f"{method}, {name}"


def _text(value: Value | None, signed: bool = False) -> str:
    """0.812 [0.790, 0.834]; a difference has its sign, and "=" where it is a tie."""
    if value is None:
        return "-"
    form = "+.3f" if signed else ".3f"
    ends = value.interval
    interval = f" [{', '.join(number(end, form) for end in ends)}]" if ends else ""
    return f"{number(value.mean, form)}{interval}{' =' if signed and value.tie else ''}"


def _grids(part: _Part) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of text of the values and of the differences of a task."""
    title = f"{part.task}: {part.metric}"
    values = [[label, *(_text(v) for v in row)] for label, row in part.rows]
    gaps = [[label, *(_text(v, signed=True) for v in row)] for label, row in part.differences]
    grids = [(title, [["encoder", *part.head], *values])]
    return [*grids, (f"{title}, differences", [["arms", *part.head], *gaps])] if gaps else grids


_LEGEND = (
    "Means over seeds with Student's 95 % interval over the seeds; differences are of the same "
    "seeds; = marks a difference that cannot be told from 0."
)


def _markdown(parts: Sequence[_Part], note: str) -> str:
    blocks = [f"{_LEGEND} {note}".strip()]
    for title, (head, *rows) in (grid for part in parts for grid in _grids(part)):
        lines = [head, ["---"] * len(head), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks.append(f"**{title}**\n\n{table}")
    return "\n\n".join(blocks) + "\n"


def _latex(parts: Sequence[_Part], note: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("%", r"\%").replace("_", r"\_")

    blocks = [f"% {_LEGEND} {note}".strip()]
    for title, (head, *rows) in (grid for part in parts for grid in _grids(part)):
        lines = [rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", r"\toprule"]
        lines += [f"% {title}", " & ".join(map(escaped, head)) + r" \\", r"\midrule"]
        lines += [" & ".join(map(escaped, row)) + r" \\" for row in rows]
        blocks.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(blocks) + "\n"


def _csv(entries: Entries) -> str:
    """One line a cell, with its own interval over the test subjects."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for cell, entry in entries.items():
        own = entry["metrics"][entry["metric"]]
        low, high = own.get("ci95") or ("", "")
        place = (cell.task, entry["metric"], cell.method, cell.arm, cell.fraction, cell.seed)
        writer.writerow((*place, own["value"], low, high, own.get("n", "")))
    return file.getvalue()


TEMPLATES.filters["study_value"] = _text
