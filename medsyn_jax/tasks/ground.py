"""Phrase grounding: heat maps of phrases by a pre-trained pair, judged on masks and boxes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsyn_jax.core import checks, estimates, log, outputs, regions
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import replaced
from medsyn_jax.data.images import decode
from medsyn_jax.data.store import card, shards
from medsyn_jax.train import checkpoint, corpus, frozen

FREE = ("ingest.workers",)
MASKS = {"Pleural Effusion": "mask_effusion", "Pneumothorax": "mask_pneumothorax"}
_THRESHOLDS = 41
_SIDE, _GAP, _LINE, _LINES = 160, 4, 16, 4  # pixels; lines of a phrase


def run(config: Any, workdir: Path) -> None:
    """Score the heat maps of phrases on masks and boxes; writes results.json and heat_maps.png.

    For each phrase, on test images that have the finding and its region: the pointing game, the
    contrast-to-noise ratio, and Dice at the threshold that is best on validation images. Controls
    without an encoder stand beside each: `prior`, for the mean region of the validation images, and
    `ceiling`, for the region itself at the resolution of the maps. Raises UserError for a ViT
    without local heads, or data without regions.
    """
    run_folder = Path(config.encoder.workdir)
    checkpoint.check_run(run_folder)  # restored after the data are prepared
    folder = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    names = shards.describe(folder)["label_names"]
    if unknown := sorted(set(config.phrases) - set(names)):
        raise UserError(
            f"config.phrases: {', '.join(unknown)}: the data set has the labels {', '.join(names)}"
        )
    pair = frozen.pretrained_pair(run_folder)
    outputs.write_config(workdir, config)
    results, rows = {}, {}
    for label, phrase in config.phrases.items():
        valid, test = (_images(folder, split, label, pair) for split in ("valid", "test"))
        valid_heat, heat = (
            frozen.heat_maps(pair, images.pixels, phrase) for images in (valid, test)
        )
        results |= _figures(label, valid, valid_heat, test, heat)
        shown = list(zip(test.pixels, resized(heat, pair.crop), test.region, strict=True))
        rows[phrase] = [overlay(*image) for image in shown[: config.shown]]
    for figure in ("pointing", "contrast_to_noise", "dice"):
        entries = [results[f"test/{label}/{figure}"] for label in config.phrases]
        fields = [k for k in ("value", "chance", "prior", "ceiling") if k in entries[0]]
        values = np.array([[e[k] for k in fields] for e in entries], float)  # None is NaN
        means = dict(zip(fields, values.mean(axis=0).tolist(), strict=True))
        results[f"test/mean/{figure}"] = means | {"n": len(entries)}
    path = workdir / "heat_maps.png"
    with replaced(path) as temporary:
        sheet(rows).save(temporary, "PNG")
    outputs.write_results(workdir, "ground", results)
    log.say(f"heat maps: {path}")


def _check_phrases(config: Any) -> None:
    if not config.phrases:
        raise UserError("config.phrases: none: give the phrase of a label")
    for label, phrase in config.phrases.items():
        if not isinstance(phrase, str) or not phrase.strip():
            raise UserError(f"config.phrases: {label}: {phrase!r}: give the words of the phrase")


CHECKS = (
    checks.numbers("above 0", "", "shown"),
    checks.files(lambda config: {"encoder.workdir": config.encoder.workdir}),
    _check_phrases,
)


class _Images(NamedTuple):
    """Images with a finding: uint8 [n, size, size], its regions bool [n, crop, crop], subjects."""

    pixels: np.ndarray
    region: np.ndarray
    subjects: np.ndarray


def _images(folder: Path, split: str, label: str, pair: frozen.Pair) -> _Images:
    """The images of a split with a finding whose region the encoder sees in part."""
    records = shards.open_split(folder, split)
    column, subjects = list(records.label_names).index(label), records.subjects()
    images = []
    for row in range(len(records)):
        record = records[row]
        if record["labels"][column] != 1:
            continue
        region = _cropped(_region(record, label), pair)
        if region.any() and not region.all():
            images.append((pair.fit(record["image"]), region, subjects[row]))
    if not images:
        raise UserError(
            f"config.phrases: {label}: no image of {folder} has it with a mask or box: leave it out"
        )
    pixels, regions, subjects = zip(*images, strict=True)
    return _Images(np.stack(pixels), np.stack(regions), np.array(subjects))


def _region(record: dict[str, Any], label: str) -> np.ndarray:
    """bool, of the size of the image: the mask, or the filled boxes."""
    if label in MASKS:
        mask = record.get(MASKS[label])
        return np.zeros_like(record["image"], bool) if mask is None else mask > 0
    region = np.zeros_like(record["image"], bool)
    for box in record.get("boxes", ()):
        if box["label"] == label:
            x0, y0, x1, y1 = np.round(box["bbox"]).astype(int)
            region[max(y0, 0) : y1, max(x0, 0) : x1] = True
    return region


def _cropped(region: np.ndarray, pair: frozen.Pair) -> np.ndarray:
    """The part of a region that the encoder sees, at its scale."""
    region = decode.square(region.astype(np.uint8) * np.uint8(255), pair.size) > 127
    low = (pair.size - pair.crop) // 2
    return region[low : low + pair.crop, low : low + pair.crop]


def resized(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps [n, s, s] as float32 [n, side, side], antialiased where they shrink."""
    return np.asarray(jax.image.resize(maps.astype(np.float32), (len(maps), side, side), "linear"))


