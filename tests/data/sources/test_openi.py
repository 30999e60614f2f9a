"""Open-i in the layout of the Kaggle set."""

import csv

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax.core.errors import LeftOutRecord, UserError
from medsyn_jax.data.sources import ingestion, openi
from medsyn_jax.data.store import shards

REPORTS = ("uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression")
NOISE = np.random.default_rng(0).integers(0, 255, (24, 20), np.uint8)
TEXTS = {  # uid -> findings, impression
    "1": ("The cardiac silhouette is normal. No XXXX effusion.", "Normal chest x-XXXX."),
    "2": ("", "Borderline cardiomegaly without edema, XXXX."),
    "3": ("", ""),
    "4": ("No disease of the lungs.", "No acute disease."),
}
IMAGES = [  # uid, filename, projection
    ("1", "1_IM-0001-4001.dcm.png", "Frontal"),
    ("1", "1_IM-0001-3001.dcm.png", "Lateral"),
    ("2", "2_IM-0652-1001.dcm.png", "Frontal"),
    ("3", "3_IM-1384-1001.dcm.png", "Frontal"),
]


def table(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


@pytest.fixture
def config(tmp_path):
    root = tmp_path / "openi"
    images = root / "images" / "images_normalized"
    images.mkdir(parents=True)
    for _, name, _ in IMAGES:
        Image.fromarray(NOISE).save(images / name)
    beside = ("normal", "normal", "Xray Chest PA and Lateral", "Positive TB test", "None.")
    table(root / "indiana_reports.csv", REPORTS, [(u, *beside, *t) for u, t in TEXTS.items()])
    table(root / "indiana_projections.csv", ("uid", "filename", "projection"), IMAGES)
    config = get_config("openi").ingest
    config.update({"path": str(root), "size": 16, "workers": 1, "max_reject_share": 0.9})
    return config


def test_images_are_joined_with_their_reports(config):
    listing = openi.list_items(config)
    assert [(item.key, item.subject) for item in listing.items] == [
        ("1_IM-0001-4001.dcm.png", "1"),
        ("2_IM-0652-1001.dcm.png", "2"),
        ("3_IM-1384-1001.dcm.png", "3"),
    ]
    assert listing.dropped == {"not a frontal view": 1}
    assert listing.rejects == []
    assert "1 reports are of no image, such as that of uid 4" in listing.notes
    record = openi.make(listing.items[0], config)
    assert record["findings"] == "The cardiac silhouette is normal. No effusion."
    assert record["impression"].startswith("Normal chest")
    assert "XXXX" not in record["impression"]
    assert record["report"].startswith("FINDINGS: The cardiac silhouette is normal. No XXXX eff")
    assert openi.make(listing.items[1], config)["findings"] == ""
    with pytest.raises(LeftOutRecord, match="too few words"):
        openi.make(listing.items[2], config)
    config.frontal_only = False
    both = openi.list_items(config).items
    assert [item.subject for item in both] == ["1", "1", "2", "3"]
    assert both[0].sections == both[1].sections


def test_a_whole_set_is_stored(config, tmp_path, capsys):
    out = ingestion.ingest(config, tmp_path / "out")
    assert "all images of one report (uid) are one subject" in capsys.readouterr().err
    info = shards.describe(out)
    assert sum(part["records"] for part in info["splits"].values()) == 2
    assert info["left_out"] == {"not a frontal view": 1, "report too short": 1}


def test_missing_images_reports_and_rows_are_said(config, tmp_path):
    images = tmp_path / "openi" / "images" / "images_normalized"
    (images / IMAGES[0][1]).rename(images / "5_IM-0001-4001.dcm.png")
    path = tmp_path / "openi" / "indiana_projections.csv"
    rows = [*IMAGES, ("9", IMAGES[2][1], "Frontal"), ("2", "../../x.png", "Frontal"), ("2",)]
    table(path, ("uid", "filename", "projection"), rows)
    listing = openi.list_items(config)
    assert [item.subject for item in listing.items] == ["2", "3"]
    assert listing.rejects == [
        ("row-2", f"{path}: row 2: '{IMAGES[0][1]}' is not in {images}"),
        ("row-6", f"{path}: row 6: uid '9' has no report"),
        ("row-7", f"{path}: row 7: '../../x.png' is not in {images}"),
        ("row-8", f"{path}: row 8: has 1 fields where the head line has 3"),
    ]
    assert listing.dropped["image in no table"] == 1
    assert any("such as 5_IM-0001-4001.dcm.png" in note for note in listing.notes)


def test_a_report_that_is_listed_twice_is_rejected(config, tmp_path):
    path = tmp_path / "openi" / "indiana_reports.csv"
    rows = [(u, "", "", "", "", "", *t) for u, t in (*TEXTS.items(), ("1", ("Other.", "Other.")))]
    table(path, REPORTS, rows)
    listing = openi.list_items(config)
    assert listing.rejects == [
        ("report-6", f"{path}: row 6: uid '1' is empty or was in a row before")
    ]
    assert listing.items[0].sections[1] == "Normal chest x-XXXX."


@pytest.mark.parametrize("name", ["indiana_reports.csv", "indiana_projections.csv"])
def test_a_missing_or_altered_table_is_named(config, tmp_path, name):
    path = tmp_path / "openi" / name
    table(path, ("uid", "other"), [("1", "2")])
    with pytest.raises(UserError, match=f"missing column: .*{name}"):
        openi.list_items(config)
    path.unlink()
    with pytest.raises(UserError, match=f"no table: .*{name} does not exist"):
        openi.list_items(config)


def test_a_folder_without_images_is_named(config, tmp_path):
    (tmp_path / "openi" / "images").rename(tmp_path / "openi" / "pictures")
    with pytest.raises(UserError, match="holds no folder images/images_normalized"):
        openi.list_items(config)
