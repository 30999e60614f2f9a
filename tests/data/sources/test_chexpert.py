"""CheXpert and CheXpert Plus in their public layouts."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import chexpert, chexpert_plus, plan
from medsyn_jax.data.store.items import UNKNOWN

# The order of the public tables.
LABELS = [
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
]
HEAD = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *LABELS]
EDEMA = chexpert.LABELS.index("Edema")


def name(patient: int, view: str = "view1_frontal") -> str:
    return f"patient{patient:05d}/study1/{view}"


def row(path: str, view="AP", **labels) -> list[str]:
    side = "Lateral" if "lateral" in path else "Frontal"
    labels = {key.replace("_", " "): value for key, value in labels.items()}
    return [path, "Female", "68", side, view, *(labels.get(label, "") for label in LABELS)]


def table(path, rows, head=HEAD):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def images(folder, *names, suffix=".jpg"):
    for each in names:
        path = folder / f"{each}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.arange(40 * 48, dtype=np.uint32).reshape(40, 48).astype(np.uint8)).save(
            path
        )


def small(root, train=(), valid=()):
    """Two training patients, one with a lateral view, and a validation patient."""
    top = "CheXpert-v1.0-small"
    table(
        root / "train.csv",
        [
            row(f"{top}/train/{name(1)}.jpg", "PA", Edema="1.0", Pleural_Other="-1.0"),
            row(f"{top}/train/{name(1, 'view2_lateral')}.jpg", "", Edema="1.0"),
            row(f"{top}/train/{name(2)}.jpg", Edema="0.0"),
            *train,
        ],
    )
    table(root / "valid.csv", [row(f"{top}/valid/{name(64541)}.jpg", Edema="1.0"), *valid])
    images(root / "train", name(1), name(1, "view2_lateral"), name(2))
    images(root / "valid", name(64541))
    return root


def settings(root, source="chexpert", **fields):
    config = get_config(source).ingest
    config.update({"path": str(root), "size": 32, "workers": 1, **fields})
    return config


def homes(listing) -> dict[str, str | None]:
    return {item.key: item.split for item in listing.items}


def test_small(tmp_path):
    result = chexpert.list_items(settings(small(tmp_path)))
    assert homes(result) == {name(1): "train", name(2): "train", name(64541): "test"}
    assert [item.subject for item in result.items] == [
        "patient00001",
        "patient00002",
        "patient64541",
    ]
    assert [item.view for item in result.items] == ["PA", "AP", "AP"]
    assert sorted(result.label_names) == sorted(LABELS)
    labels = dict(zip(result.label_names, result.items[0].labels, strict=True))
    assert labels == dict.fromkeys(LABELS, UNKNOWN) | {"Edema": 1, "Pleural Other": -1}
    assert result.items[1].labels[EDEMA] == 0
    assert result.items[0].image == str(tmp_path / "train" / f"{name(1)}.jpg")
    assert all(item.report is None for item in result.items)
    assert result.dropped == {"not a frontal view": 1}
    assert result.rejects == []
    record = chexpert.make(result.items[0], settings(tmp_path))
    assert record["labels"].tolist() == [*result.items[0].labels]
    assert (record["report"], record["view"]) == ("", "PA")


def test_lateral_views_are_kept_if_wanted(tmp_path):
    result = chexpert.list_items(settings(small(tmp_path), frontal_only=False))
    assert len(result.items) == 4
    assert (result.items[1].key, result.items[1].view) == (name(1, "view2_lateral"), "")
    assert result.dropped == {}


def test_the_official_validation_set_is_test_until_the_test_set_is_there(tmp_path):
    small(tmp_path)
    config = settings(tmp_path, split_shares=(0.0, 1.0, 0.0))
    assert plan.make_plan(config).notes[:2] == [
        "the official validation set is the split test: there is no table of the test set",
        "the source has no valid split: 2 subjects of train with 2 records were drawn for it",
    ]
    head = ["Path", *LABELS]
    path = f"test/{name(64741)}.jpg"  # without a first part, unlike the other tables
    table(tmp_path / "test_labels.csv", [[path, *["0.0"] * 14]], head)
    images(tmp_path / "test", name(64741))
    result = chexpert.list_items(config)
    assert homes(result)[name(64541)] == "valid"
    assert homes(result)[name(64741)] == "test"
    assert result.items[-1].labels == (0,) * 14
    assert result.items[-1].view == ""
    assert result.notes == []


def test_full_in_its_batches(tmp_path):
    top = "CheXpert-v1.0"
    first = tmp_path / f"{top} batch 1 (validate & csv)"
    table(first / "train.csv", [row(f"{top}/train/{name(n)}.jpg") for n in (1, 30000)])
    table(first / "valid.csv", [row(f"{top}/valid/{name(64541)}.jpg")])
    images(first / "valid", name(64541))
    images(tmp_path / f"{top} batch 2 (train 1)", name(1))
    images(tmp_path / f"{top} batch 3 (train 2)", name(30000))
    result = chexpert.list_items(settings(tmp_path))
    assert homes(result) == {name(1): "train", name(30000): "train", name(64541): "test"}
    assert result.items[1].image == str(
        tmp_path / f"{top} batch 3 (train 2)" / f"{name(30000)}.jpg"
    )


def test_bad_rows_and_images_that_do_not_match(tmp_path):
    top = "CheXpert-v1.0-small/train"
    bad = [
        row(f"{top}/{name(3)}.jpg", Edema="2.0"),
        row(f"{top}/{name(4)}.jpg"),
        row(f"{top}/{name(1)}.jpg"),
        row("somewhere/else.jpg"),
        row(f"{top}/{name(5)}.jpg")[:-1],
        row(f"{top}/{name(6)}.jpg", Edema="nan"),
    ]
    small(tmp_path, bad)
    images(tmp_path / "train", name(3), name(5), name(6), name(7))
    result = chexpert.list_items(settings(tmp_path))
    assert [*homes(result)] == [name(1), name(2), name(6), name(64541)]
    assert result.items[2].labels == (UNKNOWN,) * 14
    reasons = dict(result.rejects)
    assert [*reasons] == [f"train-row-{n}" for n in (5, 6, 7, 8, 9)]
    assert reasons["train-row-5"].endswith("column 'Edema': '2.0' is not 1, 0, -1 or empty")
    assert reasons["train-row-6"].endswith(f"there is no image {name(4)} below {tmp_path}")
    assert reasons["train-row-7"].endswith(f"{name(1)} is listed twice")
    assert "'somewhere/else.jpg' does not end like" in reasons["train-row-8"]
    assert reasons["train-row-9"].endswith("has 18 fields where the head line has 19")
    # 5, whose row is broken, and 7
    assert result.dropped == {"not a frontal view": 1, "image in no table": 2}


def test_a_patient_in_two_official_splits_is_an_error(tmp_path):
    small(tmp_path, valid=[row(f"CheXpert-v1.0-small/valid/{name(2, 'view2_frontal')}.jpg")])
    images(tmp_path / "valid", name(2, "view2_frontal"))
    with pytest.raises(UserError, match="subject patient00002 is in train"):
        plan.make_plan(settings(tmp_path))


def test_an_altered_or_missing_table_is_named(tmp_path):
    small(tmp_path)
    table(tmp_path / "valid.csv", [], HEAD[:-1])
    with pytest.raises(UserError, match=r"missing column: .*valid.csv: no column 'Support Devices"):
        chexpert.list_items(settings(tmp_path))
    (tmp_path / "valid.csv").unlink()
    with pytest.raises(UserError, match=r"no table: .*valid.csv does not exist"):
        chexpert.list_items(settings(tmp_path))
    with pytest.raises(UserError, match=r"no table: .*none/train.csv does not exist"):
        chexpert.list_items(settings(tmp_path / "none"))


# ---- CheXpert Plus

PLUS_HEAD = [
    *("path_to_image", "path_to_dcm", "frontal_lateral", "ap_pa", "deid_patient_id", "report"),
    *("section_findings", "section_impression", "age", "split"),
]
REPORT = "NARRATIVE:\nCHEST: 1/2/2010\n\nIMPRESSION:\n1. PULMONARY EDEMA IS SEEN."


def plus_row(number, split="train", findings="", impression="1. PULMONARY EDEMA IS SEEN.", **kw):
    path = kw.get("path") or f"{split}/{name(number)}"
    cells = [f"{path}.jpg", f"{path}.dcm", "Frontal", "PA", f"patient{number:05d}"]
    return [*cells, kw.get("report", REPORT), findings, impression, "61", split]


def plus(root, *rows, labels=None):
    table(root / chexpert_plus.TABLE, rows, PLUS_HEAD)
    if labels is not None:
        (root / "chexbert_labels").mkdir()
        (root / "chexbert_labels" / "impression_fixed.json").write_text("\n".join(labels) + "\n")
    return settings(root, "chexpert_plus")


def label_line(number, **labels) -> str:
    record = {"path_to_image": f"train/{name(number)}.jpg", **dict.fromkeys(LABELS), **labels}
    return json.dumps(record)


def test_plus(tmp_path):
    rows = [
        plus_row(1),
        plus_row(2, findings="FINDINGS: Clear lungs, no effusion."),
        plus_row(64541, "valid", impression=""),
        plus_row(3, path=f"train/{name(3, 'view2_lateral')}"),
    ]
    lines = [label_line(1, Edema=1.0, Fracture=-1.0), label_line(2, Edema=0.0, Pneumonia=np.nan)]
    config = plus(tmp_path, *rows, labels=lines)
    png = tmp_path / "PNG"
    images(png / "train", name(1), name(2), name(3, "view2_lateral"), suffix=".png")
    images(png / "valid", name(64541), suffix=".png")
    result = chexpert_plus.list_items(config)
    assert homes(result) == {name(1): "train", name(2): "train", name(64541): "test"}
    assert [item.subject for item in result.items] == [
        "patient00001",
        "patient00002",
        "patient64541",
    ]
    assert [item.sections for item in result.items] == [
        ("", "1. PULMONARY EDEMA IS SEEN."),
        ("Clear lungs, no effusion.", "1. PULMONARY EDEMA IS SEEN."),
        (None, None),
    ]
    labels = [dict(zip(result.label_names, i.labels, strict=True)) for i in result.items]
    assert labels[0] == dict.fromkeys(LABELS, UNKNOWN) | {"Edema": 1, "Fracture": -1}
    assert labels[1] == dict.fromkeys(LABELS, UNKNOWN) | {"Edema": 0}
    assert labels[2] == dict.fromkeys(LABELS, UNKNOWN)
    assert result.dropped == {"not a frontal view": 1}
    records = [chexpert_plus.make(item, config) for item in result.items]
    assert all(record["report"] == REPORT for record in records)
    assert all("EDEMA IS SEEN" in record["impression"] for record in records)
    assert records[1]["findings"] == "Clear lungs, no effusion."
    assert records[0]["view"] == "PA"


def test_plus_without_label_file_has_no_labels(tmp_path):
    config = plus(tmp_path, plus_row(1))
    images(tmp_path / "train", name(1))  # the .jpg files of CheXpert serve too
    result = chexpert_plus.list_items(config)
    assert result.label_names == result.items[0].labels == ()
    assert any("no labels: there is neither" in note for note in result.notes)


def test_plus_bad_rows(tmp_path):
    rows = [plus_row(1), plus_row(2), [*plus_row(3)[:-1], "both"], plus_row(1), plus_row(5)]
    config = plus(tmp_path, *rows)
    images(tmp_path / "train", name(1), name(3), name(5))
    result = chexpert_plus.list_items(config)
    assert [*homes(result)] == [name(1), name(5)]
    reasons = [reason.rpartition("row ")[2] for _, reason in result.rejects]
    assert reasons == [
        f"3: there is no image {name(2)} below {tmp_path}",
        "4: column 'split' is neither train nor valid",
        f"5: {name(1)} is listed twice",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "[1, 2]",
        '{"path_to_image": "train/patient00001/study1/view1_frontal.jpg"}',
        label_line(1, Edema=0.5),
        label_line(1, path_to_image="a.jpg"),
        label_line(1)[:-3],
    ],
)
def test_plus_names_the_broken_line_of_the_labels(tmp_path, line):
    config = plus(tmp_path, plus_row(1), labels=[label_line(1), line])
    with pytest.raises(
        UserError, match=r"broken labels: .*impression_fixed.json: line 2: expected"
    ):
        chexpert_plus.list_items(config)
