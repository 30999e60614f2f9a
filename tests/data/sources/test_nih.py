"""ChestX-ray14: labels, lists and boxes in the layout of the NIH's download."""

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import ingestion, nih, plan
from medsyn_jax.data.store import shards

HEAD = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ROWS = [
    "00000001_000.png,Cardiomegaly|Infiltration,0,1,58,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,058Y,M,AP,2894,2729,0.143,0.143",
    "00000002_000.png,Mass,0,2,411,F,PA,2500,2048,0.171,0.171",
    "00000003_000.png,Pleural_Thickening,0,3,7,F,PA,2500,2048,0.171,0.171",
]
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
LISTS = {
    "train_val_list.txt": ["00000001_000.png", "00000001_001.png"],
    "test_list.txt": ["00000002_000.png", "00000003_000.png"],
}
BOX_HEAD = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
BOXES = [
    "00000002_000.png,Mass,10.5,20.25,30,15",
    "00000002_000.png,Infiltrate,1,2,30,15",
    "00000001_000.png,Cardiomegaly,4,4,8,8",
]


def download(root, rows=ROWS, head=HEAD, boxes=BOXES, box_head=BOX_HEAD, lists=LISTS, images=None):
    """The tables and lists, and images of 64 x 64 pixels in two of the twelve folders."""
    root.mkdir()
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([head, *rows]) + "\n")
    (root / "BBox_List_2017.csv").write_text("\n".join([box_head, *boxes]) + "\n")
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines))
    names = [row.split(",")[0] for row in ROWS] if images is None else images
    for number, name in enumerate(names):
        folder = root / f"images_00{1 + number % 2}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(folder / name)
    return root


def settings(root, boxes=False, **fields):
    config = get_config("nih").ingest
    config.update({"path": str(root), "size": 32, "workers": 1, "max_reject_share": 0.9, **fields})
    config.nih.boxes = boxes
    return config


def listed(root, boxes=False):
    return nih.list_items(settings(root, boxes))


def positives(item) -> list[str]:
    return [name for name, value in zip(nih.LABELS, item.labels, strict=True) if value == 1]


def test_labels_splits_and_views_from_several_folders(tmp_path):
    listing = listed(download(tmp_path / "data"))
    assert (listing.rejects, listing.dropped, listing.notes) == ([], {}, [])
    assert len(listing.label_names) == 14
    first, normal, mass, thick = listing.items
    assert (first.key, first.subject, first.split) == ("00000001_000.png", "1", "train")
    assert positives(first) == ["Cardiomegaly", "Infiltration"]
    assert (normal.labels, normal.view, normal.split) == ((0,) * 14, "AP", "train")
    assert (positives(mass), mass.subject, mass.split) == (["Mass"], "2", "test")
    assert positives(thick) == ["Pleural_Thickening"]
    assert [item.boxes for item in listing.items] == [None] * 4
    assert [item.image.split("/")[-3] for item in listing.items] == ["images_001", "images_002"] * 2


@pytest.mark.parametrize("comma", ["head", "rows", "both"])
def test_a_comma_at_the_end_of_the_head_line_or_of_the_rows(tmp_path, comma):
    head = HEAD + ("," if comma in ("head", "both") else "")
    rows = [row + ("," if comma in ("rows", "both") else "") for row in ROWS]
    assert len(listed(download(tmp_path / "data", rows, head)).items) == 4


def test_images_in_one_folder(tmp_path):
    root = download(tmp_path / "data", images=[])
    (root / "images").mkdir()
    Image.fromarray(np.eye(64, dtype=np.uint8)).save(root / "images" / "00000002_000.png")
    listing = listed(root)
    assert [item.key for item in listing.items] == ["00000002_000.png"]
    reason = f"{root}/Data_Entry_2017_v2020.csv: row 2: there is no image 00000001_000.png in the"
    assert listing.rejects[0] == ("row-2", f"{reason} folder")


def test_boxes_are_read_by_position_and_list_their_images_alone(tmp_path):
    listing = listed(download(tmp_path / "data"), boxes=True)
    first, mass = listing.items
    assert (first.key, first.boxes) == ("00000001_000.png", (("Cardiomegaly", 4, 4, 12, 12),))
    assert mass.boxes == (("Mass", 10.5, 20.25, 40.5, 35.25), ("Infiltration", 1, 2, 31, 17))
    assert (listing.rejects, listing.dropped) == ([], {"images without a box": 2})


@pytest.mark.parametrize(
    ("head", "tail"),
    [
        ("Image Index,Finding Label,Bbox [x,y,w,h],,,", ",,,"),
        ("Image Index,Finding Label,Bbox [x,y,w,h]", ""),
        ('Image Index,Finding Label,"Bbox [x,y,w,h]",,,', ""),
    ],
)
def test_head_lines_of_boxes_of_other_lengths(tmp_path, head, tail):
    boxes = [row + tail for row in BOXES]
    listing = listed(download(tmp_path / "data", boxes=boxes, box_head=head), boxes=True)
    assert [len(item.boxes) for item in listing.items] == [1, 2]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("00000001_000.png,Mass,1,2,0,9", "the box from (1, 2) to (1, 11) has no area"),
        ("00000001_000.png,Mass,9,2,-4,9", "the box from (9, 2) to (5, 11) has no area"),
        ("00000001_000.png,Mass,9,nan,4,9", "x, y, w, h: 'nan' is not a number"),
        ("00000001_000.png,Mass,9,,4,9", "x, y, w, h: '' is not a number"),
        ("00000001_000.png,Mass,9,2,4", "is not image, label, x, y, width and height"),
        ("00000001_000.png,Mass,9,2,4,5,6", "is not image, label, x, y, width and height"),
        ("00000001_000.png,Tumour,9,2,4,5", "'Tumour' is not one of the 14 labels"),
    ],
)
def test_an_image_with_a_broken_box_is_rejected(tmp_path, row, reason):
    root = download(tmp_path / "data", boxes=[*BOXES, row])
    listing = listed(root, boxes=True)
    assert [item.key for item in listing.items] == ["00000002_000.png"]
    told = f"{root}/BBox_List_2017.csv: row 5: {reason}"
    assert listing.rejects == [("00000001_000.png", told)]


