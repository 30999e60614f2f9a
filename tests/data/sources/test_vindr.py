"""VinDr-CXR: the tables of PhysioNet and of Kaggle, and the boxes of several readers."""

import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import ingestion, plan, vindr
from medsyn_jax.data.store import shards

LABELS = vindr._PHYSIONET
TRAIN_HEAD = "image_id,rad_id,class_name,x_min,y_min,x_max,y_max"
TEST_HEAD = "image_id,class_name,x_min,y_min,x_max,y_max"
KAGGLE_HEAD = "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max"
TRAIN = [
    "a1,R1,Cardiomegaly,10,20,30,40",
    "a1,R2,Cardiomegaly,12,20,32,40",
    "a1,R3,Cardiomegaly,11,20,31,40",
    "a1,R3,Nodule/Mass,1,1,5,5",
    "a2,R1,No finding,,,,",
    "a2,R2,No finding,,,,",
    "a2,R3,ILD,2,3,9,9.5",
]
TEST = ["b1,Cardiomegaly,10,20,30,40", "b1,Cardiomegaly,10,20,30,41", "b2,No finding,,,,"]
VOTES = {
    ("a1", "R1"): ["Cardiomegaly"],
    ("a1", "R2"): ["Cardiomegaly", "Pneumonia"],
    ("a1", "R3"): ["Cardiomegaly", "Nodule/Mass", "Pneumonia", "Other diseases"],
    ("a2", "R1"): ["No finding"],
    ("a2", "R2"): ["No finding"],
    ("a2", "R3"): ["ILD"],
}
TEST_VOTES = {("b1",): ["Cardiomegaly", "Other diseases"], ("b2",): ["No finding"]}
KAGGLE = [
    "a1,Cardiomegaly,3,R1,10,20,30,40",
    "a1,Cardiomegaly,3,R2,12,20,32,40",
    "a1,No finding,14,R3,,,,",
    "a2,No finding,14,R1,,,,",
    "a2,No finding,14,R2,,,,",
    "a2,ILD,5,R3,2,3,9,9.5",
]


