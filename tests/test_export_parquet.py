"""A stored set as parquet for the `datasets` library: `scripts/export_parquet.py`."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from medsyn_jax.data.images import decode
from medsyn_jax.data.store import schema, shards
from scripts import export_parquet
from tests.data.conftest import write_set

NAMES = ["Edema", "Pleural Effusion"]
BOXES = [
    {"bbox": np.array([1, 2, 3.5, 4], np.float32), "label": "nodule"},
    {"bbox": np.array([0, 0, 8, 8], np.float32), "label": "edema"},
]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
BOX = pa.struct(
    [*((side, pa.float32()) for side in ("left", "top", "right", "bottom")), ("label", pa.string())]
)
TYPES = {
    **dict.fromkeys(schema.TEXTS, pa.string()),
    "image": IMAGE,
    "labels": pa.struct([(name, pa.int8()) for name in NAMES]),
    "boxes": pa.list_(BOX),
    "mask_lungs": IMAGE,
}


def record(i):
    pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
    return {name: f"{name} {i}" for name in schema.TEXTS} | {
        "key": f"images/{i}",
        "image": decode.encode_png(pixels),
        "labels": np.array([i % 2, -2], np.int8),
        "mask_lungs": decode.encode_png((pixels > 99).astype(np.uint8) * 255),
        "boxes": BOXES[: i % 3],
    }


def write(folder, change=lambda record: record, names=NAMES):
    """A set of 7 records of train and 2 of test."""
    records = {"train": [*range(7)], "test": [7, 8]}
    write_set(folder, {s: [change(record(i)) for i in some] for s, some in records.items()}, names)


def declared(path):
    """Arrow's types of the features that the file declares to `datasets`, by its rules."""
    kinds = {"string": pa.string(), "int8": pa.int8(), "float32": pa.float32()}

    def arrow(feature):
        match feature.get("_type"):
            case "Image":
                return IMAGE
            case "Value":
                return kinds[feature["dtype"]]
            case "List":
                return pa.list_(arrow(feature["feature"]))
            case None:
                return pa.struct([(name, arrow(inner)) for name, inner in feature.items()])

    metadata = json.loads(parquet.read_schema(path).metadata[b"huggingface"])
    return {name: arrow(feature) for name, feature in metadata["info"]["features"].items()}


def test_the_records_of_a_set_are_the_rows_of_the_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export_parquet, "ROWS", 2)
    write(tmp_path / "run" / "shards")
    out = tmp_path / "out"
    assert export_parquet.main([str(tmp_path / "run"), str(out), "--rows", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}/data/train-*.parquet: 7 records",
        f"{out}/data/test-*.parquet: 2 records",
    ]
    files = {
        **{f"train-{i:05d}-of-00003.parquet": count for i, count in enumerate((3, 3, 1))},
        "test-00000-of-00001.parquet": 2,
    }
    assert {p.name for p in (out / "data").iterdir()} == {*files}
    for name, count in files.items():
        path = out / "data" / name
        assert parquet.read_metadata(path).num_rows == count
        stored = parquet.read_schema(path)
        assert {field.name: field.type for field in stored} == declared(path) == TYPES
    assert parquet.read_metadata(out / "data" / "train-00000-of-00003.parquet").num_row_groups == 2
    for split in ("train", "test"):
        rows = [
            row
            for path in sorted((out / "data").glob(f"{split}-*"))
            for row in parquet.read_table(path).to_pylist()
        ]
        records = shards.open_split(tmp_path / "run" / "shards", split)
        assert len(rows) == len(records)
        for row, expected in zip(rows, (records[i] for i in range(len(records))), strict=True):
            assert {n: row[n] for n in schema.TEXTS} == {n: expected[n] for n in schema.TEXTS}
            assert [row["labels"][name] for name in NAMES] == expected["labels"].tolist()
            for name in ("image", "mask_lungs"):
                with Image.open(io.BytesIO(row[name]["bytes"])) as image:
                    assert (image.format, image.mode) == ("PNG", "L")
                    np.testing.assert_array_equal(np.asarray(image), expected[name])
                assert row[name]["path"] == f"{row['key']}.png"
            boxes = [([b[s] for s in export_parquet.CORNERS], b["label"]) for b in row["boxes"]]
            assert boxes == [(b["bbox"].tolist(), b["label"]) for b in expected["boxes"]]
    card = (out / "README.md").read_text()
    assert "  - split: train\n    path: data/train-*.parquet\n  - split: test\n" in card
    assert "| train | 7 |\n| test | 2 |\n" in card
    assert "Licence: not stated." in card
    assert "synthetic" not in card


def test_sets_without_labels_and_with_latents(tmp_path):
    latents = np.zeros((2, 2, 2), np.float16)
    plain = ("key", "subject", "report", "findings", "impression", "view", "image")

    def change(record):
        kept = {name: record[name] for name in plain}
        return kept | {"labels": np.zeros(0, np.int8), "latents": latents, "seed": "3/4/0"}

    write(tmp_path / "set", change, [])
    lines = export_parquet.export(tmp_path / "set", tmp_path / "out", 100)
    assert lines[2:] == ["left out: latents"]
    table = parquet.read_table(tmp_path / "out" / "data" / "test-00000-of-00001.parquet")
    assert table.column_names == [*plain, "seed"]
    assert table["seed"].to_pylist() == ["3/4/0"] * 2


def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, capsys):
    write(tmp_path / "set")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")

    def stopped(folder, out):
        status = export_parquet.main([str(tmp_path / folder), str(tmp_path / out)])
        captured = capsys.readouterr()
        assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
        return captured.err

    assert "nothing: holds no data set" in stopped("nothing", "out")
    assert "full: is there already and is not overwritten" in stopped("set", "full")
    victim = next((tmp_path / "set").glob("*test.array_record*"))
    victim.write_bytes(bytes(victim.stat().st_size))
    assert "record 0 of test cannot be read" in stopped("set", "out")
    assert {p.name for p in tmp_path.iterdir()} == {"set", "full"}
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    with pytest.raises(SystemExit):
        export_parquet.main([str(tmp_path / "set"), str(tmp_path / "out"), "--rows", "0"])
    assert "--rows: 0: give 1 or more" in capsys.readouterr().err


@pytest.mark.parity
def test_datasets_opens_the_folder_with_decoded_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "set")
    export_parquet.export(tmp_path / "set", tmp_path / "out", 3)
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 7, "test": 2}
    records = shards.open_split(tmp_path / "set", "train")
    for i, row in enumerate(loaded["train"]):
        expected = records[i]
        assert row["key"] == expected["key"]
        for name in ("image", "mask_lungs"):
            np.testing.assert_array_equal(np.asarray(row[name]), expected[name])
        assert [*row["labels"].values()] == expected["labels"].tolist()
        assert [box["label"] for box in row["boxes"]] == [b["label"] for b in expected["boxes"]]
