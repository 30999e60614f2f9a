"""The sentences at the head of a study: a win, a loss, a tie, and a start that is not beaten."""

import pytest

from medsyn_jax.tables import summary
from medsyn_jax.tables.cells import Cell, Part

VALUES = {"real": 0.8, "synthetic": 0.8, "mixed": 0.8, "duplicated": 0.8, "random": 0.6}
NOISE = (-0.01, 0.0, 0.01)


def part(seeds=3, source="", fraction=1.0, **values) -> Part:
    """A task whose arms have these values, and the same noise about them; one with the name ARM_
    has that noise turned round, so that its differences are wide."""
    entries = {}
    for seed in range(seeds):
        for arm, value in (VALUES | values).items():
            if value is None:
                continue
            wide = isinstance(value, str)
            noise = NOISE[seed] * (-5 if wide else 1)
            method = "none" if arm == "random" else "convirt"
            entry = {"metric": "map", "metrics": {"map": {"value": float(value) + noise}}}
            entries[Cell(method, arm, "detect", fraction, seed)] = entry | {"source": source}
    return Part("detect", entries)


def said(*parts: Part) -> str:
    return " ".join(summary.sentences(parts))


@pytest.mark.parametrize(
    ("synthetic", "words"),
    [
        (0.85, r"convirt +0.050 [+0.050, +0.050] (synthetic images do better)"),
        (0.75, r"convirt -0.050 [-0.050, -0.050] (synthetic images do worse)"),
        ("0.81", r"convirt +0.010 [-0.139, +0.159] (a tie)"),
    ],
)
def test_a_win_a_loss_and_a_tie(synthetic, words):
    assert f"detect, 100 % of the labels. Synthetic minus real: {words}." in said(
        part(synthetic=synthetic)
    )


@pytest.mark.parametrize(
    ("mixed", "words"),
    [
        (0.9, "(mixing gains more than the real set twice)"),
        (0.7, "(mixing gains less than the real set twice)"),
        ("0.8", "(a tie)"),
    ],
)
def test_what_mixing_gains_is_that_over_the_duplicated_real_set(mixed, words):
    text = said(part(mixed=mixed, real=0.5, synthetic=None))
    assert "minus real" not in text
    assert (
        text.partition("Mixed minus duplicated: convirt ")[2].split("]")[1].startswith(f" {words}.")
    )


def test_an_untrained_start_that_is_not_beaten_is_named():
    text = said(part(random=0.9))
    assert (
        "None of the 4 pre-trained encoders beats the untrained start, so that a comparison of "
        "their arms means little." in text
    )
    some = said(part(synthetic=0.5, mixed="0.62"))
    assert (
        "2 of 4 pre-trained encoders beat the untrained start (not convirt, synthetic; convirt, "
        "mixed)." in some
    )
    assert "4 of 4 pre-trained encoders beat the untrained start." in said(part())
    assert "untrained start" not in said(part(random=None))


def test_one_seed_says_nothing_of_chance():
    text = said(part(seeds=1, synthetic=0.9))
    assert "Synthetic minus real: convirt +0.100 (no interval)." in text
    assert "One seed gives no interval" in text
    assert "beat" not in text
    assert "3 seeds are few: a tie " in said(part())


def test_the_phantom_is_named_where_all_cells_say_so():
    phantom, mimic = part(source="phantom"), part(source="mimic_cxr")
    assert "those of the phantom" in said(phantom)
    for parts in ((mimic,), (part(),), (phantom, mimic)):
        assert "phantom" not in said(*parts)


def test_the_most_labels_are_spoken_of_and_a_lone_arm_is_not_compared():
    assert "detect, 10 % of the labels. Too few cells" in said(
        part(fraction=0.1, synthetic=None, mixed=None, random=None)
    )
