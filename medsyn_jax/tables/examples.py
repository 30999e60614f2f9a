"""Pictures of what a task predicts for a few test images, the same ones for every encoder.

A strip is one PNG: images side by side, each above a short text. The file also holds its caption
and what its two colours mean, as PNG texts. Blue is true and orange predicted, colours of Okabe and
Ito that the colour-blind can tell apart.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from PIL.PngImagePlugin import PngInfo

from medsyn_jax.core.detection import Boxes
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.data.store import shards, splits

SHOWN, SIDE = 6, 128  # images of a strip, and their side in pixels
TRUE, PREDICTED = (86, 180, 233), (230, 159, 0)
_GAP, _TEXT = 4, 12  # pixels between images, and height of the letters below them
_TEXTS = ("Description", "Blue", "Orange")
_MOST = 5  # predicted boxes of an image
_STRONGEST = 0.5  # share of the colour at the hottest places of a heat map
_FULL = 3.0  # change of the logit at which a place has three quarters of it


class Strip(NamedTuple):
    """A strip as its file holds it; "" for a colour without a meaning."""

    png: bytes
    caption: str
    blue: str
    orange: str


def read(path: Path) -> Strip | None:
    """The strip in a file, None without a file; UserError for a file that is no strip."""
    if not path.exists():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = [str(image.info.get(name, "")) for name in _TEXTS]
            image.load()
    except (OSError, SyntaxError, ValueError):
        raise UserError(f"{path}: is no whole PNG: delete the file") from None
    return Strip(path.read_bytes(), *texts)


def chosen(keys: Sequence[str], usable: np.ndarray, most: int = SHOWN) -> np.ndarray:
    """Rows of at most so many records that `usable`, bool [n], allows, by a hash of their keys."""
    rows = np.flatnonzero(usable).tolist()
    rows.sort(key=lambda row: splits.unit(0, f"example/{keys[row]}"))
    return np.array(rows[:most], int)


def path(workdir: Path, encoder: str, fraction: str) -> Path:
    """Of the strip of an encoder at a label fraction, such as "100%"."""
    return workdir / "examples" / f"{encoder}-{fraction}.png"


def draw_masks(path: Path, images: np.ndarray, truth: np.ndarray, predicted: np.ndarray) -> None:
    """Outlines of true and of predicted masks, and the Dice coefficient of each image.

    images: uint8 [n, s, s]; truth, predicted: bool [n, s, s]. The outline of the true mask lies
    inside of its edge and that of the predicted one outside, so that equal masks show both.
    """
    tiles, texts = [], []
    for image, real, guess in zip(images, truth, predicted, strict=True):
        pixels = np.asarray(_enlarged(image)).copy()
        for mask, edge, color in ((real, "inside", TRUE), (guess, "outside", PREDICTED)):
            pixels[_outline(mask, edge)] = color
        tiles.append(Image.fromarray(pixels))
        total = int(real.sum() + guess.sum())
        texts.append(f"Dice {2 * int((real & guess).sum()) / total:.2f}" if total else "empty")
    caption = "Outlines of masks and, below each image, their Dice coefficient"
    _save(path, tiles, texts, caption, "true mask", "predicted mask")


def draw_boxes(path: Path, images: np.ndarray, truth: Boxes, predicted: Boxes) -> None:
    """True boxes and the predicted ones of probability 0.5 and more, at least the best one.

    images: uint8 [n, s, s]; truth, predicted: of these images; the scores are probabilities, the
    highest first.
    """
    assert predicted.scores is not None
    tiles, texts = [], []
    for i, image in enumerate(images):
        tile = _enlarged(image)
        pen, scale = ImageDraw.Draw(tile), SIDE / len(image)
        real = truth.corners[i][truth.labels[i] >= 0]
        present = predicted.labels[i] >= 0
        guesses, scores = predicted.corners[i][present], predicted.scores[i][present]
        count = min(_MOST, max(1, int((scores >= 0.5).sum())))
        for boxes, grow, color in ((real, 0, TRUE), (guesses[:count], 1, PREDICTED)):
            for left, top, right, bottom in (
                np.clip(boxes * scale, -SIDE, 2 * SIDE).round().tolist()
            ):
                ends = (max(left, right - 1) + grow, max(top, bottom - 1) + grow)
                pen.rectangle((left - grow, top - grow, *ends), outline=color)
        tiles.append(tile)
        texts.append(f"best box {scores[0]:.2f}" if len(scores) else "no box")
    caption = "Boxes and, below each image, the probability of the best predicted one"
    _save(path, tiles, texts, caption, "true box", "predicted box")


def draw_heat(
    path: Path, images: np.ndarray, maps: np.ndarray, probability: np.ndarray, label: str
) -> None:
    """Maps over images: orange where a place raises the logit of a label, blue where it lowers it.

    images: uint8 [n, s, s]; maps: float [n, p, q], what a place adds to the logit, 0 as in the mean
    image; probability: [n] of the label. Equal colours mean equal numbers in all pictures.
    """
    tiles = []
    cold, hot = (np.array(color, np.float32) for color in (TRUE, PREDICTED))
    for image, values in zip(images, maps, strict=True):
        grey = np.asarray(_enlarged(image), np.float32)
        field = Image.fromarray(np.tanh(values / _FULL).astype(np.float32))
        heat = np.asarray(field.resize((SIDE, SIDE), Image.Resampling.BILINEAR))[..., None]
        share = _STRONGEST * np.abs(heat)
        pixels = (1 - share) * grey + share * np.where(heat > 0, hot, cold)
        tiles.append(Image.fromarray(pixels.astype(np.uint8)))
    texts = [f"P = {p:.2f}" for p in probability]
    places = " x ".join(map(str, maps.shape[1:]))
    caption = f"Class activation maps ({places} places) and, below each image, P({label})"
    blue, orange = (f"{verb} P({label}), against the mean image" for verb in ("lowers", "raises"))
    _save(path, tiles, texts, caption, blue, orange)


def draw_pairs(path: Path, real: Path, synthetic: Path) -> bool:
    """Real images above synthetic ones of the same reports; whether there are such pairs.

    real, synthetic: folders of shards, whose training records are the same by key; of several
    images of a prompt, KEY#0 is shown.
    """
    both = [shards.open_split(folder, "train") for folder in (real, synthetic)]
    rows = [{key.removesuffix("#0"): row for row, key in enumerate(part.keys)} for part in both]
    shared = [key for key in rows[0] if key in rows[1]]
    keys = [shared[i] for i in chosen(shared, np.ones(len(shared), bool))]
    if not keys:
        return False
    columns = []
    for key in keys:
        parts = zip(both, rows, strict=True)
        pair = [shards.value(part.features(at[key]), "image") for part, at in parts]
        column = Image.new("RGB", (SIDE, 2 * SIDE + _GAP), "white")
        for k, pixels in enumerate(pair):
            column.paste(_enlarged(pixels), (0, k * (SIDE + _GAP)))
        columns.append(column)
    _save(path, columns, [], "Real images, and below them synthetic images of the same reports")
    return True


def _enlarged(image: np.ndarray) -> Image.Image:
    """A grey image at the side of a strip, with 64 levels, which make its file smaller."""
    resized = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return Image.fromarray(np.asarray(resized) & 0xFC).convert("RGB")


def _outline(mask: np.ndarray, edge: str) -> np.ndarray:
    """bool [SIDE, SIDE]: the pixels beside the edge of a mask, bool [s, s]."""
    whole = Image.fromarray(mask.astype(np.uint8) * 255)
    whole = whole.resize((SIDE, SIDE), Image.Resampling.NEAREST)
    kind = ImageFilter.MinFilter if edge == "inside" else ImageFilter.MaxFilter
    return np.asarray(whole) != np.asarray(whole.filter(kind(3)))


def _save(
    path: Path,
    tiles: Sequence[Image.Image],
    texts: Sequence[str],
    caption: str,
    blue: str = "",
    orange: str = "",
) -> None:
    """Write a strip of equal tiles, on the first process alone."""
    if jax.process_index() or not tiles:
        return
    width, height = tiles[0].size
    across = len(tiles) * (width + _GAP) - _GAP
    strip = Image.new("RGB", (across, height + (_TEXT + 5 if texts else 0)), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(_TEXT)
    for i, tile in enumerate(tiles):
        x = i * (width + _GAP)
        strip.paste(tile, (x, 0))
        if texts:
            pen.text((x, height + 2), texts[i], "black", font)
    few = strip.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    info = PngInfo()
    for name, text in zip(_TEXTS, (caption, blue, orange), strict=True):
        info.add_itxt(name, text)
    with replaced(path) as temporary:
        few.save(temporary, "PNG", optimize=True, pnginfo=info)
