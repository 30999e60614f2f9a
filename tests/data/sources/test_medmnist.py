"""MedMNIST's .npz files: arrays instead of image files."""

import io

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import ingestion, medmnist, plan
from medsyn_jax.data.store import shards

COUNTS = {"train": 6, "val": 3, "test": 4}


def arrays(labels: int, shape=(28, 28), most=2) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    made = {}
    for split, count in COUNTS.items():
        made[f"{split}_images"] = rng.integers(0, 256, (count, *shape), np.uint8)
        made[f"{split}_labels"] = rng.integers(0, most, (count, labels)).astype(np.uint8)
    return made


def settings(path, **fields):
    config = get_config("medmnist").ingest
    config.update({"path": str(path), "size": 28, "workers": 1, **fields})
    return config


def saved(path, **changes):
    made = arrays(14) | changes
    np.savez_compressed(path, **{name: value for name, value in made.items() if value is not None})
    return settings(path)


def decoded(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def test_rows_become_records_with_the_names_of_chestmnist(tmp_path):
    made = arrays(14)
    config = saved(tmp_path / "chestmnist.npz")
    listing = medmnist.list_items(config)
    assert listing.label_names[:3] == ("Atelectasis", "Cardiomegaly", "Effusion")
    assert listing.label_names[13] == "Hernia"
    assert [item.key for item in listing.items[5:8]] == ["train/5", "val/0", "val/1"]
    assert [item.split for item in listing.items[5:8]] == ["train", "valid", "valid"]
    for row, item in enumerate(listing.items[-4:]):
        assert item.labels == tuple(made["test_labels"][row])
        record = medmnist.make(item, config)
        assert np.array_equal(decoded(record["image"]), made["test_images"][row])
        assert record["report"] == ""
    config.path = str(tmp_path)  # a folder of one file
    assert medmnist.list_items(config) == listing


def test_a_class_becomes_one_hot_labels(tmp_path):
    values = {"train": [0, 1, 1, 0, 1, 0], "val": [1, 1, 0], "test": [0, 0, 0, 1]}
    made = arrays(1) | {f"{s}_labels": np.array(v, np.uint8)[:, None] for s, v in values.items()}
    config = saved(tmp_path / "pneumoniamnist_64.npz", **made)
    listing = medmnist.list_items(config)
    assert listing.label_names == ("Normal", "Pneumonia")
    assert [item.labels for item in listing.items[:3]] == [(1, 0), (0, 1), (0, 1)]
    made["val_labels"][1] = 4
    other = medmnist.list_items(saved(tmp_path / "organamnist.npz", **made))
    assert other.label_names == ("0", "1", "2", "3", "4")
    assert other.items[7].labels == (0, 0, 0, 0, 1)


def test_colours_become_grey_and_one_grey_level_is_rejected(tmp_path):
    made = arrays(1, (28, 28, 3))
    made["test_images"][0] = (255, 0, 0)
    made["test_images"][0, 0] = 0
    made["test_images"][1] = 7
    config = saved(tmp_path / "pathmnist.npz", **made)
    red, flat = medmnist.list_items(config).items[-4:-2]
    assert np.unique(decoded(medmnist.make(red, config)["image"])).tolist() == [0, 76]
    with pytest.raises(
        RejectedRecord, match=r"pathmnist\.npz: test/1: every pixel has the value 7"
    ):
        medmnist.make(flat, config)


def test_a_whole_set_is_stored_with_its_splits(tmp_path, capsys):
    config = saved(tmp_path / "chestmnist.npz")
    config.size = 32
    out = ingestion.ingest(config, tmp_path / "out")
    said = capsys.readouterr().err
    assert "images of 28 x 28 pixels are enlarged to ingest.size=32" in said
    assert "train 6, valid 3, test 4, 0 rejected" in said
    keys = {record["key"] for record in map(shards.open_split(out, "valid").__getitem__, range(3))}
    assert keys == {"val/0", "val/1", "val/2"}
    first = plan.make_plan(config).fingerprint
    saved(tmp_path / "chestmnist.npz", test_images=arrays(14)["test_images"][::-1])
    assert plan.make_plan(config).fingerprint != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_images": None}, "there is no array val_images: is it a file of MedMNIST"),
        ({"val_labels": None}, "val_labels is not a file in the archive: is it a file of MedMNIST"),
        ({"val_images": np.zeros((3, 28), np.uint8)}, r"val_images: uint8 \[3, 28\]: expected"),
        ({"val_images": np.zeros((3, 28, 28, 4), np.uint8)}, r"\[3, 28, 28, 4\]: expected uint8"),
        ({"val_images": np.zeros((3, 28, 28), np.float32)}, "val_images: float32"),
        ({"val_images": np.zeros((2, 28, 28), np.uint8)}, "has 3 rows, val_images has 2"),
        ({"val_images": np.zeros((3, 64, 64), np.uint8)}, "its splits differ in shape"),
        ({"val_labels": np.zeros((3, 13), np.uint8)}, "its splits differ in shape"),
        ({"val_labels": np.zeros(3, np.uint8)}, r"val_labels: uint8 \[3\]: expected integers"),
        ({"val_labels": np.zeros((3, 14))}, "val_labels: float64"),
        ({"val_labels": np.full((3, 14), 2, np.uint8)}, "values from 2 to 2, where 0 to 1"),
        ({"val_labels": np.full((3, 14), -1, np.int64)}, "values from -1 to -1"),
        ({"val_labels": np.array([[None] * 14] * 3)}, "Object arrays cannot be loaded"),
        ({"val_images": np.array([None] * 3)}, r"val_images: object \[3\]"),
    ],
)
def test_a_file_of_other_arrays_is_refused_in_one_line(tmp_path, changes, message):
    config = saved(tmp_path / "chestmnist.npz", **changes)
    with pytest.raises(UserError, match=message) as caught:
        medmnist.list_items(config)
    assert str(tmp_path / "chestmnist.npz") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "chestmnist.npz"
    with pytest.raises(UserError, match=r"chestmnist\.npz: does not exist: set ingest\.path"):
        medmnist.list_items(settings(path))
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(path)
    with pytest.raises(UserError, match=r"not an \.npz file"):
        medmnist.list_items(settings(path))
    saved(path)
    saved(tmp_path / "other.npz")
    with pytest.raises(UserError, match=r"holds 2 \.npz files: set ingest\.path to one"):
        medmnist.list_items(settings(tmp_path))
    data = bytearray(path.read_bytes())
    data[200:2000] = bytes(1800)  # in the compressed images
    path.write_bytes(data)
    config = settings(path)
    first = medmnist.list_items(config).items[0]
    with pytest.raises(UserError, match=r"chestmnist\.npz: .*: download it again"):
        medmnist.make(first, config)
