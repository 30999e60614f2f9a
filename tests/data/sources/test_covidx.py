"""COVIDx: lists of all versions, with what is odd in them."""

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import covidx, ingestion, plan
from medsyn_jax.data.store import shards

THREE = {
    "train_COVIDx9A.txt": [
        "3 SARS-day0.jpeg pneumonia cohen",
        "COVID 1 COVID(1).png COVID-19 sirm",
        "ec3a480b ec3a480b.png normal rnsa",
    ],
    "test_COVIDx9A.txt": [
        "419639-003251 MIDRC-0.png COVID-19 ricord",
        "8989e25c 8989e25c.png normal",
    ],
}


def download(root, lists, without=(), extra=()):
    """The lists, and an image of noise for each of their lines."""
    rng = np.random.default_rng(0)
    root.mkdir(exist_ok=True)
    images = [*extra]
    for list_name, lines in lists.items():
        (root / list_name).write_text("\n".join(lines) + "\n")
        split = list_name.removesuffix(".txt").split("_")[0]
        words = " ".join(lines).split()
        images += [(split, word) for word in words if word.endswith(("png", "jpeg"))]
    for split, name in images:
        (root / split).mkdir(exist_ok=True)
        if name not in without:
            Image.fromarray(rng.integers(0, 256, (24, 20), np.uint8)).save(root / split / name)
    return root


def settings(root, **fields):
    config = get_config("covidx").ingest
    config.update({"path": str(root), "size": 16, "workers": 1, "max_reject_share": 0.9, **fields})
    return config


def listed(root, **fields):
    return covidx.list_items(settings(root, **fields))


def test_three_classes_with_three_and_four_columns_and_patients_of_two_words(tmp_path):
    listing = listed(download(tmp_path / "data", THREE))
    assert listing.label_names == ("normal", "pneumonia", "COVID-19")
    assert {item.key: (item.subject, item.split, item.labels) for item in listing.items} == {
        "test/MIDRC-0.png": ("419639-003251", "test", (0, 0, 1)),
        "test/8989e25c.png": ("8989e25c", "test", (1, 0, 0)),
        "train/SARS-day0.jpeg": ("3", "train", (0, 1, 0)),
        "train/COVID(1).png": ("COVID 1", "train", (0, 0, 1)),
        "train/ec3a480b.png": ("ec3a480b", "train", (1, 0, 0)),
    }
    assert (listing.rejects, listing.dropped) == ([], {})


def test_two_classes_are_one_label_and_a_list_of_validation_is_taken(tmp_path):
    lists = {
        "train.txt": ["1 a.png negative rsna"],
        "val.txt": ["2 b.png positive bimcv"],
        "test.txt": ["3 c.png positive ricord"],
    }
    listing = listed(download(tmp_path / "data", lists))
    assert listing.label_names == ("COVID-19",)
    assert {(item.subject, item.split, item.labels) for item in listing.items} == {
        ("1", "train", (0,)),
        ("2", "val", (1,)),
        ("3", "test", (1,)),
    }


def test_a_patient_of_test_leaves_train(tmp_path):
    """As ANON191 of version 6."""
    lists = {
        "train_COVIDx6.txt": ["ANON191 ANON191.png negative actmed", "2 b.png positive cohen"],
        "test_COVIDx6.txt": ["ANON191 ANON191-2.png negative actmed"],
    }
    listing = listed(download(tmp_path / "data", lists))
    assert [item.key for item in listing.items] == ["test/ANON191-2.png", "train/b.png"]
    assert listing.dropped["patient of another list"] == 1


def test_images_that_are_missing_and_images_that_no_list_names(tmp_path):
    root = download(tmp_path / "data", THREE, without=("COVID(1).png",), extra=[("test", "x.png")])
    listing = listed(root)
    assert listing.rejects == [
        ("train/COVID(1).png", f"{root}: there is no image train/COVID(1).png")
    ]
    assert listing.dropped == {"image in no table": 1}
    assert len(listing.items) == 4


@pytest.mark.parametrize(
    "line",
    [
        "SITE2-000061 MIDRC.png level2 ricord",  # of the lists of severity
        "patientid filename class source",
        "COVID-19",
        "a.png normal",
        "1 a.png normal rsna 7",
        "1 a.png nan rsna",
    ],
)
def test_a_line_without_a_class_in_its_place_is_rejected_by_number(tmp_path, line):
    root = download(tmp_path / "data", THREE)
    path = root / "train_COVIDx9A.txt"
    path.write_text(f"{line}\n\n" + path.read_text())
    listing = listed(root)
    assert listing.rejects == [
        ("train-line-1", f"{path}: line 1: {line!r} is not `patient image class source`")
    ]
    assert len(listing.items) == 5


def test_a_list_that_names_other_files_is_named_in_one_line(tmp_path):
    root = download(tmp_path / "data", THREE)
    for split in ("train", "test"):
        for path in (root / split).iterdir():
            path.rename(path.with_stem(f"other-{path.stem}"))
    with pytest.raises(UserError) as caught:
        plan.make_plan(settings(root))
    assert str(caught.value) == (
        f"ingest: {root}: no usable record (5 rejected, first: {root}: there is no image "
        "test/MIDRC-0.png; 5 left out (image in no table))"
    )


def test_lists_of_several_versions_need_a_choice(tmp_path):
    two = {name.replace("9A", "9B"): ["1 y.png positive sirm"] for name in THREE}
    two["test_COVIDx9B.txt"] = ["2 z.png negative rsna"]
    root = download(tmp_path / "data", THREE | two)
    with pytest.raises(
        UserError, match=r"several tables: .*test_COVIDx9A.txt, test_COVIDx9B.txt: n"
    ):
        listed(root)
    assert listed(root, covidx={"version": "9B"}).label_names == ("COVID-19",)
    (root / "train_COVIDx9A.txt").rename(root / "train_COVIDx9B.txt")
    (root / "test_COVIDx9A.txt").unlink()
    with pytest.raises(UserError, match="the lists mix COVID-19, negative, normal, pneumonia: set"):
        listed(root)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("train_COVIDx9A.txt", r"no table: .*/train\*.txt does not exist: check the path"),
        ("test", r"no images: .*/test: No such file or directory: check the path"),
    ],
)
def test_what_is_missing_is_named(tmp_path, gone, message):
    root = download(tmp_path / "data", THREE)
    (root / gone).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message):
        listed(root)


def test_a_list_that_is_not_utf_8(tmp_path):
    root = download(tmp_path / "data", THREE)
    (root / "train_COVIDx9A.txt").write_bytes(b"1 a.png normal rsna\n2 b\xe4.png normal rsna\n")
    with pytest.raises(UserError, match=r"not a UTF-8 list: .*/train_COVIDx9A.txt: line 2: save"):
        listed(root)


def test_ingested_records_keep_their_split_and_labels(tmp_path, capsys):
    lists = THREE | {"val_COVIDx9A.txt": ["77 v.png pneumonia bimcv"]}
    config = settings(download(tmp_path / "data", lists))
    ingestion.ingest(config, tmp_path / "shards")
    test = shards.open_split(tmp_path / "shards", "test")
    assert {r["key"]: r["labels"].tolist() for r in map(test.__getitem__, range(len(test)))} == {
        "test/MIDRC-0.png": [0, 0, 1],
        "test/8989e25c.png": [1, 0, 0],
    }
    printed = capsys.readouterr().err
    assert "COVID-19 2 (train 1, valid 0, test 1)" in printed
    assert "train 3, valid 1, test 2, 0 rejected" in printed
