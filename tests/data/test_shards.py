import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsyn_jax.core.errors import UserError
from medsyn_jax.data import directory as folders
from medsyn_jax.data import images, shards
from medsyn_jax.data.ingestion import ingest


def test_records_come_back_as_they_went_in(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    found = {}
    for split, part in shards.describe(directory)["splits"].items():
        if not part["records"]:
            continue
        data = shards.open_split(directory, split)
        assert len(data) == part["records"]
        assert data.keys == [data[i]["key"] for i in range(len(data))]
        found |= {data[i]["key"]: data[i] for i in range(len(data))}
    assert sorted(found) == [f"img/{i:03d}.png" for i in range(24)]
    assert shards.open_split(directory, "train").label_names == ["odd"]
    for i in range(24):
        record = found[f"img/{i:03d}.png"]
        with Image.open(Path(config.path).parent / record["key"]) as stored:
            np.testing.assert_array_equal(record["image"], np.asarray(stored))
        assert record["image"].dtype == np.uint8
        assert record["labels"].tolist() == [i % 2]
        assert record["labels"].dtype == np.int8
        assert record["subject"] == f"p{i // 2}"
        assert record["findings"] == f"The lungs of number {i} are clear."
        assert record["impression"] == f"No finding {i}."
        assert record["report"].startswith("FINDINGS: ")
        assert record["view"] == ""
    by_split = {s: shards.open_split(directory, s).subjects() for s in ("train", "valid", "test")}
    assert not set(by_split["train"]) & {*by_split["valid"], *by_split["test"]}
    texts = shards.open_split(directory, "train").texts(("impression",))
    assert texts[0].startswith("No finding ")


def test_masks_and_boxes_come_back(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    example = {name: name for name in shards.TEXTS} | {
        "image": images.encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8)),
        "labels": np.array([1, -1, -2], np.int8),
        "mask_lungs": images.encode_png(mask),
        "boxes": [
            {"bbox": np.array([1, 2, 3.5, 4], np.float32), "label": "nodule"},
            {"bbox": np.array([0, 0, 8, 8], np.float32), "label": "edema"},
        ],
    }
    names = ["a", "b", "c"]
    path = tmp_path / shards.shard_name("x", "train", 0, 1)
    written = shards.write_shard(path, "train", [example, example | {"boxes": []}], names)
    assert written.optional == ["boxes", "mask_lungs"]
    assert shards.finished(path) == written
    made_from = {"source": "x", "fingerprint": "0", "settings": {}, "left_out": {}}
    folders.finish(tmp_path, [written], names, [], made_from)
    data = shards.open_split(tmp_path, "train")
    np.testing.assert_array_equal(data[0]["mask_lungs"], mask)
    assert data[0]["labels"].tolist() == [1, -1, -2]
    assert [box["label"] for box in data[0]["boxes"]] == ["nodule", "edema"]
    np.testing.assert_array_equal(data[0]["boxes"][0]["bbox"], [1, 2, 3.5, 4])
    assert data[1]["boxes"] == []
    unlike = {k: v for k, v in example.items() if k != "boxes"}
    with pytest.raises(ValueError, match="those before have"):
        shards.write_shard(tmp_path / "y", "train", [example, unlike], names)
    assert not (tmp_path / "y").exists()


def test_tfds_reads_the_set_without_this_package_or_tensorflow(make_pairs, tmp_path):
    directory = ingest(make_pairs(), tmp_path / "out")
    program = f"""
import sys, warnings
warnings.simplefilter("error")
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(directory)!r}).as_data_source(split="train")
record = source[0]
assert record["image"].shape == (16, 16, 1) and record["labels"].shape == (1,), record
assert "tensorflow" not in sys.modules and "medsyn_jax" not in sys.modules
print(len(source), record["key"].decode())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    data = shards.open_split(directory, "train")
    assert run.stdout.split() == [str(len(data)), data.keys[0]]


def test_a_shard_damaged_inside_is_told_when_it_is_read(make_pairs, tmp_path):
    directory = ingest(make_pairs(records_per_shard=100), tmp_path / "out")
    victim = next(directory.glob("*train*"))
    size = victim.stat().st_size
    victim.write_bytes(bytes(size))
    data = shards.open_split(directory, "train")
    with pytest.raises(UserError, match="record 0 of train cannot be read"):
        data[0]


def test_directories_that_hold_no_data_are_told(make_pairs, tmp_path):
    with pytest.raises(UserError, match="nothing: holds no data set"):
        shards.open_split(tmp_path / "nothing", "train")
    directory = ingest(make_pairs(), tmp_path / "out")
    info = directory / "medsyn.json"
    text = info.read_text()
    info.write_text(text[:100])
    with pytest.raises(UserError, match="is not valid JSON"):
        shards.describe(directory)
    info.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="has format 99"):
        shards.describe(directory)
    info.unlink()
    with pytest.raises(UserError, match=r"has no medsyn\.json"):
        shards.describe(directory)


def test_a_changed_split_file_is_refused(make_pairs, tmp_path):
    directory = ingest(make_pairs(), tmp_path / "out")
    path = directory / "splits" / "train.txt"
    path.write_text(path.read_text().replace("img/00", "img/90"))
    with pytest.raises(UserError, match=r"train\.txt: was changed"):
        _ = shards.open_split(directory, "train").keys
