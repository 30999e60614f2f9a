"""Make docs/phantom.png, a contact sheet of the phantom corpus, or measure the phantom's speed.

python scripts/phantom_sheet.py             write the sheet, print its name and size
python scripts/phantom_sheet.py --bench     print phantoms per second and core at four sizes
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the figure is for one core
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsyn_jax.data.store import card
from medsyn_jax.phantom import study as phantom
from medsyn_jax.phantom.study import LABELS, Phantom

SIDE, TEXT, GAP = 184, 142, 4  # pixels
SEED = 7
# (label, view) -> grade and kind on the sheet; others are of grade 1 and any kind
SHOWN = {
    ("Cardiomegaly", "AP"): (2, ""),
    ("Pleural Effusion", "AP"): (2, "layering"),
    ("Pneumothorax", "PA"): (0, "apical"),
    ("Pneumothorax", "AP"): (2, "tension"),
    ("Consolidation", "PA"): (2, "lobar"),
    ("Edema", "AP"): (2, "alveolar"),
    ("Atelectasis", "PA"): (2, "linear"),
    ("Atelectasis", "AP"): (2, "basal"),
    ("Lung Lesion", "AP"): (2, "mass"),
    ("Foreign Object", "PA"): (1, "pin"),
    ("Foreign Object", "AP"): (1, "key"),
}
COLORS = {"lungs": (70, 130, 220), "pneumothorax": (240, 90, 70), "effusion": (80, 200, 120)}
BOX_COLORS = {
    "Consolidation": (255, 190, 40),
    "Lung Lesion": (255, 90, 200),
    "Foreign Object": (90, 230, 240),
}


def bench(count: int) -> None:
    """Print images per second of processor time, on one core."""
    for size, number in ((64, count), (128, count), (224, count // 3), (512, count // 12)):
        phantom.study(0, 0, 0, size)
        start = time.process_time()
        for subject in range(number):
            phantom.study(1, subject, 0, size)
        rate = number / (time.process_time() - start)
        print(f"{size:4d} px  {rate:7.1f} images/s/core  ({number} images)")


def find(label: str, view: str, grade: int, kind: str = "") -> tuple[int, int, int]:
    """The first study with this label alone, in this view, grade and kind ('' for any)."""
    for subject in range(20000):
        plan = phantom.plan(SEED, subject, 0)
        names = {f.label for f in plan.findings} or {"No Finding"}
        kinds = {f.kind for f in plan.findings} | {""}
        worst = max((f.grade for f in plan.findings), default=grade)
        if not all(f.certain for f in plan.findings):
            continue
        if names == {label} and plan.pose.view == view and worst == grade and kind in kinds:
            return SEED, subject, 0
    raise ValueError(f"no {label} {kind} of grade {grade} in {view}")


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
        pen.rectangle(frame, outline=BOX_COLORS[label])
    return picture


def palette() -> Image.Image:
    """All colours of the sheet: greys, greys under each tint, and frames."""
    greys = np.linspace(0, 255, 64)[:, None].repeat(3, 1)
    tints = [0.68 * greys[::2] + 0.32 * np.array(tint) for tint in COLORS.values()]
    frames = np.array([*BOX_COLORS.values()])
    colors = np.concatenate((greys, *tints, frames)).astype(np.uint8)
    image = Image.new("P", (1, 1))
    image.putpalette(colors.tobytes())
    return image


def tile(study: Phantom, label: str, font: Callable[[int], ImageFont.FreeTypeFont]) -> Image.Image:
    """Image, overlay and text, from top to bottom."""
    picture = Image.new("RGB", (SIDE, 2 * SIDE + TEXT + GAP), "white")
    picture.paste(Image.fromarray(study.image).convert("RGB"), (0, 0))
    picture.paste(overlay(study), (0, SIDE + GAP))
    text = study.report
    text = text[min(text.find(head) for head in ("FINDINGS", "IMPRESSION") if head in text) :]
    pen = ImageDraw.Draw(picture)
    pen.text((2, 2 * SIDE + GAP + 1), f"{label}, {study.view}", "black", font(11))
    shown = card.wrapped(text, font(8), SIDE - 4, 13)
    pen.text((2, 2 * SIDE + GAP + 15), shown, "black", font(8), spacing=1)
    return picture


def sheet(path: Path) -> None:
    """Write the contact sheet: for each label a pair of tiles, PA and AP."""

    def font(points: int) -> ImageFont.FreeTypeFont:
        return ImageFont.load_default(points)  # type: ignore[return-value]

    cards = []
    for label in LABELS:
        for view in ("PA", "AP"):
            study = phantom.study(*find(label, view, *SHOWN.get((label, view), (1, ""))), SIDE)
            cards.append(tile(study, label, font))
    columns = 6
    width, height = cards[0].size
    rows = -(-len(cards) // columns)
    page = Image.new("RGB", (columns * (width + GAP), rows * (height + GAP)), "white")
    for i, picture in enumerate(cards):
        page.paste(picture, ((i % columns) * (width + GAP), (i // columns) * (height + GAP)))
    page.quantize(palette=palette(), dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bench", action="store_true", help="print the speed, write nothing")
    parser.add_argument("--count", type=int, default=240, help="images timed with --bench")
    parser.add_argument("--out", type=Path, default=Path("docs/phantom.png"))
    options = parser.parse_args()
    bench(options.count) if options.bench else sheet(options.out)
