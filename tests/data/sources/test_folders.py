"""Class folders as they come out of public zips: classes, splits, masks, odd names."""

import io
import os
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import folder, ingestion, plan, records
from medsyn_jax.data.store import shards

NOISE = np.random.default_rng(0).integers(0, 255, (24, 20), np.uint8)


def draw(root, *names, pixels=NOISE):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


def settings(root, **fields):
    config = get_config("folder").ingest
    config.update({"path": str(root), "size": 32, "workers": 1, "max_reject_share": 0.9, **fields})
    return config


def listed(root, **fields):
    return folder.list_items(settings(root, **fields))


def classes(listing) -> Counter:
    """(class, split) -> images."""
    return Counter((listing.label_names[i.labels.index(1)], i.split) for i in listing.items)


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Val", "Test"),
        ("TRAIN", "VALIDATION", "TEST"),
        ("Training", "dev", "Testing"),
        ("train_set", "valid_set", "test-set"),
        ("trainset", "validate", "Test Images"),
        ("01_train", "02_val", "03_test"),
        ("train2017", "val2017", "data_test"),
    ],
)
@pytest.mark.parametrize(
    "layout", ["{0}/{1}", "{0}/{1}/p1", "{1}/{0}", "{0}/{1}/images", "zip/{0}/{1}"]
)
def test_split_folders_of_any_spelling_above_or_below_the_classes(tmp_path, names, layout):
    for split in names:
        draw(tmp_path, *(f"{layout.format(split, c)}/{split}{c}.png" for c in ("NORMAL", "COVID")))
    found = listed(tmp_path)
    assert found.label_names == ("COVID", "NORMAL")
    assert classes(found) == {
        (c, s): 1 for c in ("COVID", "NORMAL") for s in ("train", "valid", "test")
    }
    assert not found.dropped


def test_classes_that_differ_in_case_alone_are_one(tmp_path):
    draw(tmp_path, "test/NORMAL/1.png", "test/COVID/2.png", "train/Normal/3.png")
    draw(tmp_path, "train/Covid /4.png", "train/@eaDir/4.png/THUMB.jpg")
    assert classes(listed(tmp_path)) == {
        (c, s): 1 for c in ("COVID", "NORMAL") for s in ("train", "test")
    }


def test_below_the_split_of_a_class_may_be_folders_of_patients(tmp_path):
    draw(tmp_path, "A/train/p1/x.png", "A/test/p2/y.png", "B/train/p3/z.png", "B/test/p4/w.png")
    assert set(classes(listed(tmp_path))) == {(c, s) for c in "AB" for s in ("train", "test")}


def test_folders_beside_the_split_folders_are_left_out_by_name(tmp_path):
    draw(
        tmp_path, "train/A/1.png", "train/B/2.png", "Test/A/3.png", "extra/A/4.png", "extra/B/5.png"
    )
    draw(tmp_path, "chest/train/A/6.png", "test/7.png", "8.png")
    found = listed(tmp_path)
    assert classes(found) == {("A", "train"): 1, ("B", "train"): 1, ("A", "test"): 1}
    assert found.dropped == {"outside a class folder": 5}
    (note,) = [note for note in found.notes if "left out" in note]
    for name in ("extra (2 images)", "chest (1 images)", "test (1 images)", "no folder (1 images)"):
        assert name in note


