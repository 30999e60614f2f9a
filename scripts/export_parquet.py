"""Export a stored set to parquet that the `datasets` library of Hugging Face opens.

    python -m scripts.export_parquet runs/ingest-demo exported

SET is a folder of shards or the workdir that holds one. Writes data/SPLIT-00000-of-000NN.parquet
with a row for each record, and README.md. Images and masks are the PNG files of the set, which
`datasets.load_dataset("exported")` decodes. Latents are left out, with a line. An existing folder
is never overwritten. Needs pyarrow: `pip install -e '.[export]'`.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsyn_jax.core.errors import UserError
from medsyn_jax.core.files import new_folder, write_text
from medsyn_jax.data.sources import resolve
from medsyn_jax.data.store import schema, shards

try:
    import pyarrow as pa
    from pyarrow import parquet
except ImportError:
    sys.exit("error: pyarrow is missing: pip install -e '.[export]'")

ROWS = 100  # of a row group, which readers load as a whole
CORNERS = ("left", "top", "right", "bottom")
CARD = """---
configs:
- config_name: default
  data_files:
{files}
---
# Chest radiographs

    import datasets
    radiographs = datasets.load_dataset(DIR)

| split | records |
|---|---|
{counts}

Source: {source}{generator}. Fingerprint of the set: {fingerprint}.

- `image` and `mask_*`: grey, high is bright, masks 0 or 255.
- `labels`: 1 positive, 0 negative, -1 uncertain, -2 unknown.
- `boxes`: `left`, `top`, `right`, `bottom` in pixels of the image, and `label`.
- `report` as in the source; `findings` and `impression` are its cleaned sections. `subject` is the
  patient.

Licence: not stated. Name one that the source allows. Reports, and images of patients, may be handed
on only as the source allows.
"""


def export(folder: Path, out: Path, rows: int) -> list[str]:
    """Write files of at most `rows` records into `out`, and return lines on what was written.

    Raises UserError if `folder` holds no whole set, or `out` is not empty.
    """
    folder = resolve.stored(folder)
    info = shards.describe(folder)
    counts = {split: part["records"] for split, part in info["splits"].items() if part["records"]}
    left_out = set()
    with new_folder(out) as temporary:
        for split, count in counts.items():
            records = shards.Records(folder, split)
            names = [*schema.TEXTS, "image", "labels", *schema.optional_fields(records.features(0))]
            left_out |= {"latents"} & {*names}
            names = [n for n in names if n != "latents" and (n != "labels" or records.label_names)]
            files = -(-count // rows)
            for number, start in enumerate(range(0, count, rows)):
                path = temporary / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"
                _write(path, records, range(start, min(start + rows, count)), names)
        write_text(temporary / "README.md", _card(info, counts))
    return [
        *(f"{out / 'data' / split}-*.parquet: {count} records" for split, count in counts.items()),
        *(f"left out: {name}" for name in left_out),
    ]


def _write(path: Path, records: shards.Records, rows: range, names: Sequence[str]) -> None:
    columns = {name: _column(name, records.label_names) for name in names}
    features = {name: feature for name, (_, feature) in columns.items()}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    arrow = pa.schema([(name, kind) for name, (kind, _) in columns.items()], metadata)
    path.parent.mkdir(exist_ok=True)
    with parquet.ParquetWriter(path, arrow) as writer:
        for start in range(rows.start, rows.stop, ROWS):
            some = range(start, min(start + ROWS, rows.stop))
            table = [_row(records.features(i), names, records.label_names) for i in some]
            writer.write_table(pa.Table.from_pylist(table, arrow))


def _column(name: str, labels: Sequence[str]) -> tuple[pa.DataType, Any]:
    """The type of a column, and its name in `datasets`, which ignores names of another type."""
    if schema.is_image(name):
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())]), {"_type": "Image"}
    if name == "labels":
        return _struct(dict.fromkeys(labels, pa.int8()))
    if name == "boxes":
        fields = dict.fromkeys(CORNERS, pa.float32()) | {"label": pa.string()}
        kind, feature = _struct(fields)
        return pa.list_(kind), {"feature": feature, "_type": "List"}
    return pa.string(), _value("string")


def _struct(fields: Mapping[str, pa.DataType]) -> tuple[pa.DataType, Any]:
    names = {pa.int8(): "int8", pa.float32(): "float32", pa.string(): "string"}
    return pa.struct([*fields.items()]), {n: _value(names[kind]) for n, kind in fields.items()}


def _value(name: str) -> dict[str, str]:
    return {"dtype": name, "_type": "Value"}


def _row(stored: Mapping[str, Any], names: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    row = {}
    for name in names:
        if schema.is_image(name):
            path = f"{shards.value(stored, 'key')}.png"
            row[name] = {"bytes": stored[name].bytes_list.value[0], "path": path}
            continue
        row[name] = shards.value(stored, name)
        if name == "labels":
            row[name] = dict(zip(labels, row[name].tolist(), strict=True))
        if name == "boxes":
            row[name] = [
                dict(zip(CORNERS, box["bbox"].tolist(), strict=True)) | {"label": box["label"]}
                for box in row[name]
            ]
    return row


def _card(info: Mapping[str, Any], counts: Mapping[str, int]) -> str:
    files = "\n".join(f"  - split: {s}\n    path: data/{s}-*.parquet" for s in counts)
    return CARD.format(
        files=files,
        counts="\n".join(f"| {split} | {count} |" for split, count in counts.items()),
        source=info["source"],
        generator=f"; synthetic, by {info['generator']}" if "generator" in info else "",
        fingerprint=info["fingerprint"],
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("set", type=Path, help="folder of shards, or the workdir that holds one")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--rows", type=int, default=5000, help="records in a file at most")
    args = parser.parse_args(arguments)
    if args.rows < 1:
        parser.error(f"--rows: {args.rows}: give 1 or more")
    try:
        print("\n".join(export(args.set, args.out, args.rows)))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
