import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.images import decode
from medsyn_jax.data.sources.ingestion import ingest
from medsyn_jax.data.store import schema, shards, splits, writer
from tests.data.conftest import write_set


def test_records_come_back_as_they_went_in(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    found = {}
    for split, part in shards.describe(directory)["splits"].items():
        if not part["records"]:
            continue
        data = shards.open_split(directory, split)
        assert len(data) == part["records"]
        assert data.keys == [data[i]["key"] for i in range(len(data))]
        found |= {data[i]["key"]: data[i] for i in range(len(data))}
    assert sorted(found) == [f"img/{i:03d}.png" for i in range(24)]
    assert shards.open_split(directory, "train").label_names == ["odd"]
    for i in range(24):
        record = found[f"img/{i:03d}.png"]
        with Image.open(Path(config.path).parent / record["key"]) as stored:
            np.testing.assert_array_equal(record["image"], np.asarray(stored))
        assert record["image"].dtype == np.uint8
        assert record["labels"].tolist() == [i % 2]
        assert record["labels"].dtype == np.int8
        assert record["subject"] == f"p{i // 2}"
        assert record["findings"] == f"The lungs of number {i} are clear."
        assert record["impression"] == f"No finding {i}."
        assert record["report"].startswith("FINDINGS: ")
        assert record["view"] == ""
    by_split = {s: shards.open_split(directory, s).subjects() for s in ("train", "valid", "test")}
    assert not set(by_split["train"]) & {*by_split["valid"], *by_split["test"]}
    texts = shards.open_split(directory, "train").texts(("impression",))
    assert texts[0].startswith("No finding ")


def test_masks_and_boxes_come_back(tmp_path):
    mask = np.zeros((8, 8), np.uint8)
    mask[2:4] = 255
    example = {name: name for name in schema.TEXTS} | {
        "image": decode.encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8)),
        "labels": np.array([1, -1, -2], np.int8),
        "mask_lungs": decode.encode_png(mask),
        "boxes": [
            {"bbox": np.array([1, 2, 3.5, 4], np.float32), "label": "nodule"},
            {"bbox": np.array([0, 0, 8, 8], np.float32), "label": "edema"},
        ],
    }
    names = ["a", "b", "c"]
    records = [example, example | {"key": "other", "boxes": []}]
    directory = tmp_path / "set"
    (written,) = write_set(directory, {"train": records}, names)
    assert written.optional == ["boxes", "mask_lungs"]
    assert writer.finished(directory / written.name) == written
    data = shards.open_split(directory, "train")
    np.testing.assert_array_equal(data[0]["mask_lungs"], mask)
    assert data[0]["labels"].tolist() == [1, -1, -2]
    assert [box["label"] for box in data[0]["boxes"]] == ["nodule", "edema"]
    np.testing.assert_array_equal(data[0]["boxes"][0]["bbox"], [1, 2, 3.5, 4])
    assert data[1]["boxes"] == []
    unlike = {k: v for k, v in example.items() if k != "boxes"}
    with pytest.raises(ValueError, match="those before have"):
        writer.write_shard(tmp_path / "y", [example, unlike], names)
    assert not (tmp_path / "y").exists()


