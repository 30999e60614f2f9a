"""A user's own masks in parallel folders, and boxes in a table."""

import io

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import ingestion, masks
from medsyn_jax.data.store import shards

NOISE = np.random.default_rng(0).integers(0, 255, (24, 20), np.uint8)
MASK = np.zeros((24, 20), np.uint8)
MASK[6:14, 4:10] = 255


def draw(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(MASK if "mask" in name.lower() else NOISE).save(root / name)


def settings(root, **fields):
    config = get_config("masks").ingest
    config.update({"path": str(root), "size": 24, "workers": 1, "max_reject_share": 0.9, **fields})
    return config


def listed(root, **fields):
    return masks.list_items(settings(root, **fields))


@pytest.mark.parametrize(
    ("image", "mask", "field", "split"),
    [
        ("images/1.png", "masks/1.png", "mask_masks", None),
        ("images/1.jpg", "lung_masks/1.png", "mask_lungs", None),
        ("cxr/1.png", "masks/1.png", "mask_masks", None),
        ("png_images/1.png", "png_masks/1.png", "mask_masks", None),
        ("images/1.png", "masks/1_mask.png", "mask_masks", None),
        ("1.png", "1_mask.png", "mask_mask", None),
        ("train/images/1.png", "train/masks/1.png", "mask_masks", "train"),
        ("images/val/1.png", "masks/val/1.png", "mask_masks", "val"),
        ("test_images/1.png", "test_masks/1.png", "mask_masks", "test"),
        ("Train Images/1.png", "Train Masks/1.png", "mask_masks", "Train"),
        ("images/p7/1.png", "masks/p7/1.png", "mask_masks", None),
        ("CXR_png/1.png", "ManualMask/leftMask/1.png", "mask_left", None),
    ],
)
def test_parallel_folders(tmp_path, image, mask, field, split):
    draw(tmp_path, image, mask)
    listing = listed(tmp_path)
    (item,) = listing.items
    assert (item.image, item.split) == (str(tmp_path / image), split)
    assert item.masks == ((field, str(tmp_path / mask)),)
    assert (listing.rejects, listing.dropped, listing.label_names) == ([], {}, ())
    record = masks.make(item, settings(tmp_path))
    with Image.open(io.BytesIO(record[field])) as stored:
        assert np.array_equal(np.asarray(stored)[:, 2:22], MASK)
    assert "boxes" not in record


def test_equal_names_in_folders_of_patients_or_splits_do_not_mix(tmp_path):
    places = ("p1", "p2", "train1", "train2")
    draw(tmp_path, *(f"{kind}/{place}/1.png" for kind in ("images", "masks") for place in places))
    items = listed(tmp_path, masks={"subject": "images/([^/]+)/"}).items
    assert [item.subject for item in items] == [*places]
    assert [item.masks[0][1] for item in items] == [
        str(tmp_path / f"masks/{p}/1.png") for p in places
    ]


def test_images_without_masks_and_masks_without_images_are_counted(tmp_path):
    draw(tmp_path, "images/1.png", "images/2.png", "images/3.png", "masks/1.png", "masks/4.png")
    draw(tmp_path, "masks/3_mask.png", "masks/3.png")
    (tmp_path / "masks/5.tif").write_bytes(b"")
    listing = listed(tmp_path)
    assert [item.key for item in listing.items] == ["images/1.png"]
    assert listing.rejects == [
        (
            "images/3.png",
            f"{tmp_path}/images/3.png: has two masks, such as masks/3_mask.png: join them",
        )
    ]
    assert listing.dropped == {
        "image without a mask": 1,
        "mask without an image": 1,
        "not a .jpg, .png or .dcm file": 1,
    }
    (note,) = [note for note in listing.notes if "lack a mask" in note]
    assert note.startswith("1 of 3 images lack a mask and are left out, such as images/2.png (no ")
    assert "1 masks are of no image, such as masks/4.png" in listing.notes


def table(root, *rows, head="image,left,top,right,bottom,label"):
    (root / masks.TABLE).write_text("\n".join((head, *rows)) + "\n")


def test_a_table_gives_boxes_and_labels(tmp_path):
    draw(tmp_path, *(f"{kind}/{n}.png" for kind in ("images", "masks") for n in (1, 2, 3)))
    table(tmp_path, "1.png,4,6,10,14,lung", "images/1.png,0,0.5,3,2,heart", "2,4,6,10,14,lung")
    listing = listed(tmp_path)
    assert listing.label_names == ("heart", "lung")
    assert listing.dropped == {}
    first, second, third = listing.items
    assert first.boxes == (("lung", 4, 6, 10, 14), ("heart", 0, 0.5, 3, 2))
    assert (first.labels, second.labels, third.labels) == ((1, 1), (0, 1), (0, 0))
    assert third.boxes == ()
    boxes = masks.make(first, settings(tmp_path))["boxes"]
    assert [(box["label"], box["bbox"].tolist()) for box in boxes] == [
        ("lung", [6, 6, 12, 14]),
        ("heart", [2, 0.5, 5, 2]),
    ]
    table(tmp_path, "1,4,6,10,14", head="image,left,top,right,bottom")
    assert listed(tmp_path).label_names == ("object",)


def test_boxes_need_no_masks(tmp_path):
    draw(tmp_path, "images/1.png", "images/2.png")
    table(tmp_path, "1,4,6,10,14,lung")
    items = listed(tmp_path).items
    assert [(item.masks, len(item.boxes)) for item in items] == [((), 1), ((), 0)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1,10,6,4,14,lung", "left, top, right, bottom are '10, 6, 4, 14': expected four numbers"),
        ("1,4,6,4,14,lung", "left, top, right, bottom are '4, 6, 4, 14': expected"),
        ("1,4,6,nan,14,lung", "left, top, right, bottom are '4, 6, , 14': expected"),
        ("1,4,6,inf,14,lung", "are '4, 6, inf, 14': expected"),
        ("1,4,6,wide,14,lung", "are '4, 6, wide, 14': expected"),
        ("1,4,6", "has 3 fields where the head line has 6"),
    ],
)
def test_a_bad_box_rejects_its_record(tmp_path, row, reason):
    draw(tmp_path, *(f"{kind}/{n}.png" for kind in ("images", "masks") for n in (1, 2)))
    table(tmp_path, "1,4,6,10,14,lung", row, "2,4,6,10,14,lung")
    listing = listed(tmp_path)
    assert [item.key for item in listing.items] == ["images/2.png"]
    ((key, why),) = listing.rejects
    assert key == "images/1.png"
    assert why.startswith(f"{tmp_path / masks.TABLE}: row 3: ")
    assert reason in why


