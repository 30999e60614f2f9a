"""Which images a curation report shows, and the table of all of them."""

import csv
import io
import re
from collections.abc import Mapping, Sequence

import numpy as np

from medsyn_jax.curation.collection import Collection
from medsyn_jax.curation.privacy import Screen
from medsyn_jax.data.store import shards
from medsyn_jax.tables.page import Card, Picture

SHOWN, A_PROMPT = 12, 4  # cards of each kind, and images of a prompt


def origin(key: str) -> str:
    """The key of the record that a synthetic image was made from: without its #number."""
    return re.sub(r"#\d+$", "", key)


def prompts(synthetic: Collection, real: Sequence[Collection], seed: int) -> list[Card]:
    """Images of prompts drawn at random, beside the real image of the report where there is one."""
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(synthetic.keys):
        rows_of.setdefault(origin(key), []).append(row)
    places = {key: (part, row) for part in real for row, key in enumerate(part.keys)}
    drawn = np.random.default_rng(seed).permutation(sorted(rows_of))[:SHOWN]
    shown = []
    for key in drawn.tolist():
        rows = rows_of[key][:A_PROMPT]
        pictures = []
        part, row = places.get(key, (None, 0))
        theirs = "" if part is None else shards.value(part.stored(row), "report")
        if part is not None and theirs == synthetic.reports[rows[0]]:
            pictures.append(Picture(part.pixels([row])[0], "real", key, real=True))
        for row, pixels in zip(rows, synthetic.pixels(rows), strict=True):
            pictures.append(Picture(pixels, "synthetic", synthetic.keys[row]))
        shown.append(Card(pictures, str(synthetic.prompts[rows[0]])))
    return shown


def worst_aligned(synthetic: Collection, scores: np.ndarray, threshold: float) -> list[Card]:
    """The images that fit their reports worst, one of a report, marked where they are below the
    threshold."""
    order = np.argsort(scores, kind="stable")
    rows = order[np.sort(np.unique(synthetic.texts[order], return_index=True)[1])][:SHOWN]
    return [
        Card(
            [Picture(pixels, f"score {scores[row]:.3f}", synthetic.keys[row])],
            str(synthetic.texts[row]),
            bool(scores[row] < threshold),
        )
        for row, pixels in zip(rows.tolist(), synthetic.pixels(rows), strict=True)
    ]


def nearest(synthetic: Collection, train: Collection, screens: Mapping[str, Screen]) -> list[Card]:
    """The images most above a threshold, or least below it, beside what they resemble."""
    # In units of what is left between a threshold and a perfect copy.
    excess = {
        name: (s.synthetic.similarity - s.threshold) / max(1 - s.threshold, 1e-6)
        for name, s in screens.items()
    }
    most = np.max(list(excess.values()), axis=0)
    shown = []
    for row in np.argsort(-most, kind="stable")[:SHOWN].tolist():
        name = max(excess, key=lambda name: excess[name][row])
        screen = screens[name]
        near = int(screen.synthetic.index[row])
        own = synthetic.subjects[row] == train.subjects[near]
        text = (
            f"{name}: {screen.synthetic.similarity[row]:.4f}, threshold {screen.threshold:.4f}; "
            f"{'the subject of the prompt' if own else 'another subject than the prompt has'}"
        )
        pictures = [
            Picture(synthetic.pixels([row])[0], "synthetic", synthetic.keys[row]),
            Picture(train.pixels([near])[0], "training", train.keys[near], real=True),
        ]
        shown.append(Card(pictures, text, bool(most[row] > 0)))
    return shown


def rows(
    synthetic: Collection,
    train: Collection,
    scores: np.ndarray,
    screens: Mapping[str, Screen],
) -> str:
    """All synthetic images as CSV: key, alignment score, and by each screen the most similar
    training image, its similarity and whether it is flagged."""
    names = [f"{name}_{what}" for name in screens for what in ("similarity", "nearest", "flagged")]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["key", "alignment", *names])
    for row, key in enumerate(synthetic.keys):
        cells = [key, f"{scores[row]:.4f}"]
        for s in screens.values():
            near = train.keys[int(s.synthetic.index[row])]
            cells += [f"{s.synthetic.similarity[row]:.4f}", near, str(int(s.flagged[row]))]
        writer.writerow(cells)
    return stream.getvalue()
