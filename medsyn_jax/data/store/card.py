"""The data card, Croissant metadata and contact sheet of a set of synthetic images.

All three are made from the set itself, and the same whenever they are made.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from medsyn_jax.core.files import replaced, write_text
from medsyn_jax.data.images import decode
from medsyn_jax.data.store import shards

README, CROISSANT, SHEET = FILES = ("README.md", "croissant.json", "contact_sheet.png")
_SHOWN, _COLUMNS, _SIDE, _GAP = 24, 6, 192, 8  # images, and pixels
_LINES, _SMALL = 6, 11  # of the prompt below an image; height of its letters
_FIELDS = {
    "key": "unique in the set",
    "subject": "the patient of the report",
    "image": "grey, high is bright as on a viewing screen",
    "report": "the whole report, raw",
    "findings": "its section, cleaned; empty when absent",
    "impression": "its section, cleaned; empty when absent",
    "labels": "of the report: 1 positive, 0 negative, -1 uncertain, -2 unknown",
    "view": "PA, AP or empty, of the image that the report was written on",
    "prompt": "what the generator read",
    "seed": "of the noise, the record's number, and that of a later attempt: seed/record/attempt",
    "generator": "weights, sampler and guidance",
}
_TERMS = (
    "citeAs column equivalentProperty extract field fileObject fileProperty fileSet format "
    "includes isLiveDataset jsonPath key md5 parentField path recordSet references regex "
    "repeated replace samplingRate separator source subField transform"
)
_CONTEXT: dict[str, Any] = {  # the standard one: readers warn of any other
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{name: f"cr:{name}" for name in _TERMS.split()},
}


def is_written(directory: Path) -> bool:
    """Whether all files are there."""
    return all((directory / name).exists() for name in FILES)


def remove(directory: Path) -> None:
    """Removes the files that exist."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


def write(directory: Path) -> None:
    """Writes the three files for the set of synthetic images in `directory`."""
    info = shards.describe(directory)
    write_text(directory / README, _card(info))
    write_text(directory / CROISSANT, json.dumps(_croissant(directory, info), indent=2))
    _write_sheet(directory, info)


def _card(info: dict[str, Any]) -> str:
    counts = {split: part["records"] for split, part in info["splits"].items()}
    prompts, settings = info["prompts"], info["settings"]
    table = "".join(f"| {split} | {count} |\n" for split, count in counts.items())
    sampler = ", ".join(f"{name} {value}" for name, value in settings["sampler"].items())
    columns = ", ".join(info["label_names"]) or "none"
    return f"""# Synthetic chest radiographs

{sum(counts.values())} images of {settings["size"]} x {settings["size"]} pixels, drawn from
{prompts["count"]} prompts by a generator.

| split | images |
|---|---|
{table}
- Generator: {info["generator"]}; sha256 of the pipeline: {settings["pipeline"]}.
- Sampler: {sampler}; {settings["dtype"]}, seed {settings["seed"]}.
- Prompts: {prompts["source"]}; {prompts["rejected"]} rejected, {prompts["truncated"]} cut off to
  fit the text encoder, {prompts["control_characters"]} with control characters, taken out.
- Images a prompt: {settings["images_per_prompt"]}. Labels, findings and impressions are those of
  the report that the prompt came from: nobody has looked whether the image shows them.
- Labels: {columns}.
- Fingerprint: {info["fingerprint"]}.
- License: {info["license"] or "not stated; that of the prompts and of the generator's weights"}.

Records have the fields in `features.json` and are read by
`tfds.builder_from_directory(DIR).as_data_source("train")`.

## Intended use

Research on methods: pre-training and augmentation, and comparison with real images. Not for
diagnosis, and not as evidence of what a disease looks like: a generator leaves out what is rare and
may show what a report does not say.

## Privacy

A generator can give back images that it was trained on. Before this set is handed on, screen it
against the training images: `--config configs/curate.py --config.synthetic=DIR --config.real=DIR`.
Marks of removed text (`___`) were taken out of the prompts; the reports are handed on as they came.
"""


