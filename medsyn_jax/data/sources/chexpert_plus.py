"""The source `chexpert_plus`: the reports of CheXpert (Chambon et al. 2024), with its images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import chexpert, files, records, tables
from medsyn_jax.data.sources.chexpert import LABELS
from medsyn_jax.data.store.items import UNKNOWN, Item, Listing
from medsyn_jax.data.text import reports

TABLE = "df_chexpert_plus_240401.csv"

_COLUMNS = ("path_to_image", "split", "ap_pa", "report", "section_findings", "section_impression")
_HOMES = {"train": "train", "valid": "test"}  # as `chexpert` without its test set

make = records.make


def list_items(config: Any) -> Listing:
    """The images of `df_chexpert_plus_240401.csv` with their reports.

    The table is in `config.path`, images anywhere below: the .png files of CheXpert Plus or the
    .jpg files of CheXpert, whatever suffix the table names. Findings and impression have columns;
    where both are empty, they are read from the report. The labels are CheXbert's of the
    impression, where `impression_fixed.json` is there, alone or in `chexbert_labels`. Keys,
    subjects and splits are those of the source `chexpert` without its test set.

    Raises:
      UserError: the folder or the table is missing, or a file is broken.
    """
    root = Path(config.path)
    path = root / TABLE
    own = files.table_in(root, "chexbert_labels/impression_fixed.json", "impression_fixed.json")
    labels = _labels(own) if own.is_file() else None
    none = (UNKNOWN,) * len(LABELS) if labels is not None else ()
    notes = ["the official validation set is the split test, as in the source chexpert"]
    if labels is None:
        notes.append(f"no labels: there is neither {own} nor impression_fixed.json beside {path}")

    def item_of(path: Path, fields: dict[str, str], name: str, image: str) -> Item:
        if fields["split"] not in _HOMES:
            raise RejectedRecord("column 'split' is neither train nor valid")
        findings, impression = (
            reports.without_head(fields[f"section_{part}"], part)
            for part in ("findings", "impression")
        )
        item = chexpert.item(
            name, _HOMES[fields["split"]], image, (labels or {}).get(name, none), fields["ap_pa"]
        )
        sections = (findings, impression) if findings or impression else (None, None)
        return dataclasses.replace(item, report=fields["report"], sections=sections)

    return chexpert.listing(config, [path], _COLUMNS, item_of, LABELS if none else (), notes)


def _labels(path: Path) -> dict[str, tuple[int, ...]]:
    """Image -> values of LABELS from a file with one JSON object a line; null is unknown.

    Raises:
      UserError: the file is broken.
    """
    labels: dict[str, tuple[int, ...]] = {}
    same: dict[tuple[int, ...], tuple[int, ...]] = {}  # few of the combinations differ
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"broken labels: {path}: {error.strerror}: check the file") from None
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            name = chexpert.name_in(record["path_to_image"])
            cells = {label: record[label] for label in LABELS}
            texts = {n: "" if x is None or x != x else str(x) for n, x in cells.items()}
            values = tables.labels(texts, LABELS)
            labels[name] = same.setdefault(values, values)
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, RejectedRecord):
            raise UserError(
                f"broken labels: {path}: line {number}: expected a JSON object with path_to_image "
                "and the 14 labels of CheXpert, each 1, 0, -1 or null: fetch the file again"
            ) from None
    return labels
