import hashlib
from itertools import pairwise

import numpy as np
import pytest

from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import splits

SHARES = (0.8, 0.1, 0.1)


def records(subjects, split=None, studies=2):
    return [(f"{s}/{i}", str(s), split) for s in subjects for i in range(studies)]


def test_subjects_stay_together_in_about_the_shares_asked_for():
    homes = splits.assign(records(range(2000)), SHARES, seed=0)
    assert len(homes) == 4000
    for subject in range(2000):
        assert homes[f"{subject}/0"] == homes[f"{subject}/1"]
    share = np.mean([home == "train" for home in homes.values()])
    # Five standard deviations of a binomial with 2000 draws.
    assert abs(share - 0.8) < 5 * (0.8 * 0.2 / 2000) ** 0.5
    assert set(homes.values()) == {"train", "valid", "test"}


def test_more_records_move_nobody_and_another_seed_does():
    few = splits.assign(records(range(300)), SHARES, seed=3)
    many = splits.assign(list(reversed(records(range(900)))), SHARES, seed=3)
    assert few == {key: many[key] for key in few}
    assert few != splits.assign(records(range(300)), SHARES, seed=4)


def test_shares_of_nothing_and_of_everything():
    assert set(splits.assign(records(range(50)), (1, 0, 0), 0).values()) == {"train"}
    assert set(splits.assign(records(range(50)), (0, 0, 1), 0).values()) == {"test"}


def test_given_splits_are_kept_under_all_their_usual_names():
    given = [
        ("a", "1", "Training"),
        ("b", "2", "validate"),
        ("c", "3", "val"),
        ("d", "4", "test"),
        ("e", "5", "validation"),
    ]
    assert splits.assign(given, SHARES, 0) == {
        "a": "train",
        "b": "valid",
        "c": "valid",
        "d": "test",
        "e": "valid",
    }


@pytest.mark.parametrize(("has", "lacks"), [("test", "valid"), ("valid", "test")])
def test_a_split_that_the_source_lacks_comes_out_of_train(has, lacks):
    """CheXpert Plus has train and valid alone."""
    given = records(range(1000), "train") + records(range(1000, 1100), has)
    homes = splits.assign(given, SHARES, 0)
    assert all(homes[f"{s}/0"] == homes[f"{s}/1"] for s in range(1100))
    assert all((homes[f"{s}/0"] == has) == (s >= 1000) for s in range(1100))
    share = np.mean([homes[f"{s}/0"] == lacks for s in range(1000)])
    assert abs(share - 1 / 9) < 5 * (1 / 9 * 8 / 9 / 1000) ** 0.5
    (said,) = splits.remarks(given, homes)
    drawn = round(1000 * share)
    assert said.startswith(f"the source has no {lacks} split: {drawn} subjects of train with ")
    more = splits.assign(given + records(range(2000, 2300), "train"), SHARES, 0)
    assert homes == {key: more[key] for key in homes}


def test_a_subject_in_two_splits_is_refused_by_name():
    given = [("a", "7", "train"), ("b", "8", "test"), ("c", "7", "test")]
    with pytest.raises(
        UserError, match=r"subject 7 is in train \(record a\) and in test \(record c"
    ):
        splits.assign(given, SHARES, 0)


def test_splits_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="record b has none while 1 others"):
        splits.assign([("a", "1", "train"), ("b", "2", "")], SHARES, 0)
    with pytest.raises(UserError, match="'holdout' of record a"):
        splits.assign([("a", "1", "holdout")], SHARES, 0)
    for shares in ((0.8, 0.1), (0.8, 0.1, 0.2), (1.2, -0.1, -0.1)):
        with pytest.raises(UserError, match="split_shares"):
            splits.assign(records(range(3)), shares, 0)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fractions_of_classes_are_nested_and_stratified(seed):
    keys = [f"k{i}" for i in range(1000)]
    labels = np.array([0] * 900 + [1] * 95 + [2] * 5)
    one, ten, all_of_them = (
        splits.fraction(keys, keys, labels, share, seed) for share in (0.01, 0.1, 1.0)
    )
    assert set(one) <= set(ten)
    assert all_of_them == keys
    by_key = dict(zip(keys, labels.tolist(), strict=True))
    counts = np.bincount([by_key[k] for k in ten])
    assert counts.sum() == 100
    assert np.abs(counts - [90, 9.5, 0.5]).max() <= 1
    assert np.bincount([by_key[k] for k in one]).tolist() == [8, 1, 1]
    assert one == sorted(one, key=keys.index)


