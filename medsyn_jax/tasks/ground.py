"""Phrase grounding: where in an image a pre-trained pair of encoders sees what a phrase says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsyn_jax.core import checks, estimates, log, metrics, outputs
from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import full_disk_is_user_error, replaced
from medsyn_jax.data.images import decode
from medsyn_jax.data.store import card, shards
from medsyn_jax.train import checkpoint, corpus, frozen

FREE = ("ingest.workers",)
MASKS = {"Pleural Effusion": "mask_effusion", "Pneumothorax": "mask_pneumothorax"}
_THRESHOLDS = 41
_SIDE, _GAP, _LINE, _LINES = 160, 4, 16, 4  # pixels; lines of a phrase


def run(config: Any, workdir: Path) -> None:
    """Score the heat maps of phrases on masks and boxes; writes results.json and heat_maps.png.

    For each phrase the test images that have the finding and its region: the pointing game, the
    contrast-to-noise ratio, and Dice at the threshold that is best on validation images. Beside
    each what needs no encoder: `prior`, of the mean region of the validation images, and `ceiling`,
    of the region itself at the resolution of the maps.
    Raises UserError for a ViT without local heads, or data without regions.
    """
    checkpoint.check_run(Path(config.encoder.workdir))  # restored when the data are known
    folder = corpus.prepare(config.data.source, config.ingest, workdir.parent / "data")
    names = shards.describe(folder)["label_names"]
    if not set(config.phrases) <= set(names):
        odd = ", ".join(sorted(set(config.phrases) - set(names)))
        raise UserError(f"config.phrases: {odd}: the data set has the labels {', '.join(names)}")
    pair = frozen.pretrained_pair(Path(config.encoder.workdir))
    outputs.write_config(workdir, config)
    results, rows = {}, {}
    for label, phrase in config.phrases.items():
        valid, test = (_found(shards.open_split(folder, s), label, pair) for s in ("valid", "test"))
        if test is None or valid is None:
            raise UserError(
                f"config.phrases: {label}: no image of {folder} has it with a mask or box: leave "
                "it out"
            )
        for found in (valid, test):
            found.heat = heats(pair, found.pixels, phrase)
        results |= _figures(label, valid, test)
        heat = resized(test.heat, pair.crop)
        shown = list(zip(test.pixels, heat, test.region, strict=True))[: config.shown]
        rows[phrase] = [overlay(*one) for one in shown]
    for figure in ("pointing", "contrast_to_noise", "dice"):
        entries = [results[f"test/{label}/{figure}"] for label in config.phrases]
        beside = [k for k in ("value", "chance", "prior", "ceiling") if k in entries[0]]
        known = np.array([[e[k] for k in beside] for e in entries], float)  # None is NaN
        means = dict(zip(beside, known.mean(axis=0).tolist(), strict=True))
        results[f"test/mean/{figure}"] = means | {"n": len(entries)}
    path = workdir / "heat_maps.png"
    with full_disk_is_user_error(path), replaced(path) as temporary:
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


class _Found:
    """Images with a finding, and where it is: what the encoder sees of both."""

    def __init__(self, pixels: list[np.ndarray], region: list[np.ndarray], subjects: list[str]):
        self.pixels, self.region = np.stack(pixels), np.stack(region)
        self.subjects = np.array(subjects)
        self.heat: np.ndarray  # [n, s, s], once it is known


def _found(records: shards.Records, label: str, pair: frozen.Pair) -> _Found | None:
    column, subjects = list(records.label_names).index(label), records.subjects()
    kept: tuple[list, list, list] = ([], [], [])
    for row in range(len(records)):
        record = records[row]
        if record["labels"][column] != 1:
            continue
        region = _cropped(_region(record, label), pair)
        if region.any() and not region.all():
            image = pair.fit(record["image"])
            for part, value in zip(kept, (image, region, subjects[row]), strict=True):
                part.append(value)
    return _Found(*kept) if kept[0] else None


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
    if region.shape != (pair.size, pair.size):
        region = decode.square(region.astype(np.uint8) * np.uint8(255), pair.size) > 127
    low = (pair.size - pair.crop) // 2
    return region[low : low + pair.crop, low : low + pair.crop]


def heats(pair: frozen.Pair, pixels: np.ndarray, phrase: str) -> np.ndarray:
    """Heat maps [n, s, s] of one phrase on images, uint8 [n, size, size], in batches of one shape.

    Raises UserError for a phrase without a word.
    """
    if not phrase.strip():
        raise UserError(f"phrase {phrase!r}: give it a word")
    return frozen.heat_maps(pair, pixels, phrase)


def resized(maps: np.ndarray, side: int) -> np.ndarray:
    """Maps [n, s, s] as [n, side, side], float32, antialiased where that is smaller."""
    return np.asarray(jax.image.resize(maps.astype(np.float32), (len(maps), side, side), "linear"))


def _figures(label: str, valid: _Found, test: _Found) -> dict[str, dict[str, Any]]:
    regions, (size, side) = (valid.region, test.region), (test.region.shape[1], test.heat.shape[1])
    compared = {
        "value": [resized(x.heat, size) for x in (valid, test)],
        "prior": [np.broadcast_to(valid.region.mean(0), x.shape) for x in regions],
        "ceiling": [resized(resized(x, side), size) for x in regions],
    }
    figures = {kind: _values(maps[0], maps[1], *regions) for kind, maps in compared.items()}
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
    """The three figures of each test image, [n]."""
    grid = np.quantile(valid_heat, np.linspace(0, 1, _THRESHOLDS)[1:-1])
    best = grid[metrics.dice(valid_heat, valid_region, grid).mean(0).argmax()]
    return {
        "pointing": metrics.pointing(heat, region),
        "contrast_to_noise": metrics.contrast_to_noise(heat, region),
        "dice": metrics.dice(heat, region, np.array([best]))[:, 0],
    }


def _chance(region: np.ndarray, side: int) -> float:
    """The pointing game's figure of maps whose hottest of side x side places is drawn at random."""
    places = np.eye(side * side).reshape(-1, side, side)
    hits = [
        metrics.pointing(np.broadcast_to(heat, region.shape), region).mean()
        for heat in resized(places, region.shape[1])
    ]
    return float(np.mean(hits))


def sheet(rows: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Pictures of one size, a row of them over each phrase."""
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
    """A radiograph [size, size] under its heat map [crop, crop], red where the heat is, with the
    outline of a region [crop, crop]."""
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
