"""Label fractions of whole subjects, and those with a positive record for each seed."""

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


def test_fractions_of_subjects_are_whole_nested_and_in_proportion(tmp_path):
    config = config_of()
    subjects = np.repeat([f"p{i:02d}" for i in range(40)], 3)
    keys = [f"{subject}/{i}" for i, subject in enumerate(subjects)]
    positive = np.zeros(120, int)
    positive[0:30:3] = 1  # one record of each of ten subjects
    rows = {
        share: fractions.label_subsets(config, tmp_path, share, keys, positive, subjects)
        for share in (0.05, 0.2, 1.0)
    }
    for seed in range(2):
        small, middle, whole = (set(rows[share][seed].tolist()) - {-1} for share in rows)
        assert small < middle < whole == set(range(120))
        # Of 30 negative and 10 positive subjects: 5 % of 40 are two, of which one is positive.
        for chosen, negatives, positives in ((small, 1, 1), (middle, 6, 2)):
            drawn = {subjects[row] for row in chosen}
            assert len(chosen) == 3 * len(drawn)  # whole subjects
            assert len(drawn) == negatives + positives
            assert sum(subject < "p10" for subject in drawn) == positives
    assert rows[0.05][0].tolist() != rows[0.05][1].tolist()


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
