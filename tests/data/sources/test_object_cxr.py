"""Object-CXR: boxes and masks from rectangles, ellipses and polygons."""

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import ingestion, object_cxr, plan
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.items import Item

TRAIN = [
    "image_name,annotation",
    "00001.jpg,0 4 6 10 16",
    "00002.jpg,",
    "00003.jpg,1 10 10 30 20;2 2 2 8 2 8 8 2 8",
]
DEV = ["image_name,annotation", "08001.jpg,0 0 0 40 32", "08002.jpg,"]
WIDTH, HEIGHT = 40, 32


def download(root, train=TRAIN, without=(), **tables):
    """The tables, and a JPEG for each of their rows."""
    rng = np.random.default_rng(0)
    for name, lines in {"train": train, "dev": DEV, **tables}.items():
        (root / name).mkdir(parents=True)
        (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
        for line in lines[1:]:
            image = line.split(",")[0]
            if image and image not in without:
                pixels = rng.integers(0, 256, (HEIGHT, WIDTH), np.uint8)
                Image.fromarray(pixels).save(root / name / image)
    return root


def settings(root, **fields):
    config = get_config("object_cxr").ingest
    config.update({"path": str(root), "size": 40, "workers": 1, "max_reject_share": 0.9, **fields})
    return config


def listed(root):
    return object_cxr.list_items(settings(root))


def mask(item) -> np.ndarray:
    ((name, runs),) = item.masks
    assert name == "mask_objects"
    ones = np.arange(len(runs.counts)) % 2 == 1
    return np.repeat(ones, runs.counts).reshape(runs.width, runs.height).T


def test_shapes_are_boxes_and_one_mask(tmp_path):
    listing = listed(download(tmp_path / "data"))
    assert listing.label_names == ("Foreign Object",)
    assert (listing.rejects, listing.dropped) == ([], {})
    assert listing.notes == [f"{tmp_path}/data has no test.csv, so dev is the test split"]
    rectangle, empty, shapes, whole, _ = listing.items
    assert (rectangle.key, rectangle.split, rectangle.labels) == ("train/00001.jpg", "train", (1,))
    assert rectangle.boxes == (("Foreign Object", 4, 6, 10, 16),)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[6:16, 4:10] = True
    assert np.array_equal(mask(rectangle), expected)
    assert (empty.labels, empty.boxes, mask(empty).any()) == ((0,), (), False)
    assert shapes.boxes == (("Foreign Object", 10, 10, 30, 20), ("Foreign Object", 2, 2, 8, 8))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    ellipse = ((x - 20) / 10) ** 2 + ((y - 15) / 5) ** 2
    square = (abs(x - 5) < 3) & (abs(y - 5) < 3)
    assert mask(shapes)[(ellipse < 0.8) | square].all()
    assert not mask(shapes)[(ellipse > 1.2) & ~square].any()
    assert abs(mask(shapes).sum() - (np.pi * 10 * 5 + 36)) < 6
    assert (whole.split, mask(whole).all()) == ("test", True)


def test_masks_are_the_union_of_any_shapes():
    rng = np.random.default_rng(1)
    for _ in range(50):
        corners = np.sort(rng.integers(-5, 45, (4, 2, 2)), axis=1)
        corners[:, 1] += 1
        shapes = object_cxr._shapes(";".join(f"0 {' '.join(map(str, c.ravel()))}" for c in corners))
        expected = np.zeros((HEIGHT, WIDTH), bool)
        for (left, top), (right, bottom) in corners.clip(0):
            expected[top:bottom, left:right] = True
        item = Item("", "", None, "", masks=(("mask_objects", object_cxr.filled(shapes, 40, 32)),))
        assert np.array_equal(mask(item), expected)


def test_with_a_table_of_test_dev_is_validation(tmp_path):
    test = ["image_name,annotation", "09001.jpg,0 1 1 9 9"]
    listing = listed(download(tmp_path / "data", test=test))
    splits = {item.key.split("/")[0]: item.split for item in listing.items}
    assert splits == {"train": "train", "dev": "valid", "test": "test"}
    assert listing.notes == []


@pytest.mark.parametrize(
    ("annotation", "reason"),
    [
        ("2 1 1 9 9", "object '2 1 1 9 9' is no rectangle (0) or ellipse (1) of two points and"),
        ("2 1 1 9 9 4", "object '2 1 1 9 9 4' is no rectangle"),
        ("0 1 1 9 9 4 4", "object '0 1 1 9 9 4 4' is no rectangle"),
        ("3 1 1 9 9", "object '3 1 1 9 9' is no rectangle"),
        ("0", "object '0' is no rectangle"),
        ("0 1 nan 9 9", "object '0 1 nan 9 9': 'nan' is not a number"),
        ("1 1 inf 9 9", "object '1 1 inf 9 9': 'inf' is not a number"),
        ("0 1 1 9 x", "object '0 1 1 9 x': 'x' is not a number"),
        ("0 9 1 1 9", "the box from (9, 1) to (1, 9) has no area"),
        ("1 5 5 5 9", "the box from (5, 5) to (5, 9) has no area"),
        ("2 1 1 5 1 9 1", "the box from (1, 1) to (9, 1) has no area"),
    ],
)
def test_an_image_with_a_broken_shape_is_rejected(tmp_path, annotation, reason):
    root = download(tmp_path / "data", [*TRAIN, f"00004.jpg,{annotation}"])
    listing = listed(root)
    assert len(listing.items) == 5
    place = f"{root}/train.csv: row 5: "
    ((key, told),) = listing.rejects
    assert key == "train-row-5"
    assert told.startswith(place + reason)


@pytest.mark.parametrize(
    "annotation", ["0 1 1 9 9;0 40 0 50 9", "2 -9 -9 0 -9 0 -1", "1 0 32 40 40"]
)
def test_a_shape_outside_of_the_image_rejects_its_record(tmp_path, annotation):
    root = download(tmp_path / "data", [TRAIN[0], f"00004.jpg,{annotation}"])
    item = listed(root).items[0]
    with pytest.raises(RejectedRecord, match=r"00004.jpg: the box .* has no area inside of the im"):
        object_cxr.make(item, settings(root))


def test_a_shape_over_the_edge_is_cut_off(tmp_path):
    train = [TRAIN[0], "00001.jpg,0 30 -5 1e9 10", "00002.jpg,1 -10 -10 10 10"]
    rectangle, ellipse = listed(download(tmp_path / "data", train)).items[:2]
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:10, 30:] = True
    assert np.array_equal(mask(rectangle), expected)
    assert abs(mask(ellipse).sum() - np.pi * 100 / 4) < 5
    config = settings(tmp_path / "data")
    (box,) = object_cxr.make(rectangle, config)["boxes"]
    np.testing.assert_array_equal(box["bbox"], [30, 4, 40, 14])  # after 4 rows of padding


