"""The curation report as one HTML file that needs nothing beside it: tables, plots and pictures."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from medsyn_jax.core.log import UNDEFINED, number
from medsyn_jax.data.images.decode import encode_png, square

_LARGEST = 256  # pixels of a picture's side in the file

_STYLE = """
:root { --ink: #1c2733; --soft: #5d6b7a; --line: #dde3ea; --real: #2b6cb0; --fake: #c2571a; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; color: var(--ink); margin: 0 auto;
  max-width: 1080px; padding: 32px 24px 64px; background: #fff; }
h1 { font-size: 26px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 44px 0 4px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 4px 0 12px; color: var(--soft); max-width: 860px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 12px 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
table { border-collapse: collapse; margin: 8px 0 16px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 14px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
small { color: var(--soft); }
.real { color: var(--real); } .fake { color: var(--fake); }
h3 { font-size: 15px; margin: 20px 0 10px; }
.cards { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }
.beside { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
.rows { grid-template-columns: 1fr; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
.beside .card, .rows .card { display: flex; gap: 14px; }
.card.marked { border-color: #c53030; box-shadow: inset 0 3px #c53030; }
.pictures { display: flex; flex-wrap: wrap; gap: 8px; }
figure { margin: 0; width: 140px; }
img { width: 140px; height: 140px; display: block; background: #000; border-radius: 4px; }
figcaption { font-size: 12px; line-height: 1.35; margin-top: 3px; overflow-wrap: anywhere; }
.card p { font-size: 13px; line-height: 1.4; margin: 8px 0 0; color: var(--ink);
  min-width: 0; overflow-wrap: anywhere; }
.beside .card p, .rows .card p { flex: 1; margin: 0; }
.warn { background: #fff8e6; border: 1px solid #eed9a2; border-radius: 8px; padding: 8px 14px;
  color: var(--ink); }
svg { display: block; margin: 8px 0 16px; max-width: 100%; height: auto; }
svg text { font: 13px system-ui, "DejaVu Sans", sans-serif; fill: var(--ink); }
svg .mean { font-weight: 600; }
svg .tick { fill: var(--soft); font-size: 12px; }
@media print { .card { break-inside: avoid; } }
"""


class Picture(NamedTuple):
    """An image uint8 [h, w] with what stands below it in two lines."""

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


Metrics = Mapping[str, Mapping[str, Any]]


def document(facts: Mapping[str, str], metrics: Metrics, sheets: Sheets) -> str:
    """The whole page. metrics: the entries of results.json; a section without entries is left out.

    facts: what was compared, name -> value, for the head of the page.
    """
    found = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    several = any(len(card.pictures) > 2 for card in sheets.prompts)
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>Curation report</title><style>{_STYLE}</style></head><body>",
        f"<h1>Curation report</h1><dl>{found}</dl>",
        "<div class='warn'>This page shows real images and reports: it is to be kept under the "
        "same terms as the data they come from.</div>",
        _fidelity(metrics),
        _diversity(metrics),
        _section(
            "Real and synthetic by prompt",
            "Prompts drawn at random. The real image is the one that the report was written for, "
            "where the real set has it.",
            cards(sheets.prompts, "rows" if several else "beside"),
        ),
        _labels(metrics),
        _alignment(metrics, sheets.aligned),
        _privacy(metrics, sheets.privacy),
        _leftovers(metrics),
        "</body></html>\n",
    ]
    return "".join(parts)


def _fidelity(m: Metrics) -> str:
    rows = []
    for key, name in (("frechet", "Fréchet"), ("kernel", "kernel")):
        both = [m[f"fidelity/{key}/{side}"] for side in ("synthetic", "real")]
        cells = [
            f"{number(e['value'], '.3g')} <small>± {number(e['std'], '.2g')}</small>" for e in both
        ]
        rows.append([f"{name} distance", *cells, str(both[0]["n"])])
    ratio = m["fidelity/frechet/ratio"]["value"]
    note = (
        "Distance to one half of the real held-out images, on features of the encoder: of "
        "synthetic images, and of the other real half. Mean ± standard deviation over random "
        "halves by subject. The second says what two samples of one distribution give at this "
        f"size; the Fréchet distance of the synthetic images is {number(ratio, '.3g')} times it."
    )
    head = ["", "synthetic", "real half", "images a side"]
    return _section("Fidelity", note, table(head, rows))


def _diversity(m: Metrics) -> str:
    rows = []
    for key, name in (("same_prompt", "of one prompt"), ("any", "of two prompts")):
        cells = [_cell(m.get(f"diversity/ms_ssim/{side}/{key}")) for side in ("synthetic", "real")]
        if set(cells) != {""}:
            rows.append([f"two images {name}", *cells])
    note = (
        "Multi-scale structural similarity of two images; 1 is identical. Synthetic images that "
        "are more alike than real ones are poor in variety. For real images a prompt is a report's "
        "text, so one that several subjects share. n counts pairs."
    )
    return _section("Diversity", note, table(["", "synthetic", "real"], rows)) if rows else ""


def _labels(m: Metrics) -> str:
    names = [k.removeprefix("labels/real/auroc/") for k in m if k.startswith("labels/real/auroc/")]
    names += [
        name
        for k in m
        if k.startswith("labels/synthetic/auroc/")
        and (name := k.removeprefix("labels/synthetic/auroc/")) not in names
    ]
    if not names:
        return ""
    pairs = [
        (name, [m.get(f"labels/{side}/auroc/{name}") for side in ("real", "synthetic")])
        for name in sorted(names, key=lambda name: name == "mean")
    ]
    rows = [[escape(name), *map(_cell, both)] for name, both in pairs]
    note = (
        "AUROC of a linear classifier that learned the findings from real training images, judged "
        "on real held-out images and on synthetic ones by the labels of their reports. Where the "
        "second is far below the first, the finding is not drawn as it looks; far above, it is "
        "drawn more plainly than it is."
    )
    head = ["", "real held-out", "synthetic"]
    return _section("Label agreement", note, intervals(pairs, 0.5) + table(head, rows))


def _alignment(m: Metrics, shown: list[Card]) -> str:
    rows = []
    for key, name in (("true", "own report"), ("shuffled", "another report")):
        cells = [_cell(m.get(f"alignment/{side}/{key}")) for side in ("real", "synthetic")]
        rows.append([name, *cells])
    cells = [_cell(m.get(f"alignment/{side}/difference")) for side in ("real", "synthetic")]
    rows.append(["difference", *cells])
    below = m["alignment/synthetic/below"]
    note = (
        "Mean cosine of image and report by the pre-trained pair of encoders. The difference is "
        f"what an image says about its own report. {_percent(below)} of the synthetic images are "
        f"below the threshold {number(m['alignment/threshold']['value'], '.3g')}, as "
        f"{_percent(below, 'chance')} of the real held-out ones are."
    )
    body = table(["image with its", "real held-out", "synthetic"], rows)
    return _section(
        "Image and report", note, body + "<h3>Lowest scores</h3>" + cards(shown, "beside")
    )


def _privacy(m: Metrics, shown: list[Card]) -> str:
    rows = []
    for key, name in (("features", "cosine of features"), ("pixels", "correlation of pixels")):
        limit, highest, rate, above = (
            m[f"privacy/{key}/{what}"] for what in ("threshold", "maximum", "rate", "above_maximum")
        )
        limits = [number(e["value"], ".4f") for e in (limit, highest)]
        expected = _percent(rate, "chance")
        rows.append([name, *limits, _share(rate), expected, _share(above)])
    rows.append(["either", "", "", _share(m["privacy/rate"]), "", ""])
    note = (
        "Each synthetic image against all real training images. Flagged are those nearer to one of "
        "them than real held-out images come, by a quantile of those; beside it their maximum. "
        "Expected is the share of images that copy nothing and are flagged all the same."
    )
    head = ["", "threshold", "maximum", "flagged", "expected", "above maximum"]
    return _section("Privacy", note, table(head, rows) + cards(shown))


def _leftovers(m: Metrics) -> str:
    kinds = ("prompt", "report")
    found = {kind: _below(m, f"leftovers/{kind}/") for kind in kinds}
    names = list(found["prompt"])
    rows = [[f"<code>{x}</code>", *(str(found[k][x]["value"]) for k in kinds)] for x in names]
    count = found["prompt"][names[0]]["n"]
    note = (
        f"Texts, of {count}, that hold a mark of de-identification, or what should have been "
        "replaced by one. A prompt is what the generator read; it should hold none."
    )
    return _section(
        "Left-overs of de-identification", note, table(["", "prompts", "reports"], rows)
    )


def _below(m: Metrics, prefix: str) -> dict[str, Mapping[str, Any]]:
    return {k.removeprefix(prefix): v for k, v in m.items() if k.startswith(prefix)}


def _section(title: str, note: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p>{escape(note)}</p>{body}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are HTML."""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def cards(shown: Sequence[Card], layout: str = "") -> str:
    """Cards of pictures with the text below, or to the right: "beside", or "rows" of one card."""
    found = []
    for card in shown:
        pictures = "".join(_picture(p) for p in card.pictures)
        kind = "card marked" if card.marked else "card"
        found.append(
            f"<div class='{kind}'><div class='pictures'>{pictures}</div><p>{escape(card.text)}</p>"
            "</div>"
        )
    return f"<div class='cards {layout}'>{''.join(found)}</div>"


def _picture(p: Picture) -> str:
    small = p.pixels if max(p.pixels.shape) <= _LARGEST else square(p.pixels, _LARGEST)
    data = base64.b64encode(encode_png(small)).decode()
    title, key = escape(p.title), escape(p.key)
    return (
        f"<figure><img src='data:image/png;base64,{data}' alt='{title}'>"
        f"<figcaption class='{'real' if p.real else 'fake'}'><b>{title}</b><br>{key}</figcaption>"
        "</figure>"
    )


_LEFT, _WIDE, _ROW = 170, 560, 30  # pixels of the plot


def intervals(pairs: Sequence[tuple[str, Sequence[Any]]], start: float) -> str:
    """A plot of (name, (real entry or None, synthetic one)) with 95 % intervals, up to 1."""
    pairs = [(name, [_drawn(entry) for entry in both]) for name, both in pairs]
    lows = [ends[0] for _, both in pairs for ends in both if ends]
    start = min(start, np.floor(10 * min(lows, default=start)) / 10)
    height = _ROW * len(pairs) + 30

    def x(value: float) -> float:
        return _LEFT + _WIDE * (value - start) / (1 - start)

    marks = []
    for tick in np.arange(start, 1.001, 0.1):
        marks.append(
            f"<line x1='{x(tick):.1f}' x2='{x(tick):.1f}' y1='4' y2='{height - 22}' "
            "stroke='#dde3ea'/>"
            f"<text class='tick' x='{x(tick):.1f}' y='{height - 6}' text-anchor='middle'>"
            f"{tick:.1f}</text>"
        )
    for row, (name, both) in enumerate(pairs):
        middle = _ROW * row + 20
        kind = "mean" if name == "mean" else ""
        fit = "textLength='160' lengthAdjust='spacingAndGlyphs' " if len(name) > 22 else ""
        marks.append(f"<text class='{kind}' {fit}x='0' y='{middle + 4}'>{escape(name)}</text>")
        for ends, color, shift in zip(both, ("--real", "--fake"), (-5, 5), strict=True):
            if not ends:
                continue
            y, style = middle + shift, f"style='stroke:var({color});fill:var({color})'"
            low, value, high = ends
            marks.append(
                f"<line x1='{x(low):.1f}' x2='{x(high):.1f}' y1='{y}' y2='{y}' stroke-width='2' "
                f"{style}/><circle cx='{x(value):.1f}' cy='{y}' r='4' {style}/>"
            )
    legend = "".join(
        f"<circle cx='{_LEFT + _WIDE + 30}' cy='{y}' r='4' style='fill:var({color})'/>"
        f"<text x='{_LEFT + _WIDE + 42}' y='{y + 4}'>{name}</text>"
        for name, color, y in (("real held-out", "--real", 16), ("synthetic", "--fake", 36))
    )
    wide = _LEFT + _WIDE + 150
    return (
        f"<svg viewBox='0 0 {wide} {height}' width='{wide}' height='{height}' role='img' "
        f"aria-label='AUROC by finding'>{''.join(marks)}{legend}</svg>"
    )


def _ends(entry: Mapping[str, Any]) -> list[float]:
    """The 95 % interval of an entry, [] where it has none."""
    ends = entry.get("ci95") or []
    return [] if UNDEFINED in map(number, ends) else list(ends)


def _drawn(entry: Mapping[str, Any] | None) -> list[float]:
    """Low end, value and high end of an entry; [] where its value is undefined."""
    if not entry or number(entry["value"]) == UNDEFINED:
        return []
    low, high = _ends(entry) or [entry["value"]] * 2
    return [low, entry["value"], high]


def _cell(entry: Mapping[str, Any] | None) -> str:
    """value [interval] n."""
    if not entry:
        return ""
    ends = _ends(entry)
    between = f" <small>[{ends[0]:.3f}, {ends[1]:.3f}]</small>" if ends else ""
    return f"{number(entry['value'], '.3f')}{between} <small>n {entry['n']}</small>"


def _share(entry: Mapping[str, Any]) -> str:
    """percent [interval] k of n."""
    ends = _ends(entry)
    between = f"[{100 * ends[0]:.2g}, {100 * ends[1]:.2g}] " if ends else ""
    known = number(entry["value"]) != UNDEFINED
    count = f"{round(entry['value'] * entry['n'])} of {entry['n']}" if known else ""
    return f"{_percent(entry)} <small>{between}{count}</small>"


def _percent(entry: Mapping[str, Any], what: str = "value") -> str:
    value = entry[what]
    return UNDEFINED if number(value) == UNDEFINED else f"{100 * value:.2g} %"