def test_a_folder_called_test_without_classes_is_no_class(tmp_path):
    draw(tmp_path, "NORMAL/1.png", "COVID/2.png", "Test/3.png")
    found = listed(tmp_path)
    assert classes(found) == {("COVID", None): 1, ("NORMAL", None): 1}
    assert found.dropped == {"outside a class folder": 1}
    (note,) = [note for note in found.notes if "left out" in note]
    assert "Test (1 images)" in note


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "test/2.png"], "no images: .*2 left out .outside a class folder"),
        (
            ["images_001/images/1.png", "images_002/images/2.png"],
            "no images: .*2 left out .outside a class folder",
        ),
        (
            ["A/train/1.png", "A/test/2.png", "B/3.png"],
            "images in A/test, but B has no split folder",
        ),
        (["x/train/A/1.png", "y/train/A/2.png"], "several sets: .*: x, y each hold split folders"),
        (["A/masks/1.png"], "no images: .*1 left out .masks"),
    ],
)
def test_folders_of_which_nothing_can_be_made_are_told_in_one_line(tmp_path, names, message):
    draw(tmp_path, *names)
    with pytest.raises(UserError, match=message) as caught:
        listed(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_doubled_folder_of_a_zip(tmp_path):
    root = tmp_path / "chest_xray"
    draw(
        root,
        "chest_xray/NORMAL/1.png",
        "chest_xray/COVID/2.png",
        "__MACOSX/chest_xray/NORMAL/1.png",
    )
    assert classes(listed(root)) == {("COVID", None): 1, ("NORMAL", None): 1}
    assert classes(listed(root / "chest_xray")) == {("COVID", None): 1, ("NORMAL", None): 1}
    assert listed(tmp_path).label_names == ("COVID", "NORMAL")
    root.rename(tmp_path / "archive")
    found = listed(tmp_path / "archive")
    assert found.label_names == ("chest_xray",)
    assert any("one class only, chest_xray" in note for note in found.notes)


DISC = np.hypot(*(np.mgrid[:24, :20] - np.array([12, 10])[:, None, None])) < 6


@pytest.mark.parametrize(
    ("image", "mask", "field"),
    [
        ("A/images/1.png", "A/masks/1.png", "mask_masks"),
        ("A/Images/1.png", "A/Lung_Masks/1.png", "mask_lungs"),
        ("A/images/1.png", "A/lung masks/1.png", "mask_lungs"),
        ("A/images/1.png", "A/infection masks/1.png", "mask_infection"),
        ("A/CXR_png/1.png", "A/ManualMask/leftMask/1.png", "mask_left"),
        ("A/1.png", "A/mask/1_mask.png", "mask_mask"),
        ("A/1.png", "A/1_mask.png", "mask_mask"),
        ("images/A/1.png", "masks/A/1.png", "mask_masks"),
        ("Train/A/images/1.png", "Train/A/MASKS/mask_1.png", "mask_masks"),
        ("A/images/1.png", "A/segmentation/1.png", "mask_segmentation"),
        ("A/1.png", "A/labels/1.png", "mask_labels"),
        ("images/A/1.png", "seg/A/1.png", "mask_seg"),
        ("A/1.png", "A/1_mask_1.png", "mask_mask"),
        ("A/1.png", "A/1mask.png", "mask_mask"),
        ("A/1.jpg", "A/1_seg.png", "mask_mask"),
        ("A/1.jpg", "A/1_label.png", "mask_mask"),
        ("images and masks/A/images/1.png", "images and masks/A/lungmask/1.png", "mask_lungs"),
    ],
)
def test_masks_are_no_images_but_fields_of_them(tmp_path, image, mask, field):
    draw(tmp_path, image)
    draw(tmp_path, mask, pixels=np.where(DISC, np.uint8(255), np.uint8(0)))
    config = settings(tmp_path)
    (item,) = folder.list_items(config).items
    assert item.image == str(tmp_path / image)
    record = folder.make(item, config)
    assert [name for name in record if name.startswith("mask_")] == [field]
    with Image.open(io.BytesIO(record[field])) as stored:
        assert stored.mode == "L"
        made = np.asarray(stored)
    assert set(np.unique(made)) == {0, 255}
    scale = 32 / 24
    inside = made > 0
    assert abs(inside.sum() / (DISC.sum() * scale**2) - 1) < 0.05
    rows, columns = np.nonzero(inside)
    assert abs(rows.mean() - 16) < 1  # the padding is that of the image
    assert abs(columns.mean() - 16) < 1


@pytest.mark.parametrize(
    "pixels",
    [
        DISC.astype(np.uint8),  # 0 and 1
        np.where(DISC, np.uint8(2), np.uint8(0)) - (DISC & (np.mgrid[:24, :20][1] < 10)),  # 2 and 1
        np.where(DISC, np.uint16(65535), np.uint16(0)),
        DISC,  # one bit a pixel
        np.repeat(np.where(DISC, np.uint8(255), np.uint8(0))[..., None], 3, 2),
        np.kron(np.where(DISC, np.uint8(255), np.uint8(0)), np.ones((2, 2), np.uint8)),  # larger
    ],
)
def test_masks_of_every_coding_become_the_same(tmp_path, pixels):
    draw(tmp_path, "A/images/1.png")
    draw(tmp_path, "A/masks/1.png", pixels=pixels)
    draw(tmp_path, "B/masks/1.png", pixels=np.where(DISC, np.uint8(255), np.uint8(0)))
    (item,) = folder.list_items(settings(tmp_path)).items
    made = folder.make(item, settings(tmp_path))["mask_masks"]
    plain = records._mask(str(tmp_path / "B/masks/1.png"), item, (24, 20), settings(tmp_path))
    pair = [np.asarray(Image.open(io.BytesIO(data))) > 0 for data in (made, plain)]
    assert (pair[0] != pair[1]).mean() < 0.02


def test_an_empty_mask_is_one_and_a_bad_one_rejects_its_record(tmp_path):
    draw(tmp_path, *(f"A/images/{n}.png" for n in range(3)))
    draw(tmp_path, "A/masks/0.png", pixels=np.zeros((24, 20), np.uint8))
    draw(tmp_path, "A/masks/1.png", pixels=np.zeros((24, 40), np.uint8))
    (tmp_path / "A/masks/2.png").write_bytes(b"no picture")
    config = settings(tmp_path)
    empty, other, broken = folder.list_items(config).items
    assert np.asarray(Image.open(io.BytesIO(folder.make(empty, config)["mask_masks"]))).max() == 0
    with pytest.raises(
        RejectedRecord, match=r"masks/1\.png: a mask of 40 x 24 pixels, of other prop"
    ):
        folder.make(other, config)
    with pytest.raises(RejectedRecord, match=r"masks/2\.png: not a PNG"):
        folder.make(broken, config)


def test_a_mask_that_some_images_lack_is_left_out_and_said(tmp_path):
    draw(tmp_path, "A/images/1.png", "A/images/2.png", "A/masks/1.png", "A/masks/3.png")
    found = listed(tmp_path)
    assert [item.masks for item in found.items] == [(), ()]
    assert found.dropped == {"masks": 2}
    assert any("mask_masks: only 1 of 2 images have this mask" in note for note in found.notes)
    assert "1 masks are of no image of the set, such as A/masks/3.png" in found.notes


def test_what_stands_beside_a_folder_of_images_is_left_out(tmp_path):
    draw(tmp_path, "A/images/1.png", "A/edges/1.png", "A/cover.png", "B/2.png", "B/p/3.png")
    found = listed(tmp_path)
    assert [item.key for item in found.items] == ["A/images/1.png", "B/2.png", "B/p/3.png"]
    assert found.dropped == {"beside a folder of images": 2}


def test_a_whole_set_with_masks_is_stored_and_says_its_classes(tmp_path, capsys):
    source = tmp_path / "source"
    for split in ("Train", "Val", "Test"):
        for name in ("COVID", "Normal"):
            draw(source, *(f"{split}/{name}/images/{split}{name}{n}.png" for n in range(2)))
            for n in range(2):
                mask = np.where(DISC, np.uint8(255), np.uint8(0))
                draw(source, f"{split}/{name}/lung masks/{split}{name}{n}.png", pixels=mask)
    out = ingestion.ingest(settings(source), tmp_path / "out")
    said = capsys.readouterr().err
    assert "COVID 6 (train 2, valid 2, test 2)" in said
    assert "Normal 6 (train 2, valid 2, test 2)" in said
    assert "mask_lungs: a mask of every image" in said
    record = shards.open_split(out, "valid")[0]
    assert record["mask_lungs"].shape == record["image"].shape == (32, 32)
    assert set(np.unique(record["mask_lungs"])) == {0, 255}
    before = plan.make_plan(settings(source)).fingerprint
    mask = next(source.glob("Train/COVID/lung masks/*"))
    draw(mask.parent, mask.name, pixels=np.where(DISC.T, np.uint8(255), np.uint8(0)))
    assert plan.make_plan(settings(source)).fingerprint != before


def test_names_that_are_not_utf_8(tmp_path):
    """A zip from Windows: the bytes of cp1252 or cp437 as names of folders and files."""
    source = tmp_path / "source"
    for place in (
        b"M\xe4dchen",
        b"M\xe9dchen",
        "M\N{LATIN SMALL LETTER A WITH DIAERESIS}".encode(),
    ):
        (source / os.fsdecode(place)).mkdir(parents=True)
        for name in (b"\xfc1.png", b"\xfb1.png", b"%FC1.png", b"bad\xfc.png"):
            draw(source / os.fsdecode(place), os.fsdecode(place + name))
    for path in source.glob("*/*bad*"):
        path.write_bytes(b"no picture")
    found = listed(source)
    assert len({item.key for item in found.items}) == 12
    assert all(item.key.isascii() and " " not in item.key for item in found.items)
    assert len(found.label_names) == 3
    out = ingestion.ingest(settings(source, split_shares=(1.0, 0.0, 0.0)), tmp_path / "out")
    stored = shards.open_split(out, "train")
    assert len(stored) == 9
    assert len(set(stored.subjects())) == 9
    assert (out / "rejects.csv").read_text(encoding="utf-8").count("\n") == 4


@pytest.mark.parametrize("text", ["a{99999999999}", "(" * 5000, "(p", "a{4,2}", "*"])
def test_a_subject_pattern_that_is_none(tmp_path, text):
    draw(tmp_path, "A/1.png")
    config = settings(tmp_path)
    config.folder.subject = text
    with pytest.raises(
        UserError, match=r"folder\.subject: .*: give a regular expression"
    ) as caught:
        folder.list_items(config)
    assert len(str(caught.value)) < 500