def test_a_box_outside_of_its_image_and_a_mask_of_another_shape_reject_the_record(tmp_path):
    draw(tmp_path, *(f"{kind}/{n}.png" for kind in ("images", "masks") for n in (1, 2, 3)))
    Image.fromarray(MASK.T).save(tmp_path / "masks/2.png")
    table(tmp_path, "1,30,6,40,14,lung", "3,15,20,30,40,lung")
    outside, turned, over = listed(tmp_path).items
    config = settings(tmp_path)
    with pytest.raises(RejectedRecord, match=r"1\.png: the box 30, 6, 40, 14 .* 20 x 24 pixels"):
        masks.make(outside, config)
    with pytest.raises(RejectedRecord, match=r"masks/2\.png: a mask of 24 x 20 pixels, of other"):
        masks.make(turned, config)
    assert masks.make(over, config)["boxes"][0]["bbox"].tolist() == [17, 20, 22, 24]


def test_rows_of_no_image_or_of_several_are_rejects(tmp_path):
    draw(tmp_path, *(f"{kind}/{p}/1.png" for kind in ("images", "masks") for p in ("a", "b")))
    table(tmp_path, "9.png,4,6,10,14,lung", "1.png,4,6,10,14,lung", "images/a/1.png,4,6,10,14,lung")
    listing = listed(tmp_path)
    path = tmp_path / masks.TABLE
    assert listing.rejects == [
        ("row-2", f"{path}: row 2: '9.png' is no image of the folder"),
        ("images/a/1.png", f"{path}: row 3: '1.png' is several images of the folder"),
        ("images/b/1.png", f"{path}: row 3: '1.png' is several images of the folder"),
    ]
    assert listing.items == []


def test_folders_of_which_nothing_can_be_made(tmp_path):
    draw(tmp_path, "images/1.png", "masks/2.png")
    with pytest.raises(UserError, match=r"1 images and 1 masks, none of them of equal names, and"):
        listed(tmp_path)
    with pytest.raises(UserError, match=r"no folder: .*gone does not exist"):
        listed(tmp_path / "gone")
    with pytest.raises(UserError, match=r"masks\.subject: '\(p': .*: give a regular expression"):
        listed(tmp_path, masks={"subject": "(p"})
    draw(tmp_path, "masks/1.png")
    assert listed(tmp_path, masks={"subject": "p[0-9]+"}).rejects == [
        ("images/1.png", f"{tmp_path}/images/1.png: masks.subject 'p[0-9]+' finds nothing")
    ]
    table(tmp_path, "1,4,6", head="image,x,y")
    with pytest.raises(UserError, match=r"missing column: .*boxes\.csv: no column 'left'"):
        listed(tmp_path)


def test_a_whole_set_is_stored(tmp_path, capsys):
    for split in ("train", "valid", "test"):
        draw(tmp_path / "in", f"{split}/images/{split}.png", f"{split}/masks/{split}.png")
    table(tmp_path / "in", "train,4,6,10,14,lung")
    out = ingestion.ingest(settings(tmp_path / "in"), tmp_path / "out")
    said = capsys.readouterr().err
    assert "train 1, valid 1, test 1, 0 rejected" in said
    assert "mask_masks: of 3 images" in said
    assert "lung 1 (train 1, valid 0, test 0)" in said
    record = shards.open_split(out, "train")[0]
    assert record["mask_masks"].sum() // 255 == 48
    assert [box["bbox"].tolist() for box in record["boxes"]] == [[6, 6, 12, 14]]
