"""Published split lists: what a name may mean, and what a list does to an ingestion."""

import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.sources import ingestion, names, plan
from medsyn_jax.data.store import shards
from medsyn_jax.data.store.items import Item

SPLITS = ("train", "valid", "test")


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def homes(plan_) -> dict[str, str]:
    return {item.key: part.split for part in plan_.parts for item in part.items}


def test_a_record_is_named_by_key_file_name_or_stem():
    keys_of = names.lookup([("a/1.png", "/x/a/1.png"), ("a/b 1.png", ""), ("a/1", "/x/1.dcm")])
    assert keys_of("a/1.png") == ["a/1.png"]
    assert keys_of("1.png") == ["a/1.png"]
    assert keys_of("1.dcm") == ["a/1"]
    assert keys_of("a/1") == ["a/1"]  # a key comes before a path without its suffix
    assert keys_of("1") == ["a/1.png", "a/1"]
    assert keys_of("b 1") == []
    assert keys_of("/x/a/1.png") == []
    assert names.lookup([("a/b%201.png", "a/b 1.png")])("b 1") == ["a/b%201.png"]


def test_a_table_of_images_a_table_of_patients_and_a_folder_give_one_split(make_pairs, tmp_path):
    config = make_pairs(count=12)
    split_of = [SPLITS[i // 2 % 3] for i in range(12)]
    rows = [f"{i:03d}.png,{split_of[i].upper()}" for i in range(12)]
    config.splits = str(write(tmp_path / "images.csv", "image,split", *rows))
    first = plan.make_plan(config)
    assert homes(first) == {f"img/{i:03d}.png": split_of[i] for i in range(12)}
    patients = [f"p{i},{SPLITS[i % 3]}" for i in range(6)]
    config.splits = str(write(tmp_path / "patients.csv", "patient,split", *patients))
    assert homes(plan.make_plan(config)) == homes(first)
    for name, split in zip(("train", "val", "test"), SPLITS, strict=True):
        write(
            tmp_path / f"list/{name}.txt", *(f"{i:03d}" for i in range(12) if split_of[i] == split)
        )
    config.splits = str(tmp_path / "list")
    assert homes(plan.make_plan(config)) == homes(first)
    for split in SPLITS:
        write(tmp_path / f"who/{split}.txt", *(f"p{i}" for i in range(6) if SPLITS[i % 3] == split))
    config.splits = str(tmp_path / "who")
    assert homes(plan.make_plan(config)) == homes(first)


def test_the_content_of_a_list_names_the_set_and_its_place_does_not(make_pairs, tmp_path):
    config = make_pairs(count=6)
    rows = ["img/000.png,train", "img/001.png,train", "img/002.png,test", "img/003.png,test"]
    rows += ["img/004.png,valid", "img/005.png,valid"]
    without = plan.make_plan(config).fingerprint
    config.splits = str(write(tmp_path / "a.csv", "image,split", *rows))
    first = plan.make_plan(config).fingerprint
    config.splits = str(write(tmp_path / "moved/b.csv", "split,image", *(
        ",".join(reversed(row.split(","))) for row in reversed(rows)
    )))  # fmt: skip
    assert plan.make_plan(config).fingerprint == first != without
    # The other subjects' places change, and nothing else.
    rows[2:] = ["img/002.png,valid", "img/003.png,valid", "img/004.png,test", "img/005.png,test"]
    config.splits = str(write(tmp_path / "a.csv", "image,split", *rows))
    assert plan.make_plan(config).fingerprint not in (first, without)
    config.splits = ""
    assert plan.make_plan(config).fingerprint == without


def test_names_without_a_record_and_records_without_a_name_are_counted(
    make_pairs, tmp_path, capsys
):
    config = make_pairs(count=12)
    rows = [f"p{i},{('train', 'valid', 'test')[i % 3]}" for i in range(3)]
    config.splits = str(write(tmp_path / "s.csv", "patient,split", *rows, "p90,train", "p91,test"))
    out = ingestion.ingest(config, tmp_path / "out")
    said = capsys.readouterr().err
    assert "s.csv: 2 of 5 names are no record or subject of the source, or a rejected one" in said
    assert "such as p90" in said
    assert "s.csv: 6 of 12 records are not in it and so left out, such as img/006.png" in said
    info = shards.describe(out)
    assert {split: part["records"] for split, part in info["splits"].items()} == {
        "train": 2,
        "valid": 2,
        "test": 2,
    }
    assert info["left_out"] == {names.NOT_IN_LIST: 6}
    assert info["settings"]["splits"] == names.read_split_list(tmp_path / "s.csv").sha256


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["image,split", "other/1.png,train", "other/2.png,test"],
            r"s\.csv: none of its 2 names is a record or subject of this source; the first name is "
            r"other/1\.png, and the first record is img/000\.png of subject p0",
        ),
        (["image,split", "000.png,train", "000.png,test"], r"row 3: 000\.png is in train, too"),
        (["image,split", "000.png,train", "000,test"], r"record img/000\.png is in train and in"),
        (["image,split", "000.png,first"], r"row 2: 'first': use train, valid or test"),
        (["image,split", ",train"], "row 2: there is no name"),
        (["image,split"], "names nothing"),
        (["image,part", "000.png,train"], "no column 'split' among: image, part"),
        (["file,split", "000.png,train"], "no column key, image, subject or patient among: file,"),
        (["image,split", "000.png,train", "001.png,test"], "split: subject p0 is in train"),
    ],
)
def test_a_list_that_cannot_be_followed_is_said_in_one_line(make_pairs, tmp_path, lines, message):
    config = make_pairs(count=4)
    config.splits = str(write(tmp_path / "s.csv", *lines))
    with pytest.raises(UserError, match=message) as caught:
        plan.make_plan(config)
    assert "\n" not in str(caught.value)


def test_a_name_of_several_records_is_refused(tmp_path):
    path = write(tmp_path / "s.csv", "image,split", "1,train")
    items = [Item("a/1.png", "a", None, "a/1.png"), Item("b/1.png", "b", None, "b/1.png")]
    with pytest.raises(UserError, match=r"s\.csv: 1 may be a/1\.png and b/1\.png: list the keys"):
        names.read_split_list(path).assign(items)


def test_folders_and_files_that_are_no_list(tmp_path):
    with pytest.raises(UserError, match=r"gone\.csv does not exist"):
        names.read_split_list(tmp_path / "gone.csv")
    with pytest.raises(UserError, match=r"unreadable table: .*null byte: check the file"):
        names.read_split_list(tmp_path / "\0")
    write(tmp_path / "none/readme.txt", "train")
    with pytest.raises(UserError, match="none: names nothing: give a CSV"):
        names.read_split_list(tmp_path / "none")
    write(tmp_path / "twice/train_1.txt", "a")
    write(tmp_path / "twice/train_10.txt", "a", "b")
    with pytest.raises(
        UserError, match=r"two files of one split among train_1\.txt, train_10\.txt"
    ):
        names.read_split_list(tmp_path / "twice")
    write(tmp_path / "latin/train.txt").write_bytes(b"\xd6dem\n")
    with pytest.raises(UserError, match=r"train\.txt: cannot be read as UTF-8 text"):
        names.read_split_list(tmp_path / "latin")


def test_the_splits_of_another_set_are_a_list(make_pairs, tmp_path):
    config = make_pairs(count=24)
    out = ingestion.ingest(config, tmp_path / "out")
    before = homes(plan.make_plan(config))
    config.seed = 3
    assert homes(plan.make_plan(config)) != before
    config.splits = str(out / "splits")
    assert homes(plan.make_plan(config)) == before