def test_images_that_are_missing_broken_or_in_no_table(tmp_path):
    root = download(tmp_path / "data", without=("00001.jpg",))
    (root / "train" / "00002.jpg").write_bytes(b"\xff\xd8 no image")
    (root / "dev" / "more.jpg").write_bytes(b"")
    listing = listed(root)
    assert [key for key, _ in listing.rejects] == ["train-row-2", "train/00002.jpg"]
    missing, broken = (reason for _, reason in listing.rejects)
    assert missing == f"{root}/train.csv: row 2: there is no image 00001.jpg in train"
    assert broken == f"{root}/train/00002.jpg: not a PNG, JPEG, TIFF or BMP file"
    assert listing.dropped == {"image in no table": 1}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("image_path,annotation", "no column 'image_name' among: image_path, annotation"),
        ("image_name,boxes", "no column 'annotation' among: image_name, boxes"),
    ],
)
def test_a_table_with_another_head_line_is_named(tmp_path, head, message):
    root = download(tmp_path / "data", [head, *TRAIN[1:]])
    with pytest.raises(UserError, match=f"missing column: {root}/train.csv: {message}"):
        listed(root)


def test_an_image_in_two_rows_is_kept_once(tmp_path):
    root = download(tmp_path / "data", [*TRAIN, "00001.jpg,0 1 1 2 2"])
    made = plan.make_plan(settings(root))
    (item,) = (i for part in made.parts for i in part.items if i.key == "train/00001.jpg")
    assert item.boxes == (("Foreign Object", 4, 6, 10, 16),)
    assert mask(item).sum() == 60
    path = f"{root}/train/00001.jpg"
    assert made.rejects == [("train/00001.jpg", f"{path}: key train/00001.jpg was listed before")]


def test_what_is_missing_is_named(tmp_path):
    root = download(tmp_path / "data")
    (root / "dev").rename(tmp_path / "elsewhere")
    assert [key for key, _ in listed(root).rejects] == ["dev-row-2", "dev-row-3"]
    (root / "dev.csv").unlink()
    with pytest.raises(UserError, match=f"no table: {root}/dev.csv does not exist"):
        listed(root)


def test_a_table_that_names_other_images(tmp_path):
    root = download(tmp_path / "data")
    for name, lines in (("train", TRAIN), ("dev", DEV)):
        (root / f"{name}.csv").write_text("\n".join(lines).replace("\n0", "\nother-0"))
    with pytest.raises(
        UserError, match=r"5 rejected, .* no image other-00001.jpg in train; 5 left"
    ):
        plan.make_plan(settings(root))


def test_ingested_records_hold_boxes_and_masks(tmp_path, capsys):
    root = download(tmp_path / "data", [*TRAIN, "00004.jpg,2 1 1 9 9"])
    ingestion.ingest(settings(root), tmp_path / "shards")
    test = shards.open_split(tmp_path / "shards", "test")
    records = {record["key"]: record for record in map(test.__getitem__, range(len(test)))}
    assert sorted(records) == ["dev/08001.jpg", "dev/08002.jpg"]
    whole, empty = records["dev/08001.jpg"], records["dev/08002.jpg"]
    (box,) = whole["boxes"]
    assert box["label"] == "Foreign Object"
    np.testing.assert_array_equal(box["bbox"], [0, 4, 40, 36])
    assert np.array_equal(np.unique(np.nonzero(whole["mask_objects"])[0]), np.arange(4, 36))
    assert (empty["boxes"], empty["mask_objects"].any()) == ([], np.False_)
    printed = capsys.readouterr().err
    assert "positive for Foreign Object 3" in printed
    assert "1 rejected" in printed
