"""Label fractions of whole subjects."""

import numpy as np

from configs.segment import get_config
from medsyn_jax.train.fractions import label_subsets


def test_fractions_of_subjects_are_whole_nested_and_in_proportion(tmp_path):
    config = get_config("smoke")
    subjects = np.repeat([f"p{i:02d}" for i in range(40)], 3)
    keys = [f"{subject}/{i}" for i, subject in enumerate(subjects)]
    positive = np.zeros(120, int)
    positive[0:30:3] = 1  # one record of each of ten subjects
    rows = {
        share: label_subsets(config, tmp_path, share, keys, positive, subjects)
        for share in (0.05, 0.2, 1.0)
    }
    for seed in range(2):
        small, middle, whole = (set(rows[share][seed].tolist()) - {-1} for share in rows)
        assert small < middle < whole == set(range(120))
        # Of 30 negative and 10 positive subjects; 5 % of ten rounds to none, but one is taken.
        for chosen, negatives, positives in ((small, 2, 1), (middle, 6, 2)):
            drawn = {subjects[row] for row in chosen}
            assert len(chosen) == 3 * len(drawn)  # whole subjects
            assert len(drawn) == negatives + positives
            assert sum(subject < "p10" for subject in drawn) == positives
    assert rows[0.05][0].tolist() != rows[0.05][1].tolist()
