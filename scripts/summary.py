"""Print the figures of several runs as one table: a row for each encoder and figure, a column for
each fraction of the labels, and one for figures without any (zero-shot, grounding).

    python -m scripts.summary RUN [RUN ...] [--figures 'auroc/mean' 'dice/*' map]
"""

import argparse
import json
import re
import sys
from fnmatch import fnmatchcase
from pathlib import Path

from medsyn_jax.core import log

FIGURES = ("auroc/mean", "accuracy", "dice/*", "map", "map_*")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--figures", nargs="+", default=FIGURES)
    options = parser.parse_args()
    rows: dict[tuple[str, str, str], dict[float, str]] = {}
    for run in options.runs:
        try:
            results = json.loads((run / "results.json").read_text())
        except (OSError, ValueError):
            sys.exit(f"error: {run}: no finished run: run its task to the end first")
        for name, entry in results["metrics"].items():
            match = re.fullmatch(r"(?:(.+)/)?test/(?:([\d.e-]+)%/)?(.+)", name)
            if match and any(fnmatchcase(match[3], pattern) for pattern in options.figures):
                row = rows.setdefault((results["task"], match[1] or "pretrained", match[3]), {})
                row[float(match[2] or 0)] = text(entry)
    if not rows:
        sys.exit(f"error: --figures: no run has a figure {' or '.join(options.figures)}")
    fractions = sorted({fraction for row in rows.values() for fraction in row})
    columns = [f"{fraction:g} % of labels" if fraction else "no label" for fraction in fractions]
    head = ["task, encoder, figure", *columns]
    log.table(head, [[", ".join(k), *(r.get(f, "-") for f in fractions)] for k, r in rows.items()])


def text(entry: dict) -> str:
    """0.812 [0.790, 0.834]"""
    ends = entry.get("ci95")
    interval = f" [{', '.join(log.number(end, '.3f') for end in ends)}]" if ends else ""
    return f"{log.number(entry['value'], '.3f')}{interval}"


if __name__ == "__main__":
    main()