def _croissant(directory: Path, info: dict[str, Any]) -> dict[str, Any]:
    """JSON-LD by Croissant 1.0 (mlcommons.org/croissant), which TFDS reads but does not write."""

    def field(name: str) -> dict[str, Any]:
        kinds = {"image": "sc:ImageObject", "labels": "sc:Integer"}
        source = {"fileSet": {"@id": "shards"}, "extract": {"column": name}}
        return {
            "@type": "cr:Field",
            "@id": f"records/{name}",
            "name": name,
            "description": _FIELDS[name],
            "dataType": kinds.get(name, "sc:Text"),
            "source": source,
        } | ({"repeated": True} if name == "labels" else {})

    binary = {"encodingFormat": "application/octet-stream"}
    files = [
        {"@type": "cr:FileObject", "@id": name, "name": name, "contentUrl": name, **binary}
        | {"contentSize": f"{file['bytes']} B", "sha256": _sha256(directory / name)}
        for name, file in info["files"].items()
    ]
    together = {"@type": "cr:FileSet", "@id": "shards", "name": "shards", **binary}
    together["includes"] = "*.array_record-*"
    fields = [field(name) for name in _FIELDS]
    count = sum(part["records"] for part in info["splits"].values())
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "synthetic_radiographs",
        "description": f"{count} synthetic chest radiographs with reports: {info['generator']}",
        "version": "1.0.0",
        "license": info["license"],
        "distribution": [*files, together],
        "recordSet": [
            {"@type": "cr:RecordSet", "@id": "records", "name": "records", "field": fields}
        ],
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_sheet(directory: Path, info: dict[str, Any]) -> None:
    """The first images, each with the start of its prompt below it."""
    split = next(name for name, part in info["splits"].items() if part["records"])
    records = shards.open_split(directory, split)
    count = min(_SHOWN, len(records))
    rows, height = -(-count // _COLUMNS), _SIDE + _LINES * (_SMALL + 2) + _GAP
    across = min(count, _COLUMNS) * (_SIDE + _GAP) + _GAP
    sheet = Image.new("L", (across, rows * height + _GAP), 255)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_SMALL)
    for i in range(count):
        record = records[i]
        x, y = _GAP + i % _COLUMNS * (_SIDE + _GAP), _GAP + i // _COLUMNS * height
        pixels = np.asarray(decode.square(record["image"], _SIDE))
        sheet.paste(Image.fromarray(pixels), (x, y))
        text = wrapped(record["prompt"], font, _SIDE, _LINES)
        pen.multiline_text((x, y + _SIDE + 2), text, 0, font, spacing=2)
    with replaced(directory / SHEET) as temporary:
        sheet.save(temporary, "PNG", optimize=True)


def wrapped(text: str, font: Any, width: float, most: int) -> str:
    """`text` in at most `most` lines of `width` pixels in a font of PIL, with " ..." in the last
    one if more would be needed. A word wider than a line goes on in the next."""
    lines = [""]
    for word in text.split():
        while word and len(lines) <= most:
            longer = f"{lines[-1]} {word}".lstrip()
            if font.getlength(longer) <= width:
                lines[-1], word = longer, ""
            elif lines[-1]:
                lines.append("")
            else:
                fits = range(1, len(word))
                end = max(1, bisect_right(fits, width, key=lambda n, w=word: font.getlength(w[:n])))
                lines[-1], word = word[:end], word[end:]
                lines.append("")
    if len(lines) > most and (lines[most] or word):
        last = lines[most - 1]
        while last and font.getlength(f"{last} ...") > width:
            last = last.rpartition(" ")[0] or last[:-1]
        lines[most - 1] = f"{last} ..."
    return "\n".join(lines[:most]).rstrip("\n")
