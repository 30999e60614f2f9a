"""The source `covidx`: COVIDx (Wang, Lin and Wong 2020), text lists of any version beside images.

A line of a list is `patient image class source`. Patients may be several words (`COVID 1
COVID(1).png COVID-19 sirm`), and the source is missing in version 2 and in some lines of later
test lists: a line is read from its class outwards.
"""

import os
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.store.items import NEGATIVE, POSITIVE, Item, Listing, key_of

_THREE = ("normal", "pneumonia", "COVID-19")  # versions to 5, and those that end in A
_TWO = ("negative", "positive")  # for COVID-19: version 6, and those that end in B
_CLASSES = {name.casefold(): name for name in (*_THREE, *_TWO)}
_SPLITS = ("test", "val", "train")  # a patient stays in the first of these

make = records.make


def list_items(config: Any) -> Listing:
    """The images in `train/`, `test/` and, where there is such a list, `val/`.

    The lists are `train*.txt`, `test*.txt` and `val*.txt`; where there are several of a split,
    those that end as `config.covidx.version` (`9A`). Three classes are three labels of which one
    is positive, and two are the one label COVID-19. An image of train whose patient is also in
    the test list is left out: version 6 has one.

    Raises:
      UserError: a list or folder is missing, there are several lists of a split, or the lists mix
        two and three classes.
    """
    root, version = Path(config.path), config.get("covidx", {}).get("version", "")
    rows: list[tuple[str, str, str, str]] = []  # split, patient, image, class
    rejects: list[tuple[str, str]] = []
    images: set[str] = set()  # keys
    for split in _SPLITS:
        if split == "val" and not [*root.glob(f"val*{version}.txt")]:
            continue
        advice = "name one version by ingest.covidx.version, such as 9A"
        table = files.only(root, f"{split}*{version}.txt", advice)
        images |= {f"{split}/{name}" for name in _names(root / split)}
        for number, line in tables.lines(table):
            try:
                rows.append((split, *_parsed(line)))
            except RejectedRecord as error:
                where = f"{table}: line {number}"
                rejects.append((f"{split}-line-{number}", f"{where}: {error}"))
    classes = {name for *_, name in rows}
    if not classes <= {*_THREE} and not classes <= {*_TWO}:
        names = ", ".join(sorted(classes))
        raise UserError(f"covidx: {root}: the lists mix {names}: set ingest.covidx.version")
    label_names = _THREE if classes <= {*_THREE} else ("COVID-19",)
    homes: dict[str, str] = {}  # of patients
    items, leaks = [], 0
    for split, patient, name, word in rows:
        positive = "COVID-19" if word == "positive" else word
        labels = tuple(POSITIVE if positive == label else NEGATIVE for label in label_names)
        place = f"{split}/{name}"
        if place not in images:
            rejects.append((key_of(place), f"{root}: there is no image {shortened(place)}"))
        elif homes.setdefault(patient, split) != split:
            leaks += 1
        else:
            items.append(Item(key_of(place), patient, split, f"{root}/{place}", labels=labels))
    others = len(images - {f"{split}/{name}" for split, _, name, _ in rows})
    dropped = {"patient of another list": leaks, files.NOT_IN_TABLE: others}
    dropped = {reason: count for reason, count in dropped.items() if count}
    return Listing(items, label_names, rejects, dropped)


def _names(folder: Path) -> list[str]:
    """The names of the images in a folder; some differ by their suffix alone."""
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"no images: {folder}: {error.strerror}: check the path") from None
    return [name for name in names if name.lower().endswith((".png", ".jpg", ".jpeg"))]


def _parsed(line: str) -> tuple[str, str, str]:
    """Patient, image and class of a line; raises RejectedRecord."""
    words = line.split()
    place = next((n for n in (-1, -2) if words[n:] and words[n].casefold() in _CLASSES), None)
    if place is None or len(words) + place < 2:
        raise RejectedRecord(f"{shortened(line)!r} is not `patient image class source`")
    *patient, name = words[:place]
    return " ".join(patient), name, _CLASSES[words[place].casefold()]
