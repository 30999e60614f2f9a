"""The page of a report, from figures that lack what a set may lack."""

import re

import numpy as np

from medsyn_jax.tables import page

MACROS = page.TEMPLATES.get_template("macros.html.j2").module


def _drawn(findings) -> str:
    return MACROS.intervals(page.plot(findings, 0.5))


def test_a_page_without_labels_and_with_a_hostile_report():
    rate = {"value": 0.0, "n": 4, "ci95": [0.0, 0.6], "chance": 0.01}
    distance = {"value": 1.5, "n": 4, "std": 0.1}
    metrics = {
        f"fidelity/{k}/{s}": distance for k in ("frechet", "kernel") for s in ("synthetic", "real")
    }
    metrics |= {"fidelity/frechet/ratio": {"value": 1.0, "n": 4}}
    metrics |= {f"alignment/{s}/true": {"value": 0.3, "n": 4} for s in ("synthetic", "real")}
    metrics |= {"alignment/threshold": {"value": 0.1, "n": 4}, "alignment/synthetic/below": rate}
    for name in ("features", "pixels"):
        metrics |= {f"privacy/{name}/{k}": rate for k in ("threshold", "maximum", "above_maximum")}
        metrics |= {f"privacy/{name}/rate": rate}
    metrics |= {"privacy/rate": rate}
    metrics |= {f"leftovers/{k}/___": {"value": 1, "n": 4} for k in ("prompt", "report")}
    picture = page.Picture(np.zeros((600, 400), np.uint8), "real", "a'b<c")
    card = page.Card([picture], "<script>alert('x')</script> & more", marked=True)
    made = page.document({"synthetic": "<dir>"}, metrics, page.Sheets([card], [card], []))
    assert "Label agreement" not in made
    assert "Diversity" not in made
    assert "<script" not in made
    assert "&lt;script&gt;alert(&#39;x&#39;)" in made
    assert made.count("a&#39;b&lt;c") == 2
    assert len(re.findall("class='card marked'", made)) == 2
    for tag in ("section", "table", "figure", "div", "tr", "td", "p"):
        assert len(re.findall(f"<{tag}[ >]", made)) == made.count(f"</{tag}>")


def test_an_interval_below_the_axis_moves_its_start():
    low = {"value": 0.31, "n": 9, "ci95": [0.22, 0.4]}
    plot = _drawn([("a", [low, None]), ("b", [None, {"value": 0.9, "n": 9}])])
    assert ">0.2</text>" in plot
    assert ">0.1</text>" not in plot
    assert plot.count("<circle") == 2 + 2  # and the legend
    places = [float(x) for x in re.findall(r"x1='([-\d.]+)'", plot)]
    assert min(places) >= page._LEFT


UNDEFINED = {"value": None, "n": 9}


def test_what_is_undefined_is_shown_so():
    entry = {"value": 0.5, "n": 10, "ci95": [0.25, 0.75], "chance": None}
    assert MACROS.cell(UNDEFINED) == "undefined <small>n 9</small>"
    assert MACROS.cell({"value": 0.5, "n": 9, "ci95": None}) == "0.500 <small>n 9</small>"
    assert MACROS.cell({"value": 0.5, "n": 9, "ci95": [None, 1.0]}) == "0.500 <small>n 9</small>"
    assert MACROS.share(entry) == "50 % <small>[25, 75] 5 of 10</small>"
    assert MACROS.share(UNDEFINED) == "undefined <small></small>"
    assert page._percent(entry["chance"]) == "undefined"
    plot = _drawn([("a", [UNDEFINED, None]), ("b", [UNDEFINED, entry])])
    assert plot.count("<circle") == 1 + 2  # and the legend
    assert "nan" not in _drawn([("a", [UNDEFINED, UNDEFINED])])
