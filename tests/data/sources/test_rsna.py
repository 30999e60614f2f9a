"""RSNA Pneumonia Detection in its public layout: two tables with a row a box, and DICOM files."""

import io

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import RejectedRecord, UserError
from medsyn_jax.data.sources import plan, rsna
from tests.data.images.test_dicom import dicom

LABELS = "stage_2_train_labels.csv"
CLASSES = "stage_2_detailed_class_info.csv"
SICK, OTHER, WELL = "Lung Opacity", "No Lung Opacity / Not Normal", "Normal"
BOX_ROWS = ["a,264.0,152.0,213.0,379.0,1", "a,562,152,256,453,1", "b,,,,,0", "c,,,,,0"]
CLASS_ROWS = [f"a,{SICK}", f"a,{SICK}", f"b,{OTHER}", f"c,{WELL}"]


def settings(root, **fields):
    config = get_config("rsna").ingest
    config.update({"path": str(root), "size": 64, "workers": 1, **fields})
    return config


def listing(root, boxes=tuple(BOX_ROWS), classes=tuple(CLASS_ROWS), images="abc"):
    for name, head, rows in (
        (LABELS, "patientId,x,y,width,height,Target", boxes),
        (CLASSES, "patientId,class", classes),
    ):
        (root / name).write_text("\n".join([head, *rows]) + "\n")
    (root / "stage_2_train_images").mkdir()
    for name in images:
        (root / "stage_2_train_images" / f"{name}.dcm").touch()
    return rsna.list_items(settings(root))


def test_rows_become_items(tmp_path):
    (tmp_path / "stage_2_test_images").mkdir()
    (tmp_path / "stage_2_test_images" / "t.dcm").touch()
    result = listing(tmp_path)
    assert result.label_names == (SICK, OTHER, WELL)
    assert [(i.key, i.subject, i.split, i.labels) for i in result.items] == [
        ("a", "a", None, (1, 0, 0)),
        ("b", "b", None, (0, 1, 0)),
        ("c", "c", None, (0, 0, 1)),
    ]
    assert result.items[0].boxes == ((SICK, 264, 152, 477, 531), (SICK, 562, 152, 818, 605))
    assert result.items[1].boxes == result.items[2].boxes == ()
    assert result.items[0].image == str(tmp_path / "stage_2_train_images" / "a.dcm")
    assert result.rejects == []
    assert result.dropped == {"image in no table": 1}


@pytest.mark.parametrize(
    ("boxes", "classes", "reason"),
    [
        (["z,264,152,nan,379,1"], [f"z,{SICK}"], "'264, 152, , 379': expected four numbers"),
        (["z,264,152,inf,379,1"], [f"z,{SICK}"], "'264, 152, inf, 379': expected four numbers"),
        (["z,,,,,nan"], [f"z,{WELL}"], "row 6: Target is '': expected 0 without a box, or 1"),
        (["z,,,,,2"], [f"z,{WELL}"], "Target is '2': expected 0"),
        (["z,1,2,3,4,0"], [f"z,{WELL}"], "Target is '0': expected 0 without a box"),
        (["z,1,2,3,1"], [f"z,{SICK}"], "row 6: has 5 fields where the head line has 6"),
        (["z,,,,,0"], ["z,nan"], "row 6: class '' is none of Lung Opacity, No Lung"),
        (["z,,,,,0"], [f"z,{SICK}"], "is 'Lung Opacity' in stage_2_detailed_class_info.csv, but"),
        (["z,1,2,3,4,1"], [f"z,{WELL}"], "is 'Normal' in stage_2_detailed_class_info.csv, but has"),
        (["z,1,2,3,4,1", "z,,,,,0"], [f"z,{SICK}"], "contradict each other in class or Target"),
        (["z,,,,,0"], [f"z,{WELL}", f"z,{OTHER}"], "contradict each other in class or Target"),
        (["z,,,,,0"], [], "patientId z: has no row in stage_2_detailed_class_info.csv"),
        ([], [f"z,{WELL}"], "patientId z: has no row in stage_2_train_labels.csv"),
    ],
)
def test_an_image_with_unusable_rows_is_rejected(tmp_path, boxes, classes, reason):
    result = listing(tmp_path, BOX_ROWS + boxes, CLASS_ROWS + classes, "abcz")
    assert [item.key for item in result.items] == ["a", "b", "c"]
    assert [key for key, _ in result.rejects] == ["z"]
    assert reason in result.rejects[0][1]
    assert result.dropped == {}


