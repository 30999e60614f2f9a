"""Label fractions that hold a positive record for each seed."""

import numpy as np
import pytest

from configs.detect import get_config
from medsyn_jax.core.errors import UserError
from medsyn_jax.data.store import splits
from medsyn_jax.train import fractions

KEYS = [f"k{i}" for i in range(40)]
SUBJECTS = np.array([f"s{i // 2}" for i in range(40)])


def config_of(*shares):
    config = get_config("smoke")
    config.fractions = shares
    return config


def test_whole_subjects_are_drawn_and_those_with_a_positive_in_proportion(tmp_path):
    positive = np.arange(40) < 9  # 5 of 20 subjects
    rows = fractions.with_positives(config_of(0.2, 1.0), tmp_path, KEYS, SUBJECTS, positive, "box")
    assert list(rows) == ["20%", "100%"]
    for row in rows["20%"]:
        assert len(row) == 8
        assert sorted(row[::2] + 1) == sorted(row[1::2])  # both records of each subject
        assert len({r // 2 for r in row.tolist()} & set(range(5))) == 1
    assert rows["20%"][0].tolist() != rows["20%"][1].tolist()


def test_a_fraction_without_a_positive_is_left_out_and_said(tmp_path, capsys):
    positive = np.arange(40) < 2
    splits.write_fraction(tmp_path / "fractions" / "50%-seed1.txt", KEYS[20:])
    rows = fractions.with_positives(config_of(0.5, 1.0), tmp_path, KEYS, SUBJECTS, positive, "box")
    assert list(rows) == ["100%"]
    assert (
        "50% of the labels: no figure: the images of seed 1 have no box" in capsys.readouterr().err
    )
    with pytest.raises(
        UserError, match=r"config.fractions: \(0.5,\): none has an image with a box"
    ):
        fractions.with_positives(config_of(0.5), tmp_path, KEYS, SUBJECTS, positive, "box")
