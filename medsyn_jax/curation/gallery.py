"""The images that a curation report shows, and the table of all of them."""

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
    """The key of the record whose report was the prompt: the image's key without its #number."""
    return re.sub(r"#\d+$", "", key)


def prompts(synthetic: Collection, real: Sequence[Collection], seed: int) -> list[Card]:
    """Images of prompts drawn at random, beside the real image of the report where there is one."""
    rows_of: dict[str, list[int]] = {}
    for row, key in enumerate(synthetic.keys):
        rows_of.setdefault(origin(key), []).append(row)
    originals = {key: (part, row) for part in real for row, key in enumerate(part.keys)}
    keys = np.random.default_rng(seed).permutation(sorted(rows_of))[:SHOWN]
    cards = []
    for key in keys.tolist():
        rows, pictures = rows_of[key][:A_PROMPT], []
        if key in originals:
            part, row = originals[key]
            if shards.value(part.stored(row), "report") == synthetic.reports[rows[0]]:
                pictures.append(Picture(part.pixels([row])[0], "real", key, real=True))
        for row, pixels in zip(rows, synthetic.pixels(rows), strict=True):
            pictures.append(Picture(pixels, "synthetic", synthetic.keys[row]))
        cards.append(Card(pictures, str(synthetic.prompts[rows[0]])))
    return cards


def worst_aligned(synthetic: Collection, scores: np.ndarray, threshold: float) -> list[Card]:
    """The images with the lowest scores [n], one of a report; marked if below the threshold."""
    order = np.argsort(scores, kind="stable")
    rows = order[np.sort(np.unique(synthetic.texts[order], return_index=True)[1])][:SHOWN]
    cards = []
    for row, pixels in zip(rows.tolist(), synthetic.pixels(rows), strict=True):
        picture = Picture(pixels, f"score {scores[row]:.3f}", synthetic.keys[row])
        cards.append(Card([picture], str(synthetic.texts[row]), bool(scores[row] < threshold)))
    return cards


def nearest(synthetic: Collection, train: Collection, screens: Mapping[str, Screen]) -> list[Card]:
    """The images most above a threshold, or least below it, beside their nearest training image."""
    # In units of the distance from a threshold to a perfect copy.
    excess = {
        name: (s.synthetic.similarity - s.threshold) / max(1 - s.threshold, 1e-6)
        for name, s in screens.items()
    }
    most = np.max(list(excess.values()), axis=0)
    cards = []
    for row in np.argsort(-most, kind="stable")[:SHOWN].tolist():
        name = max(excess, key=lambda name: excess[name][row])
        screen = screens[name]
        near = int(screen.synthetic.index[row])
        same = synthetic.subjects[row] == train.subjects[near]
        text = (
            f"{name}: {screen.synthetic.similarity[row]:.4f}, threshold {screen.threshold:.4f}; "
            f"{'the subject of the prompt' if same else 'another subject than the prompt has'}"
        )
        pictures = [
            Picture(synthetic.pixels([row])[0], "synthetic", synthetic.keys[row]),
            Picture(train.pixels([near])[0], "training", train.keys[near], real=True),
        ]
        cards.append(Card(pictures, text, bool(most[row] > 0)))
    return cards


def rows(
    synthetic: Collection,
    train: Collection,
    scores: np.ndarray,
    screens: Mapping[str, Screen],
) -> str:
    """CSV with a line for each synthetic image: key, alignment score, and by each screen the
    similarity to the nearest training image, its key and whether the image is flagged."""
    columns = [
        f"{name}_{what}" for name in screens for what in ("similarity", "nearest", "flagged")
    ]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["key", "alignment", *columns])
    for row, key in enumerate(synthetic.keys):
        cells = [key, f"{scores[row]:.4f}"]
        for s in screens.values():
            near = train.keys[int(s.synthetic.index[row])]
            cells += [f"{s.synthetic.similarity[row]:.4f}", near, str(int(s.flagged[row]))]
        writer.writerow(cells)
    return stream.getvalue()