def test_tfds_reads_the_set_without_this_package_or_tensorflow(make_pairs, tmp_path):
    directory = ingest(make_pairs(), tmp_path / "out")
    program = f"""
import sys, warnings
warnings.simplefilter("error")
import tensorflow_datasets as tfds
source = tfds.builder_from_directory({str(directory)!r}).as_data_source(split="train")
record = source[0]
assert record["image"].shape == (16, 16, 1) and record["labels"].shape == (1,), record
assert "tensorflow" not in sys.modules and "medsyn_jax" not in sys.modules
print(len(source), record["key"].decode())
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    data = shards.open_split(directory, "train")
    assert run.stdout.split() == [str(len(data)), data.keys[0]]


def test_a_shard_damaged_inside_is_told_when_it_is_read(make_pairs, tmp_path):
    directory = ingest(make_pairs(records_per_shard=100), tmp_path / "out")
    victim = next(directory.glob("*train*"))
    size = victim.stat().st_size
    victim.write_bytes(bytes(size))
    data = shards.open_split(directory, "train")
    with pytest.raises(UserError, match="record 0 of train cannot be read"):
        data[0]


def test_directories_that_hold_no_data_are_told(make_pairs, tmp_path):
    with pytest.raises(UserError, match="nothing: holds no data set"):
        shards.open_split(tmp_path / "nothing", "train")
    directory = ingest(make_pairs(), tmp_path / "out")
    info = directory / "medsyn.json"
    text = info.read_text()
    info.write_text(text[:100])
    with pytest.raises(UserError, match="is not valid JSON"):
        shards.describe(directory)
    info.write_text(text.replace('"format": 1', '"format": 99'))
    with pytest.raises(UserError, match="has format 99"):
        shards.describe(directory)
    info.unlink()
    with pytest.raises(UserError, match=r"has no medsyn\.json"):
        shards.describe(directory)


def test_a_changed_split_file_is_refused(make_pairs, tmp_path):
    directory = ingest(make_pairs(), tmp_path / "out")
    path = directory / "splits" / "train.txt"
    path.write_text(path.read_text().replace("img/00", "img/90"))
    with pytest.raises(UserError, match=r"train\.txt: was changed"):
        _ = shards.open_split(directory, "train").keys


def _edit(directory: Path, name: str, edit) -> None:
    path = directory / name
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def _set(*path, to):
    """An edit that replaces one value of a JSON tree."""

    def edit(tree):
        inside = tree
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = to
        return tree

    return edit


FEATURES = ("featuresDict", "features")
DAMAGE = [
    ("features.json", _set(*FEATURES, "labels", to=None), "features.json: has other fields"),
    ("features.json", _set(*FEATURES, "mask_x", to={}), "features.json: has other fields"),
    ("features.json", _set(*FEATURES, "other", to={}), "features.json: has other fields"),
    ("features.json", lambda tree: [], "features.json: holds no JSON object"),
    ("dataset_info.json", _set("splits", 0, "shardLengths", 0, to="4"), "has other splits"),
    ("dataset_info.json", _set("splits", 0, to=3), "has other splits"),
    ("dataset_info.json", _set("fileFormat", to="tfrecord"), "fileFormat"),
    ("dataset_info.json", _set("version", to=[]), "version"),
    ("medsyn.json", _set("label_names", to=["even"]), "features.json: has other .*label names"),
    ("medsyn.json", _set("label_names", to=[7]), "medsyn.json: label_names: is not as"),
    ("medsyn.json", _set("files", to=[]), "medsyn.json: files: is not as"),
    ("medsyn.json", _set("splits", "train", "records", to=1), "medsyn.json: splits, files"),
    ("medsyn.json", _set("splits", "train", to="x"), "medsyn.json: splits: is not as"),
    ("medsyn.json", _set("left_out", to={"x": "y"}), "medsyn.json: left_out: is not as"),
    ("medsyn.json", lambda tree: {**tree, "fingerprint": None}, "fingerprint: is not as"),
    ("medsyn.json", lambda tree: "x", "medsyn.json: holds no JSON object"),
]


@pytest.mark.parametrize(("name", "edit", "told"), DAMAGE)
def test_files_that_describe_a_set_otherwise_are_told_and_mended(
    make_pairs, tmp_path, name, edit, told
):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    sound = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    _edit(directory, name, edit)
    with pytest.raises(UserError, match=told) as raised:
        shards.open_split(directory, "train")
    assert "\n" not in str(raised.value)
    ingest(config, directory)
    assert {path: path.read_bytes() for path in sound} == sound


@pytest.mark.parametrize("deep", ["[" * 100_000, "{", "\udcff"])
@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "medsyn.json", "plan.json"])
def test_a_file_that_is_no_json_is_mended(make_pairs, tmp_path, name, deep):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    sound = (directory / name).read_bytes()
    (directory / name).write_bytes(deep.encode("utf-8", "surrogateescape"))
    if name != "plan.json":
        with pytest.raises(UserError, match=f"{name}: is not valid JSON"):
            shards.describe(directory)
    ingest(config, directory)
    assert (directory / name).read_bytes() == sound


def test_ingestion_mends_lists_of_keys_rejects_and_notes(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    sound = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    note = next((directory / "parts").glob("*train*-of-?????.json"))
    other = json.loads(note.read_text())
    for path, text in (
        (directory / "splits" / "train.txt", "img/000.png\nextra\n"),
        (directory / "rejects.csv", ""),
        (note, "[]"),
        (note, json.dumps(other | {"keys": other["keys"][1:]})),
        (note, json.dumps(other | {"keys": [*other["keys"][:-1], "img/999.png"]})),
        (note, json.dumps(other | {"optional": ["boxes"]})),
        (note, json.dumps(other | {"payload": "many"})),
    ):
        path.write_text(text)
        ingest(config, directory)
        assert {p: p.read_bytes() for p in sound} == sound


def test_a_set_whose_plan_and_description_are_both_damaged_is_refused(make_pairs, tmp_path):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    (directory / "plan.json").write_text('{"fingerprint": 3}')
    (directory / "medsyn.json").write_text("")
    with pytest.raises(UserError, match=r"plan\.json: is damaged, so that nobody can tell"):
        ingest(config, directory)


def test_a_shard_of_another_split_is_told_when_it_is_read(make_pairs, tmp_path):
    directory = ingest(make_pairs(records_per_shard=100), tmp_path / "out")
    train, test = (next(directory.glob(f"*{split}.array*")) for split in ("train", "test"))
    assert train.stat().st_size == test.stat().st_size, "ArrayRecord pads its files"
    train.write_bytes(test.read_bytes())
    with pytest.raises(UserError, match="record 0 of train cannot be read"):
        shards.open_split(directory, "train")[0]


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_of_rejects_that_is_none_is_told_before_any_work(make_pairs, tmp_path, share):
    with pytest.raises(UserError, match=r"max_reject_share: .*give a share from 0 to 1"):
        ingest(make_pairs(max_reject_share=share), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without_subjects(directory: Path) -> None:
    """The set as earlier versions wrote it."""

    def edit(info):
        del info["settings"]["records_version"]
        for part in info["splits"].values():
            del part["subjects"]
        return info

    _edit(directory, "medsyn.json", edit)
    for path in (directory / "splits").glob("*.subjects.txt"):
        path.unlink()


def test_subjects_are_read_without_the_records(make_pairs, tmp_path, monkeypatch):
    directory = ingest(make_pairs(), tmp_path / "out")
    opened = {s: shards.open_split(directory, s) for s in ("train", "valid", "test")}
    stored = {s: [r[i]["subject"] for i in range(len(r))] for s, r in opened.items()}
    for path in directory.glob("*.array_record-*"):
        path.unlink()
    assert {split: records.subjects() for split, records in opened.items()} == stored


def test_sets_of_earlier_versions_have_their_subjects_in_the_records(make_pairs, tmp_path):
    directory = ingest(make_pairs(), tmp_path / "out")
    subjects = shards.open_split(directory, "train").subjects()
    without_subjects(directory)
    assert shards.open_split(directory, "train").subjects() == subjects


@pytest.mark.parametrize("damage", ["missing", "changed", "unnamed"])
def test_a_damaged_file_of_subjects_is_told_and_mended_without_reading_images(
    make_pairs, tmp_path, damage
):
    config = make_pairs()
    directory = ingest(config, tmp_path / "out")
    sound = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    path = directory / "splits" / "train.subjects.txt"
    times = {p: p.stat().st_mtime_ns for p in directory.glob("*.array_record-*")}
    if damage == "unnamed":
        _edit(directory, "medsyn.json", lambda tree: _removed(tree, "splits", "train", "subjects"))
    elif damage == "missing":
        path.unlink()
    else:
        path.write_text(path.read_text().replace("p1", "p2"))
    if damage != "unnamed":
        with pytest.raises(UserError, match=r"train\.subjects\.txt: (cannot be read|was changed)"):
            shards.open_split(directory, "train").subjects()
    ingest(config, directory)
    assert {path: path.read_bytes() for path in sound} == sound
    assert {p: p.stat().st_mtime_ns for p in directory.glob("*.array_record-*")} == times


def _removed(tree, *path):
    inside = tree
    for key in path[:-1]:
        inside = inside[key]
    del inside[path[-1]]
    return tree


def test_subjects_of_any_letters_stay_apart(tmp_path):
    subjects = ["p 1", "Müller", "a\nb", "a\u2028b", "a\\nb", "a\\", "ä\x85", "\x1c", "胸部", ""]
    sha256 = splits.write_subjects(tmp_path / "s.txt", subjects)
    assert splits.read_subjects(tmp_path / "s.txt", sha256) == subjects
    assert (tmp_path / "s.txt").read_text().count("\n") == len(subjects)