def radiograph(path) -> None:
    """A DICOM of 64 x 48 pixels."""
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    dataset.Rows, dataset.Columns = 48, 64
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 8, 8, 7
    dataset.PixelRepresentation = 0
    dataset.PixelData = np.random.default_rng(0).integers(0, 256, 48 * 64, np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write(path, head, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([head, *rows]) + "\n")


def votes(path, ids, votes, names=LABELS) -> None:
    lines = [
        [*key, *("1" if n in positive else "0" for n in LABELS)] for key, positive in votes.items()
    ]
    write(path, ",".join([*ids, *names]), map(",".join, lines))


def physionet(root, train=TRAIN, test=TEST, train_votes=VOTES, test_votes=TEST_VOTES):
    tables = root / "annotations"
    write(tables / "annotations_train.csv", TRAIN_HEAD, train)
    write(tables / "annotations_test.csv", TEST_HEAD, test)
    votes(tables / "image_labels_train.csv", ("image_id", "rad_id"), train_votes)
    names = ["Other disease" if name == "Other diseases" else name for name in LABELS]
    votes(tables / "image_labels_test.csv", ("image_id",), test_votes, names)
    for place in ("train/a1", "train/a2", "test/b1", "test/b2"):
        radiograph(root / f"{place}.dicom")
    return root


def kaggle(root, rows=KAGGLE):
    write(root / "train.csv", KAGGLE_HEAD, rows)
    for place in ("train/a1", "train/a2", "test/c1"):
        radiograph(root / f"{place}.dicom")
    return root


def settings(root, **fields):
    config = get_config("vindr").ingest
    config.update({"path": str(root), "size": 64, "workers": 1, "max_reject_share": 0.9})
    config.vindr.update(fields)
    return config


def listed(root, **fields):
    return vindr.list_items(settings(root, **fields))


def positives(listing, item) -> list[str]:
    return [n for n, value in zip(listing.label_names, item.labels, strict=True) if value == 1]


def test_physionet_labels_by_majority_boxes_fused_and_the_consensus_as_it_is(tmp_path):
    listing = listed(physionet(tmp_path / "data"))
    assert (listing.rejects, listing.dropped) == ([], {})
    assert len(listing.label_names) == 28
    a1, a2, b1, b2 = listing.items
    assert [item.key for item in listing.items] == ["train/a1", "train/a2", "test/b1", "test/b2"]
    assert [item.split for item in listing.items] == ["train", "train", "test", "test"]
    assert (positives(listing, a1), a1.view) == (["Cardiomegaly", "Pneumonia"], "PA")
    assert set(a1.labels) == {0, 1}
    assert a1.boxes == (("Cardiomegaly", 11, 20, 31, 40),)
    assert (positives(listing, a2), a2.boxes) == (["No finding"], ())
    assert positives(listing, b1) == ["Cardiomegaly", "Other diseases"]
    assert b1.boxes == (("Cardiomegaly", 10, 20, 30, 40), ("Cardiomegaly", 10, 20, 30, 41))
    assert (positives(listing, b2), b2.boxes) == (["No finding"], ())


def test_kaggle_labels_are_what_most_readers_mark(tmp_path):
    listing = listed(kaggle(tmp_path / "data"))
    a1, a2 = listing.items
    assert len(listing.label_names) == 15
    assert (positives(listing, a1), a1.boxes) == (
        ["Cardiomegaly"],
        (("Cardiomegaly", 11, 20, 31, 40),),
    )
    assert (positives(listing, a2), a2.boxes, a2.split) == (["No finding"], (), "train")
    assert listing.dropped == {"image in no table": 1}  # the test images have no labels


def test_two_readers_of_two_opinions_are_uncertain_and_empty_cells_no_opinion(tmp_path):
    listing = listed(kaggle(tmp_path / "data", KAGGLE[1:3] + KAGGLE[3:]))
    named = dict(zip(listing.label_names, listing.items[0].labels, strict=True))
    assert (named["Cardiomegaly"], named["No finding"], named["ILD"]) == (-1, -1, 0)
    assert [vindr._majority(v) for v in ((1, -2, -2), (0, 0, 1), (-2, -2), (1, 0, -2))] == [
        1,
        0,
        -2,
        -1,
    ]


@pytest.mark.parametrize("names", [("R1", "R2", "R3"), ("R3", "R1", "R2")])
def test_boxes_of_readers_are_fused_whatever_the_order_of_rows(names):
    first, second, third = names
    marks = [
        (first, "Mass", (0.0, 0.0, 10.0, 10.0)),
        (second, "Mass", (2.0, 0.0, 12.0, 10.0)),  # IoU 2/3
        (third, "Mass", (50.0, 50.0, 60.0, 60.0)),  # of one reader
        (third, "ILD", (0.0, 0.0, 10.0, 10.0)),  # of another label
        (second, "None", None),
    ]
    for rows in (marks, marks[::-1]):
        assert vindr.fuse(rows, 0.5, 2) == (("Mass", 1, 0, 11, 10),)
        assert vindr.fuse(rows, 0.7, 2) == ()
        assert len(vindr.fuse(rows, 0.5, 1)) == 3
        assert len(vindr.fuse(rows, 0.7, 1)) == 4


def test_two_boxes_of_one_reader_stay_two():
    one, other = (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 11.0, 10.0)
    marks = [(reader, "Mass", box) for reader in ("R1", "R2") for box in (one, other)]
    assert vindr.fuse(marks, 0.5, 2) == (("Mass", *one), ("Mass", *other))
    assert vindr.fuse([*marks, marks[0]], 0.5, 2) == vindr.fuse(marks, 0.5, 2)


def test_a_box_joins_the_cluster_that_it_overlaps_most():
    marks = [
        ("R1", "Mass", (0.0, 0.0, 10.0, 10.0)),
        ("R1", "Mass", (3.0, 0.0, 13.0, 10.0)),
        ("R2", "Mass", (2.0, 0.0, 12.0, 10.0)),
    ]
    assert vindr.fuse(marks, 0.5, 2) == (("Mass", 2.5, 0, 12.5, 10),)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("a2,R1,ILD,9,2,1,5", "the box from (9, 2) to (1, 5) has no area"),
        ("a2,R1,ILD,9,2,9,5", "the box from (9, 2) to (9, 5) has no area"),
        ("a2,R1,ILD,nan,2,9,5", "column 'x_min': '' is not a number"),
        ("a2,R1,ILD,1,2,9,inf", "column 'y_max': 'inf' is not a number"),
        ("a2,R1,Tumour,1,2,9,5", "class_name 'Tumour' is no label of the set"),
        ("a2,,ILD,1,2,9,5", "column 'rad_id' is empty"),
        ("a2,R1,ILD,1,2,9", "has 6 fields where the head line has 7"),
    ],
)
def test_an_image_with_an_unusable_box_is_rejected(tmp_path, row, reason):
    root = physionet(tmp_path / "data", [*TRAIN, row])
    listing = listed(root)
    assert [item.key for item in listing.items] == ["train/a1", "test/b1", "test/b2"]
    path = root / "annotations" / "annotations_train.csv"
    assert listing.rejects == [("train/a2", f"{path}: row 9: {reason}")]