def test_a_listed_image_that_is_missing_is_rejected(tmp_path):
    result = listing(tmp_path, images="bcde")
    assert [item.key for item in result.items] == ["b", "c"]
    assert [key for key, _ in result.rejects] == ["a"]
    assert result.rejects[0][1].endswith(
        "patientId a: there is no .dcm file of this name in the folder"
    )
    assert result.dropped == {"image in no table": 2}


def test_an_altered_or_missing_table_is_named(tmp_path):
    listing(tmp_path)
    (tmp_path / CLASSES).write_text("patientId,klass\n")
    with pytest.raises(UserError, match=r"missing column: .*detailed_class_info.csv: no column 'c"):
        rsna.list_items(settings(tmp_path))
    (tmp_path / CLASSES).unlink()
    with pytest.raises(UserError, match=r"no table: .*stage_2_detailed_class_info.csv does not ex"):
        rsna.list_items(settings(tmp_path))
    (tmp_path / LABELS).write_text("patientId,x,y,w,h,Target\n")
    with pytest.raises(UserError, match=r"missing column: .*train_labels.csv: no column 'width'"):
        rsna.list_items(settings(tmp_path))


def test_counts_are_printed_by_class_box_and_split(tmp_path):
    listing(tmp_path)
    notes = plan.make_plan(settings(tmp_path, split_shares=(1.0, 0.0, 0.0))).notes
    each = "(train 1, valid 0, test 0)"
    assert f"positive for {SICK} 1 {each}; {OTHER} 1 {each}; {WELL} 1 {each}" in notes
    assert f"boxes: 2 of {SICK}, on {SICK} 1 {each}" in notes


def made(root, *boxes, side=1024):
    path = root / "a.dcm"
    dicom(path, np.tile(np.arange(side) // 4, (side, 1)).astype(np.uint8), 8)
    rows = [f"a,{box},1" for box in boxes] or ["a,,,,,0"]
    classes = [f"a,{SICK if boxes else WELL}"]
    config = settings(root)
    return rsna.make(listing(root, rows, classes, "").items[0], config)


def mask(record):
    with Image.open(io.BytesIO(record["mask_opacity"])) as png:
        return np.asarray(png)


def test_the_mask_is_the_union_of_the_boxes(tmp_path):
    record = made(tmp_path, "256,128,512,256", "512.0,256.0,512.0,256.0")
    expected = np.zeros((64, 64), np.uint8)
    expected[8:24, 16:48] = 255
    expected[16:32, 32:64] = 255
    assert np.array_equal(mask(record), expected)
    assert [box["label"] for box in record["boxes"]] == [SICK, SICK]
    assert record["boxes"][0]["bbox"].tolist() == [16, 8, 48, 24]
    assert record["boxes"][1]["bbox"].tolist() == [32, 16, 64, 32]
    assert record["labels"].tolist() == [1, 0, 0]


def test_an_image_without_boxes_has_an_empty_mask(tmp_path):
    record = made(tmp_path)
    assert record["boxes"] == []
    assert mask(record).shape == (64, 64)
    assert not mask(record).any()


def test_a_box_is_cut_off_at_the_image(tmp_path):
    record = made(tmp_path, "768,-64,512,128")
    assert record["boxes"][0]["bbox"].tolist() == [48, 0, 64, 4]
    rows, columns = np.nonzero(mask(record))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 3, 48, 63)


@pytest.mark.parametrize("box", ["1024,0,10,10", "5,5,0,10", "50,50,-10,10"])
def test_a_box_without_area_in_the_image_rejects_the_record(tmp_path, box):
    with pytest.raises(RejectedRecord, match=r"a.dcm: the box .* has no area inside of the image"):
        made(tmp_path, box, "100,100,50,50")


def test_boxes_of_an_image_of_another_size_are_rejected(tmp_path):
    with pytest.raises(RejectedRecord, match="has 512 x 512 pixels, but the run-lengths"):
        made(tmp_path, "10,10,50,50", side=512)