def _figures(
    label: str, valid: _Images, valid_heat: np.ndarray, test: _Images, heat: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Entries of results.json for the heat maps of one label, with their controls."""
    regions, size, side = (valid.region, test.region), test.region.shape[1], heat.shape[1]
    maps = {
        "value": [resized(x, size) for x in (valid_heat, heat)],
        "prior": [np.broadcast_to(valid.region.mean(0), x.shape) for x in regions],
        "ceiling": [resized(resized(x, side), size) for x in regions],
    }
    figures = {kind: _values(pair[0], pair[1], *regions) for kind, pair in maps.items()}
    results = {}
    for name, values in figures["value"].items():
        entry = estimates.mean(values, test.subjects)
        if name == "pointing":
            entry["chance"] = _chance(test.region, side)
        entry |= {kind: float(figures[kind][name].mean()) for kind in ("prior", "ceiling")}
        results[f"test/{label}/{name}"] = entry
    return results


def _values(
    valid_heat: np.ndarray, heat: np.ndarray, valid_region: np.ndarray, region: np.ndarray
) -> dict[str, np.ndarray]:
    """The three figures [n] of the test images, by name."""
    grid = np.quantile(valid_heat, np.linspace(0, 1, _THRESHOLDS)[1:-1])
    best = grid[regions.dice(valid_heat, valid_region, grid).mean(0).argmax()]
    return {
        "pointing": regions.pointing(heat, region),
        "contrast_to_noise": regions.contrast_to_noise(heat, region),
        "dice": regions.dice(heat, region, np.array([best]))[:, 0],
    }


def _chance(region: np.ndarray, side: int) -> float:
    """The pointing game of random maps, each hottest at one of side x side places."""
    maps = np.eye(side * side).reshape(-1, side, side)
    hits = [
        regions.pointing(np.broadcast_to(heat, region.shape), region).mean()
        for heat in resized(maps, region.shape[1])
    ]
    return float(np.mean(hits))


def sheet(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """A page with a row of pictures, all of one size, above each phrase."""
    side, across = next(iter(rows.values()))[0].width, max(map(len, rows.values()))
    width, font = across * (side + _GAP) + _GAP, ImageFont.load_default(11)
    texts = [card.wrapped(phrase, font, width - 2 * _GAP, _LINES) for phrase in rows]
    height = side + _LINE * max(text.count("\n") + 1 for text in texts) + _GAP
    page = Image.new("RGB", (width, len(rows) * height + _GAP), "white")
    pen = ImageDraw.Draw(page)
    for row, (text, pictures) in enumerate(zip(texts, rows.values(), strict=True)):
        y = _GAP + row * height
        for column, picture in enumerate(pictures):
            page.paste(picture, (_GAP + column * (side + _GAP), y))
        pen.multiline_text((_GAP, y + side), text, "black", font, spacing=2)
    return page


def overlay(pixels: np.ndarray, heat: np.ndarray, region: np.ndarray | None = None) -> Image.Image:
    """A radiograph [size, size] with its heat map [crop, crop] in red and a region's outline.

    region: bool [crop, crop].
    """
    low = (len(pixels) - len(heat)) // 2
    grey = pixels[low : low + len(heat), low : low + len(heat)].astype(float)
    scaled = (heat - heat.min()) / max(float(np.ptp(heat)), 1e-6)
    red = np.stack([np.full_like(grey, 255.0), 255 * (1 - scaled), np.zeros_like(grey)], -1)
    strength = 0.55 * scaled[..., None] ** 2
    picture = grey[..., None] * (1 - strength) + red * strength
    if region is not None:
        inner = np.pad(region, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        picture[region & ~inner] = (0, 255, 255)
    side = max(_SIDE, len(heat))
    return Image.fromarray(picture.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