def test_a_box_outside_of_its_image_rejects_the_record(tmp_path):
    root = physionet(tmp_path / "data", test=["b1,Cardiomegaly,64,0,70,9", "b2,No finding,,,,"])
    ingestion.ingest(settings(root), tmp_path / "shards")
    (line,) = (tmp_path / "shards" / "rejects.csv").read_text().splitlines()[1:]
    assert line.startswith(f'test/b1,"{root}/test/b1.dicom: the box 64, 0, 70, 9 (left, top, right')


def test_images_that_one_table_or_the_folder_lacks(tmp_path):
    root = physionet(tmp_path / "data", [*TRAIN, "a9,R1,ILD,1,2,9,5"])
    (root / "train" / "a2.dicom").rename(root / "train" / "other.dicom")
    listing = listed(root)
    tables = root / "annotations"
    assert listing.rejects == [
        ("train/a2", f"{tables}/annotations_train.csv: there is no a2.dicom in {root}"),
        (
            "train/a9",
            f"{tables}/annotations_train.csv: a9 is not in {tables}/image_labels_train.csv",
        ),
    ]
    assert listing.dropped == {"image in no table": 1}


def test_labels_that_are_none_and_a_reader_twice(tmp_path):
    root = physionet(tmp_path / "data")
    path = root / "annotations" / "image_labels_train.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], lines[-1].replace("0", "maybe", 1)]))
    ((key, reason),) = listed(root).rejects
    assert (key, reason.split(": ", 1)[1]) == (
        "train/a2",
        "row 7: column 'Aortic enlargement': 'maybe' is not 1, 0, -1 or empty",
    )
    path.write_text("\n".join([*lines[:-1], lines[-2]]))
    assert listed(root).rejects == [("train/a2", f"{path}: a2 has two rows of one reader")]
    nan = lines[-1].split(",")
    path.write_text("\n".join([*lines[:-1], ",".join([*nan[:2], *(["nan"] * 28)])]))
    listing = listed(root)
    assert positives(listing, listing.items[1]) == ["No finding"]


def test_altered_head_lines_and_missing_tables_are_named(tmp_path):
    root = physionet(tmp_path / "data")
    path = root / "annotations" / "image_labels_train.csv"
    whole = path.read_text()
    path.write_text(whole.replace("Lung tumor", "Tumor"))
    with pytest.raises(UserError, match=f"missing column: {path}: no column 'Lung tumor' among"):
        listed(root)
    path.write_text(whole.replace("rad_id", "reader"))
    with pytest.raises(UserError, match=f"missing column: {path}: no column 'rad_id' among"):
        listed(root)
    path.write_text(whole)
    boxes = root / "annotations" / "annotations_test.csv"
    boxes.unlink()
    with pytest.raises(UserError, match=f"no table: {boxes} does not exist: check the path"):
        listed(root)
    with pytest.raises(
        UserError, match=r"no table: vindr: looked for .*/annotations/image_labels_tr"
    ):
        listed(tmp_path)
    with pytest.raises(
        UserError, match=r"ingest.vindr: iou=0.0, readers=2: use 0 to 1, and at least 1"
    ):
        listed(root, iou=0)


def test_a_table_of_other_files(tmp_path):
    root = kaggle(tmp_path / "data", [f"x{row}" for row in KAGGLE])
    with pytest.raises(
        UserError, match=r"no usable record .2 rejected, .* no xa1.dicom in .*; 3 left"
    ):
        plan.make_plan(settings(root))


def test_ingested_records_hold_fused_boxes_of_dicom_images(tmp_path, capsys):
    ingestion.ingest(settings(physionet(tmp_path / "data")), tmp_path / "shards")
    names = shards.describe(tmp_path / "shards")["label_names"]
    test = shards.open_split(tmp_path / "shards", "test")
    record = next(r for r in map(test.__getitem__, range(len(test))) if r["key"] == "test/b1")
    assert record["image"].shape == (64, 64)
    assert [names[n] for n in np.flatnonzero(record["labels"] == 1)] == [
        "Cardiomegaly",
        "Other diseases",
    ]
    boxes = [box["bbox"].tolist() for box in record["boxes"]]
    assert boxes == [[10, 28, 30, 48], [10, 28, 30, 49]]  # after 8 rows of padding
    printed = " ".join(capsys.readouterr().err.split())
    assert "boxes: 3 of Cardiomegaly" in printed