@pytest.mark.parametrize("seed", range(5))
def test_fractions_of_several_labels_keep_subjects_whole_and_both_classes_of_each(seed):
    """600 subjects of two records; a label of 3 subjects, one of which lacks the commonest."""
    rng = np.random.default_rng(seed)
    subjects = [f"s{i // 2}" for i in range(1200)]
    keys = [f"k{i}" for i in range(1200)]
    labels = (rng.random((1200, 5)) < [0.5, 0.2, 0.05, 0.0, 0.0]).astype(np.int8)
    labels[rng.random(labels.shape) < 0.1] = -2
    labels[:6, 3] = 1
    labels[:, 4] = 1
    labels[17, 4] = 0  # the only negative
    drawn = [splits.fraction(keys, subjects, labels, x, seed) for x in (0.01, 0.02, 0.1, 0.5)]
    for smaller, larger in pairwise(drawn):
        assert set(smaller) < set(larger)
    for share, chosen in zip((0.01, 0.02, 0.1, 0.5), drawn, strict=True):
        rows = [int(key[1:]) for key in chosen]
        assert len(rows) == 1200 * share
        assert {r ^ 1 for r in rows} == set(rows)  # the other record of each subject
        y = labels[rows]
        assert ((y == 1).any(axis=0) & (y == 0).any(axis=0)).all()
    y = labels[[int(key[1:]) for key in drawn[2]]]
    expected = 0.1 * (labels == 1).sum(axis=0)
    np.testing.assert_allclose((y == 1).sum(axis=0)[:3], expected[:3], rtol=0.25, atol=3)


def test_a_fraction_depends_on_seed_and_keys_alone():
    keys, none = [f"k{i}" for i in range(200)], np.zeros((200, 0), np.int8)
    first = splits.fraction(keys, keys, none, 0.1, 0)
    splits.fraction(keys, keys, none, 0.5, 9)
    assert splits.fraction(keys, keys, none, 0.1, 0) == first
    assert set(splits.fraction(keys[::-1], keys[::-1], none, 0.1, 0)) == set(first)
    assert splits.fraction(keys, keys, none, 0.1, 1) != first
    assert len(first) == 20


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_fraction_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match="label fraction"):
        splits.fraction(["a"], ["a"], np.zeros((1, 0), np.int8), share, 0)


def test_key_files_carry_their_hash(tmp_path):
    path = tmp_path / "splits" / "train.txt"
    sha256 = splits.write_keys(path, ["a/1", "b/2"])
    assert sha256 == hashlib.sha256(b"a/1\nb/2\n").hexdigest()
    assert splits.read_keys(path, sha256) == ["a/1", "b/2"]
    assert [file.name for file in path.parent.iterdir()] == ["train.txt"]
    path.write_text("a/1\n")
    with pytest.raises(UserError, match=r"train\.txt: was changed"):
        splits.read_keys(path, sha256)
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        splits.read_keys(tmp_path / "none.txt")


def test_valid_and_test_both_come_out_of_train_in_their_shares():
    given = records(range(3000), "TRAIN")
    homes = splits.assign(given, (0.5, 0.2, 0.3), 0)
    assert all(homes[f"{s}/0"] == homes[f"{s}/1"] for s in range(3000))
    for name, share in (("train", 0.5), ("valid", 0.2), ("test", 0.3)):
        part = np.mean([home == name for home in homes.values()])
        assert abs(part - share) < 5 * (share * (1 - share) / 3000) ** 0.5
    assert [line.split(":")[0] for line in splits.remarks(given, homes)] == [
        "the source has no valid split",
        "the source has no test split",
    ]


@pytest.mark.parametrize(
    ("split", "shares", "empty"),
    [
        ("test", SHARES, ["train", "valid"]),
        ("valid", SHARES, ["train", "test"]),
        ("train", (0.9, 0.1, 0), ["test"]),
        (None, (0.9, 0, 0.1), ["valid"]),
    ],
)
def test_empty_splits_are_said(split, shares, empty):
    given = records(range(200), split)
    said = splits.remarks(given, splits.assign(given, shares, 0))
    (line,) = [line for line in said if "has no" not in line]  # those are drawn
    assert line.startswith(f"no record is in {', '.join(empty)}: ")
    assert ("add records to the source" in line) == (split in ("test", "valid"))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(
            (text, "train")
            for text in (
                "train",
                "Train",
                "TRAINING",
                "train_set",
                "trainset",
                "01_train",
                "train2017",
                "xray_train",
            )
        ),
        *((text, "valid") for text in ("val", "VALID", "Validate", "validation set", "dev")),
        *(
            (text, "test")
            for text in (
                "Test",
                "testing",
                "TEST-DATA",
                " test ",
                "test_images",
                "data_test",
                "test 1",
            )
        ),
        *(
            (text, None)
            for text in ("", "tests2", "NORMAL", "trained", "values", "contest", "tes", "1" * 99)
        ),
    ],
)
def test_names_of_splits(name, split):
    assert splits.split_name(name) == split


@pytest.mark.parametrize(
    "shares",
    [
        ("80%", "10%", "10%"),
        ("most", "some", "some"),
        (float("nan"), 0.5, 0.5),
        (float("inf"), 0, 0),
        (float("inf"), float("-inf"), 1),
        (0.5, 0.5),
        (0.25,) * 4,
        (),
        0.8,
        None,
        (None, 0.5, 0.5),
        ((0.8,), 0.1, 0.1),
    ],
)
def test_shares_that_are_none(shares):
    with pytest.raises(UserError, match=r"split_shares: .*: give train, valid and test, adding"):
        splits.assign(records(range(3)), shares, 0)
