import csv
import gzip
import json

import numpy as np
import pytest
from PIL import Image

from configs.ingest import get_config
from medsyn_jax import main
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.loading import loader
from medsyn_jax.data.sources import pairs
from medsyn_jax.data.store import shards
from medsyn_jax.data.text import tokenizers


def test_the_command_leaves_shards_and_a_summary(tmp_path, capsys):
    config = get_config("smoke")
    main.run(config, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["task"] == "ingest"
    info = shards.describe(tmp_path / "shards")
    for split, part in info["splits"].items():
        assert results["metrics"][f"records/{split}"]["value"] == part["records"]
    assert sum(m["value"] for m in results["metrics"].values()) == 40
    assert results["metrics"]["left_out"]["n"] == 40
    printed = capsys.readouterr()
    assert info["fingerprint"] in printed.err
    assert info["splits"]["train"]["sha256"] in printed.err
    assert "records/train" in printed.out
    assert json.loads((tmp_path / "config.json").read_text())["config"]["task"] == "ingest"
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*train*")}
    main.run(config, tmp_path)
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "shards").glob("*train*")}


def test_what_it_leaves_can_be_loaded(tmp_path):
    main.run(get_config("smoke"), tmp_path)
    data = shards.open_split(tmp_path / "shards", "train")
    sections = ("findings", "impression")
    tokenizer = tokenizers.train_wordpiece(data.texts(sections), 300, tmp_path / "tokenizer")
    source = loader.Source(tmp_path / "shards", "train", sections, tokenizer, 24, 32)
    batch = next(loader.train_loader([source], [1.0], 8, seed=0))
    assert batch["image"].shape == (8, 32, 32)
    assert batch["image"].std() > 10


@pytest.mark.parametrize(
    ("variant", "source", "size"),
    [
        ("demo", "phantom", 64),
        ("smoke", "phantom", 32),
        ("paper", "mimic_cxr", 256),
        ("pairs", "pairs", 256),
        ("folder", "folder", 256),
    ],
)
def test_variants(variant, source, size):
    config = get_config(variant).ingest
    assert (config.source, config.size) == (source, size)


@pytest.mark.parametrize("variant", ["paper", "pairs", "folder"])
def test_a_source_that_is_not_there_is_told_in_one_line(variant, tmp_path):
    config = get_config(variant)
    config.ingest.path = str(tmp_path / "not-here")
    with pytest.raises(UserError, match="not-here") as told:
        main.run(config, tmp_path / "work")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "work" / "shards").exists()


def packed(path, rows):
    with gzip.open(path, "wt", newline="") as file:
        csv.writer(file).writerows(rows)


def test_the_mimic_cxr_layout_is_ingested(tmp_path):
    root = tmp_path / "mimic"
    names = pairs.MIMIC_LABELS
    studies = [("10000001", "train"), ("10000002", "train"), ("10000003", "validate")]
    studies += [("10000004", "test"), ("10000005", "train")]
    metadata, split, chexpert = [], [], []
    rng = np.random.default_rng(0)
    for i, (subject, part) in enumerate(studies):
        folder = root / "files" / "p10" / f"p{subject}"
        (folder / f"s5{i}").mkdir(parents=True)
        words = "Clear." if i == 4 else "The lungs are clear, the heart is normal."
        (folder / f"s5{i}.txt").write_text(f"FINDINGS:\n {words}\n")
        for dicom, view in ((f"d{i}", "PA"), (f"e{i}", "LATERAL")):
            pixels = rng.integers(0, 256, (40, 30), np.uint8)
            Image.fromarray(pixels).save(folder / f"s5{i}" / f"{dicom}.jpg")
            metadata.append([dicom, subject, f"5{i}", view])
            split.append([dicom, f"5{i}", subject, part])
        chexpert.append([subject, f"5{i}", *["1.0"] * 2, *[""] * (len(names) - 2)])
    table = "mimic-cxr-2.0.0"
    header = ["dicom_id", "subject_id", "study_id", "ViewPosition"]
    packed(root / f"{table}-metadata.csv.gz", [header, *metadata])
    packed(
        root / f"{table}-split.csv.gz", [["dicom_id", "study_id", "subject_id", "split"], *split]
    )
    packed(root / f"{table}-chexpert.csv.gz", [["subject_id", "study_id", *names], *chexpert])
    config = get_config("paper")
    config.ingest.update({"path": str(root), "size": 32, "workers": 1})
    main.run(config, tmp_path / "work")
    results = json.loads((tmp_path / "work" / "results.json").read_text())["metrics"]
    values = {name: metric["value"] for name, metric in results.items()}
    assert values == {
        "records/train": 2,
        "records/valid": 1,
        "records/test": 1,
        "rejects": 0,
        "left_out": 6,  # five lateral views and a report of one word
    }
    record = shards.open_split(tmp_path / "work" / "shards", "valid")[0]
    assert record["subject"] == "10000003"
    assert record["image"].shape == (32, 32)
    assert record["labels"].tolist() == [1, 1] + [-2] * (len(names) - 2)
    assert record["findings"] == "The lungs are clear, the heart is normal."


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant 'huge' is unknown"):
        get_config("huge")


@pytest.mark.parametrize("view", ["Lateral", "PA"])
def test_rejects_are_pointed_to_only_where_there_are_any(tmp_path, capsys, view):
    """Views that are left out stand in no row of rejects.csv."""
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    report = "The lungs are clear today."
    (tmp_path / "t.csv").write_text(
        f"image,report,view\na.png,{report},AP\n./a.png,{report},{view}\n"
    )
    config = get_config("pairs")
    config.ingest.update({"path": str(tmp_path / "t.csv"), "size": 16, "workers": 1})
    config.ingest.update({"max_reject_share": 0.9, "split_shares": (1.0, 0.0, 0.0)})
    config.ingest.pairs.view = "view"
    main.run(config, tmp_path / "run")
    assert ("rejects.csv" in capsys.readouterr().err) == (view == "PA")
