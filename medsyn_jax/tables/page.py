"""The curation report: one HTML file that needs nothing beside it, from `page.html.j2`."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from medsyn_jax.core.log import UNDEFINED, number
from medsyn_jax.data.images.decode import encode_png, square

_LARGEST = 256  # pixels of a picture's side in the file
_LEFT, _WIDE, _ROW = 170, 560, 30  # pixels of the plot: its start, its width and a finding's height
_SIDES = ("real", "synthetic")

Entry = Mapping[str, Any]
Findings = Sequence[tuple[str, Sequence[Entry | None]]]  # name, its AUROC on either side


class Picture(NamedTuple):
    """An image uint8 [h, w] above two lines: title and key."""

    pixels: np.ndarray
    title: str
    key: str
    real: bool = False


class Card(NamedTuple):
    """Pictures side by side with a text."""

    pictures: list[Picture]
    text: str
    marked: bool = False


class Sheets(NamedTuple):
    """The pictures of a report."""

    prompts: list[Card]
    aligned: list[Card]
    privacy: list[Card]


class Plot(NamedTuple):
    """Places in pixels of the values of findings on an axis up to 1."""

    width: int
    height: int
    ticks: list[tuple[float, float]]  # x, value
    names: list[tuple[str, int]]  # name, y
    marks: list[tuple[str, int, float, float, float]]  # kind, y, x of low end, value and high end


def document(facts: Mapping[str, str], metrics: Mapping[str, Entry], sheets: Sheets) -> str:
    """The whole page. metrics: the entries of results.json; a section without entries is left out.

    facts: the sets compared, name -> value, for the head of the page.
    """
    by_side = [_below(metrics, f"labels/{side}/auroc/") for side in _SIDES]
    names = sorted(dict.fromkeys(n for entries in by_side for n in entries), key="mean".__eq__)
    findings = [(name, [entries.get(name) for entries in by_side]) for name in names]
    return TEMPLATES.get_template("page.html.j2").render(
        facts=facts,
        m=metrics,
        sheets=sheets,
        several=any(len(card.pictures) > 2 for card in sheets.prompts),
        findings=findings,
        plot=plot(findings, 0.5),
    )


def plot(findings: Findings, start: float) -> Plot:
    """The plot of findings from `start`, or from below the lowest interval."""
    rows = [(name, [_span(entry) for entry in both]) for name, both in findings]
    lows = [span[0] for _, both in rows for span in both if span]
    start = min(start, np.floor(10 * min(lows, default=start)) / 10)

    def x(value: float) -> float:
        return round(_LEFT + _WIDE * (value - start) / (1 - start), 1)

    names, marks = [], []
    for row, (name, both) in enumerate(rows):
        y = _ROW * row + 20
        names.append((name, y + 4))
        for span, kind, shift in zip(both, ("real", "fake"), (-5, 5), strict=True):
            if span:
                marks.append((kind, y + shift, *map(x, span)))
    ticks = [(x(value), value) for value in np.arange(start, 1.001, 0.1).tolist()]
    return Plot(_LEFT + _WIDE + 150, _ROW * len(rows) + 30, ticks, names, marks)


def _span(entry: Entry | None) -> list[float]:
    """Low end, value and high end of an entry; [] where the value is undefined."""
    if not entry or number(entry["value"]) == UNDEFINED:
        return []
    low, high = _ends(entry) or [entry["value"]] * 2
    return [low, entry["value"], high]


def _ends(entry: Entry) -> list[float]:
    """The 95 % interval of an entry, [] where it has none."""
    ends = entry.get("ci95") or []
    return [] if UNDEFINED in map(number, ends) else list(ends)


def _percent(value: float | None) -> str:
    return f"{100 * value:.2g} %" if value is not None and math.isfinite(value) else UNDEFINED


def _below(metrics: Mapping[str, Entry], prefix: str) -> dict[str, Entry]:
    return {k.removeprefix(prefix): v for k, v in metrics.items() if k.startswith(prefix)}


def _png(pixels: np.ndarray) -> str:
    small = pixels if max(pixels.shape) <= _LARGEST else square(pixels, _LARGEST)
    return base64.b64encode(encode_png(small)).decode()


TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("medsyn_jax", "tables"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {
    "number": number,
    "percent": _percent,
    "ends": _ends,
    "span": _span,
    "below": _below,
    "png": _png,
}
