"""The tables and the page of a study: a pure function of its cells."""

import base64
import csv
import io
import math
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import write_text
from medsyn_jax.tables import summary
from medsyn_jax.tables.cells import Encoder, Entries, Part, as_text, label
from medsyn_jax.tables.curves import Curves, Line, plot
from medsyn_jax.tables.examples import Strip
from medsyn_jax.tables.page import TEMPLATES

_COLUMNS = ("task", "metric", "method", "arm", "fraction", "seed", "value", "low", "high", "n")
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


def write(
    workdir: Path,
    entries: Entries,
    tasks: Sequence[str],
    planned: int,
    pairs: Strip | None = None,
) -> dict[str, Any]:
    """Write table.md, table.tex, table.csv and report.html; returns the means for results.json.

    planned: number of cells of the whole study. pairs: real and synthetic images. Raises UserError
    if no cell is finished.
    """
    if not entries:
        raise UserError(f"{workdir}: no cell is finished, so there is no table yet")
    parts = [Part(task, {c: e for c, e in entries.items() if c.task == task}) for task in tasks]
    parts = [part for part in parts if part.entries]
    note = "" if len(entries) == planned else f"{len(entries)} of {planned} cells are finished."
    write_text(workdir / "table.md", _markdown(parts, note))
    write_text(workdir / "table.tex", _latex(parts, note))
    write_text(workdir / "table.csv", _csv(entries))
    write_text(workdir / "report.html", _page(parts, note, pairs))
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


def _grids(part: Part) -> list[tuple[str, list[list[str]]]]:
    """Title and rows of text of the values and of the differences of a task."""
    title = f"{part.task}: {part.metric}"
    values = [[label, *(as_text(v) for v in row)] for label, row in part.rows]
    gaps = [[label, *(as_text(v, signed=True) for v in row)] for label, row in part.differences]
    grids = [(title, [["encoder", *part.head], *values])]
    return [*grids, (f"{title}, differences", [["arms", *part.head], *gaps])] if gaps else grids


def _page(parts: Sequence[Part], note: str, pairs: Strip | None) -> str:
    strips = [[(label(e), x["picture"]) for e, x in p.shown.items() if x["picture"]] for p in parts]
    sections = [
        (part, _learning(part), _roc(part), shown)
        for part, shown in zip(parts, strips, strict=True)
    ]
    return TEMPLATES.get_template("study.html.j2").render(
        sentences=summary.sentences(parts),
        note=note,
        pairs=pairs,
        private=(pairs or any(strips)) and not summary.is_phantom(parts),
        sections=sections,
    )


def _learning(part: Part) -> Curves:
    """Learning curves: the value by the logarithm of the fraction."""
    logs = [math.log10(fraction) for fraction in part.fractions]
    lines = [
        _line(part, encoder, [(x, v.mean) for x, v in zip(logs, row, strict=True) if v])
        for encoder, (_, row) in zip(part.encoders, part.rows, strict=True)
    ]
    means = [y for line in lines for _, y in line.points] or [0.0]
    step = next(s for s in (0.01, 0.02, 0.05, 0.1, 0.25) if max(means) - min(means) < 5 * s)
    low = math.floor(min(means) / step) * step
    count = max(1, math.ceil((max(means) - low) / step))
    ticks = [low + step * n for n in range(count + 1)]
    title = f"{part.metric} by share of the labels"
    return plot(title, lines, list(zip(logs, part.head, strict=True)), ticks, dots=True)


def _roc(part: Part) -> Curves | None:
    """ROC curves, the mean over the labels, of the encoders that have one."""
    lines = []
    for encoder, entry in part.shown.items():
        if roc := entry.get("roc"):
            rates = (roc["false_positive_rates"], roc["true_positive_rates"]["mean"])
            lines.append(_line(part, encoder, list(zip(*rates, strict=True))))
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    title = "ROC curves: true by false positive rate"
    return plot(title, lines, [(x, f"{x:.2f}") for x in ticks], ticks, 420) if lines else None


def _line(part: Part, encoder: Encoder, points: list[tuple[float, float]]) -> Line:
    method, arm = encoder
    place = part.methods.index(method) if method in part.methods else 0
    return Line(label(encoder), _COLORS[arm], _DASHES[place % len(_DASHES)], points)


_LEGEND = (
    "Means over seeds with Student's 95 % interval over the seeds; differences are of the same "
    "seeds; = marks a difference that cannot be told from 0."
)


def _markdown(parts: Sequence[Part], note: str) -> str:
    said = "\n".join(f"- {sentence}" for sentence in summary.sentences(parts))
    blocks = [said, f"{_LEGEND} {note}".strip()]
    for title, (head, *rows) in (grid for part in parts for grid in _grids(part)):
        lines = [head, ["---"] * len(head), *rows]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        blocks.append(f"**{title}**\n\n{table}")
    return "\n\n".join(blocks) + "\n"


def _latex(parts: Sequence[Part], note: str) -> str:
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


TEMPLATES.filters["study_value"] = as_text
TEMPLATES.filters["base64"] = lambda data: base64.b64encode(data).decode()
