"""The source `chexpert`: CheXpert 1.0, small or full (Irvin et al. 2019)."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, shortened
from medsyn_jax.data.sources import files, records, tables
from medsyn_jax.data.sources.mimic_cxr import LABELS
from medsyn_jax.data.store.items import NOT_FRONTAL, Item, Listing

_SUFFIXES = (".jpg", ".png", ".dcm")

_NAME = re.compile(r"(?:^|/)(patient\d+/study\d+/view\d+_(?:frontal|lateral))$")

make = records.make


def list_items(config: Any) -> Listing:
    """The images of `train.csv`, `valid.csv` and, if there, `test.csv` or `test_labels.csv`.

    The tables are in `config.path`, or in the folder of batch 1 of the full set; images anywhere
    below. The labels are the 14 of MIMIC-CXR; an empty cell is unknown. Key and subject of an image
    are `patient00001/study1/view1_frontal` and `patient00001`.

    Without a table of the test set, `valid.csv` is the split `test`: radiologists labelled its 200
    patients, the published figures of GLoRIA and MGCA are those of it, and a model must not be
    chosen on the set that judges it. `valid` is then drawn from the patients of train. With the
    test set (500 patients, published in 2022), all three splits are the official ones.

    Raises:
      UserError: the folder or a table is missing, or a table is broken.
    """
    root = Path(config.path)
    folders = [root, *sorted(root.glob("CheXpert-v1.0 batch 1*"))]
    base = next((folder for folder in folders if (folder / "train.csv").is_file()), root)
    test = files.table_in(base, "test.csv", "test_labels.csv")
    homes = {base / "train.csv": "train", base / "valid.csv": "test"}
    notes = ["the official validation set is the split test: there is no table of the test set"]
    if test.is_file():
        homes |= {base / "valid.csv": "valid", test: "test"}
        notes = []

    def item_of(path: Path, fields: dict[str, str], name: str, image: str) -> Item:
        labels = tables.labels(fields, LABELS)
        return item(name, homes[path], image, labels, fields.get("AP/PA", ""))

    return listing(config, [*homes], ("Path", *LABELS), item_of, LABELS, notes)


def listing(
    config: Any,
    paths: Sequence[Path],
    columns: Sequence[str],
    item_of: Callable[[Path, dict[str, str], str, str], Item],
    label_names: tuple[str, ...],
    notes: list[str],
) -> Listing:
    """Joins tables of CheXpert with the images below `config.path`.

    Args:
      config: the ingest config.
      paths: of tables.
      columns: that each has; the first holds the path of an image.
      item_of: makes an item of the path of the table, the fields of a row, the name and the path
        of its image, or raises RejectedRecord.
      label_names: of the items.
      notes: for the user.

    Raises:
      UserError: as `list_items`.
    """
    for path in paths:
        with tables.read(path, columns):
            pass  # a missing table is named before the images are listed, which takes its time
    root = Path(config.path)
    images = files.images_below(root, _SUFFIXES, _name_of)
    items: dict[str, Item] = {}
    rejects: list[tuple[str, str]] = []
    laterals = 0
    for path in paths:
        with tables.read(path, columns) as (header, rows):
            for number, row in rows:
                try:
                    fields = tables.fields(header, row)
                    name = name_in(fields[columns[0]])
                    if name in items:
                        raise RejectedRecord(f"{name} is listed twice")
                    image = images.pop(name, "")
                    if config.frontal_only and name.endswith("lateral"):
                        laterals += 1
                        continue
                    if not image:
                        raise RejectedRecord(f"there is no image {name} below {root}")
                    items[name] = item_of(path, fields, name, image)
                except RejectedRecord as error:
                    where = f"{path}: row {number}"
                    rejects.append((f"{path.stem}-row-{number}", f"{where}: {error}"))
    dropped = {NOT_FRONTAL: laterals, files.NOT_IN_TABLE: len(images)}
    dropped = {reason: count for reason, count in dropped.items() if count}
    return Listing([*items.values()], label_names, rejects, dropped, notes)


def item(name: str, home: str, image: str, labels: tuple[int, ...], view: str) -> Item:
    """The item of an image of CheXpert, whose name starts with its patient."""
    view = view if view in ("PA", "AP") else ""
    patient = name.partition("/")[0]
    return Item(name, patient, home, image, labels=labels, view=view)


def name_in(cell: str) -> str:
    """patient00001/study1/view1_frontal of a path in a table; raises RejectedRecord."""
    name = _name_of(cell.strip().rpartition(".")[0])
    if not name:
        usual = ".../patient00001/study1/view1_frontal.jpg"
        raise RejectedRecord(f"the path {shortened(cell)!r} does not end like {usual}")
    return name


def _name_of(path: str) -> str:
    """The same of a path without suffix; "" of an image that has no such name."""
    match = _NAME.search(path)
    return match[1] if match else ""