def test_a_box_outside_of_the_image_or_of_an_image_that_is_not_there(tmp_path):
    boxes = ["00000002_000.png,Mass,64,0,5,5", "00000009_000.png,Mass,1,1,5,5"]
    root = download(tmp_path / "data", boxes=[BOXES[2], *boxes])
    config = settings(root, boxes=True)
    ingestion.ingest(config, tmp_path / "shards")
    lines = (tmp_path / "shards" / "rejects.csv").read_text().splitlines()[1:]
    assert lines == [
        f"box-4,{root}/BBox_List_2017.csv: row 4: 00000009_000.png: no usable image",
        f'00000002_000.png,"{root}/images_001/images/00000002_000.png: the box 64, 0, 69, 5 (left, '
        'top, right, bottom) has no area inside of the image of 64 x 64 pixels"',
    ]
    assert shards.describe(tmp_path / "shards")["splits"]["train"]["records"] == 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("00000003_000.png,Tumour,0,3,7,F,PA,2500,2048,0.1,0.1", "'Tumour' is not one of the 14"),
        ("00000003_000.png,nan,0,3,7,F,PA,2500,2048,0.1,0.1", "Image Index, Finding Labels or Pa"),
        ("00000003_000.png,Mass,0,,7,F,PA,2500,2048,0.1,0.1", "Image Index, Finding Labels or Pa"),
        (
            "00000003_000.png,No Finding|Mass,0,3,7,F,PA,2500,2048,0.1,0.1",
            "'No Finding|Mass' is both no finding and a finding",
        ),
        ("00000003_000.png,Mass,0,3", "has 4 fields where the head line has 11"),
        ("00000004_000.png,Mass,0,4,7,F,PA,2500,2048,0.1,0.1", "00000004_000.png is neither in"),
    ],
)
def test_a_row_that_is_no_record_is_rejected_by_number(tmp_path, row, reason):
    root = download(tmp_path / "data", [*ROWS[:3], row])
    Image.fromarray(NOISE).save(root / "images_001" / "images" / "00000004_000.png")
    listing = listed(root)
    assert len(listing.items) == 3
    ((key, told),) = listing.rejects
    assert key == "row-5"
    assert told.startswith(f"{root}/Data_Entry_2017_v2020.csv: row 5: {reason}")
    assert "1 images of the lists have no usable row" in listing.notes[0]


def test_lists_that_name_other_files(tmp_path):
    lists = {name: [f"other-{line}" for line in lines] for name, lines in LISTS.items()}
    root = download(tmp_path / "data", lists=lists)
    with pytest.raises(UserError, match=r"no usable record .4 rejected, first: .* is neither in"):
        plan.make_plan(settings(root))
    lists = {
        "train_val_list.txt": LISTS["train_val_list.txt"],
        "test_list.txt": ["00000001_000.png"],
    }
    root = download(tmp_path / "both", lists=lists)
    with pytest.raises(
        UserError, match=r"test_list.txt: line 1: 00000001_000.png is in both lists"
    ):
        listed(root)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("Data_Entry_2017_v2020.csv", r"no table: .*/Data_Entry_2017\*.csv does not exist"),
        ("BBox_List_2017.csv", r"no table: .*/BBox_List_2017\*.csv does not exist"),
        ("test_list.txt", r"no table: .*/test_list\*.txt does not exist"),
    ],
)
def test_a_missing_table_is_named(tmp_path, gone, message):
    root = download(tmp_path / "data")
    (root / gone).unlink()
    with pytest.raises(UserError, match=message):
        listed(root, boxes=True)


def test_tables_of_two_years_altered_heads_and_no_images(tmp_path):
    root = download(tmp_path / "data", head=HEAD.replace("Finding Labels", "Labels"))
    path = root / "Data_Entry_2017_v2020.csv"
    with pytest.raises(
        UserError, match=f"missing column: {path}: no column 'Finding Labels' among"
    ):
        listed(root)
    (root / "Data_Entry_2017.csv").write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"several tables: .*: move the others away"):
        listed(root)
    with pytest.raises(
        UserError, match=r"no usable record .4 rejected, first: .* there is no image"
    ):
        plan.make_plan(settings(download(tmp_path / "tables alone", images=[])))


def test_images_that_no_table_lists_are_counted(tmp_path):
    root = download(tmp_path / "data", ROWS[:3])
    assert listed(root).dropped == {"image in no table": 1}


def test_ingested_boxes_are_in_pixels_of_the_stored_image(tmp_path, capsys):
    ingestion.ingest(settings(download(tmp_path / "data"), boxes=True), tmp_path / "shards")
    (record,) = (shards.open_split(tmp_path / "shards", "test")[0],)
    assert [box["label"] for box in record["boxes"]] == ["Mass", "Infiltration"]
    np.testing.assert_array_equal(record["boxes"][0]["bbox"], [5.25, 10.125, 20.25, 17.625])
    printed = capsys.readouterr().err
    assert "Cardiomegaly 1 (train 1, valid 0, test 0)" in printed
    assert "2 left out (images without a box)" in printed
