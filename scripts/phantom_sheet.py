"""Makes docs/phantom.png, a contact sheet of the phantom corpus; --bench measures the speed."""

from __future__ import annotations

import argparse
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the figure is for one core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsyn_jax.data import phantom
from medsyn_jax.data.phantom import LABELS, Phantom

SIDE, TEXT, GAP = 208, 150, 4
COLORS = {"lungs": (70, 130, 220), "pneumothorax": (240, 90, 70), "effusion": (80, 200, 120)}
BOX_COLORS = {"Consolidation": (255, 190, 40), "Lung Lesion": (255, 90, 200)}


def bench(count: int) -> None:
    """Prints images a second of processor time, for one core."""
    for size, number in ((64, count), (128, count), (224, count // 3), (512, count // 12)):
        phantom.study(0, 0, 0, size)
        start = time.process_time()
        for subject in range(number):
            phantom.study(1, subject, 0, size)
        rate = number / (time.process_time() - start)
        print(f"{size:4d} px  {rate:7.1f} images/s/core  ({number} images)")


def find(label: str, view: str, grade: int) -> tuple[int, int, int]:
    """The first study that shows this label alone in this view, 'No Finding' for none."""
    for subject in range(20000):
        plan = phantom.plan(7, subject, 0)
        names = {f.label for f in plan.findings} or {"No Finding"}
        if names != {label} or plan.pose.view != view:
            continue
        if not plan.findings or (max(f.grade for f in plan.findings) == grade):
            return 7, subject, 0
    raise ValueError(f"no {label} in {view}")


def overlay(study: Phantom) -> Image.Image:
    """The masks as tints and the boxes as frames over the image."""
    size = len(study.image)
    color = np.repeat(study.image[..., None], 3, 2).astype(np.float32)
    for name, tint in COLORS.items():
        color[study.masks[name]] = 0.68 * color[study.masks[name]] + 0.32 * np.array(tint)
    picture = Image.fromarray(color.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for label, x0, y0, x1, y1 in study.boxes:
        frame = (x0, y0, min(x1, size) - 1, min(y1, size) - 1)
        pen.rectangle(frame, outline=BOX_COLORS.get(label, (90, 230, 240)))
    return picture


def tile(study: Phantom, label: str, font: Callable[[int], ImageFont.FreeTypeFont]) -> Image.Image:
    """Image, overlay and text, from top to bottom."""
    card = Image.new("RGB", (SIDE, 2 * SIDE + TEXT + GAP), "white")
    card.paste(Image.fromarray(study.image).convert("RGB"), (0, 0))
    card.paste(overlay(study), (0, SIDE + GAP))
    text = study.report[max(0, study.report.find("FINDINGS")) :]
    lines = textwrap.wrap(" ".join(text.split()), 44)
    pen = ImageDraw.Draw(card)
    pen.text((2, 2 * SIDE + GAP + 1), f"{label}, {study.view}", "black", font(11))
    shown = lines[:13] + (["..."] if len(lines) > 13 else [])
    pen.text((2, 2 * SIDE + GAP + 15), "\n".join(shown), "black", font(8), spacing=1)
    return card


def sheet(path: Path) -> None:
    """Writes the contact sheet: each label in a row of pairs, PA and AP."""

    def font(points: int) -> ImageFont.FreeTypeFont:
        return ImageFont.load_default(points)  # type: ignore[return-value]

    cards = []
    for number, label in enumerate(LABELS):
        for view in ("PA", "AP"):
            grade = 1 if label == "Foreign Object" else (number + (view == "AP")) % 2 + 1
            study = phantom.study(*find(label, view, grade), SIDE)
            cards.append(tile(study, label, font))
    columns = 6
    width, height = cards[0].size
    rows = -(-len(cards) // columns)
    page = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP)), "white")
    for i, card in enumerate(cards):
        page.paste(card, ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    page.quantize(200).save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bench", action="store_true", help="print the speed, write nothing")
    parser.add_argument("--count", type=int, default=240, help="images timed with --bench")
    parser.add_argument("--out", type=Path, default=Path("docs/phantom.png"))
    options = parser.parse_args()
    bench(options.count) if options.bench else sheet(options.out)
