"""Fields of a config that cannot be meant, each in one line that names the field."""

import pytest
from ml_collections import ConfigDict

from medsyn_jax.core import config as checks
from medsyn_jax.core.errors import UserError

NUMBERS = [
    ("above_0", 0, "0: give a number above 0"),
    ("above_0", "3", "'3': give a number above 0"),
    ("above_0", True, "True: give a number above 0"),
    ("above_0", None, "None: give a number above 0"),
    ("above_0", 2**31, "2147483648: give a number above 0"),
    ("above_0", 1e-40, "1e-40: give a number above 0"),  # 0 in float32
    ("above_0", (), "(): give numbers above 0"),
    ("above_0", (1, "a"), "(1, 'a'): give numbers above 0"),
    ("from_0", -1, "-1: give a number of 0 or more"),
    ("from_0", float("inf"), "inf: give a number of 0 or more"),
    ("from_0", float("nan"), "nan: give a number of 0 or more"),
    ("from_0", 10**400, "give a number of 0 or more"),
    ("below_1", 1.0, "1.0: give a number below 1"),
    ("shares", 1.5, "1.5: give a share from 0 to 1"),
    ("parts", (0.0, 1.0), "(0.0, 1.0): give shares above 0 and at most 1"),
    ("counts", (1.0, 2), "(1.0, 2): give whole numbers above 0"),
]


@pytest.mark.parametrize(("kind", "value", "says"), NUMBERS)
def test_a_number_that_cannot_be_meant(kind, value, says):
    with pytest.raises(UserError) as caught:
        checks.check_numbers({"train": {"epochs": value}}, **{kind: ["train.epochs"]})
    assert str(caught.value).startswith("config.train.epochs: ")
    assert says in str(caught.value)


def test_numbers_that_can_be_meant():
    config = ConfigDict({"a": {"b": 3, "c": 0.0}, "d": (0.2, 1.0), "e": (1, 2), "on": True})
    kinds = {"from_0": ["a.c"], "below_1": ["a.c"], "shares": ["d"], "parts": ["d"]}
    checks.check_numbers(config, above_0=["a.b", "d"], counts=["e", "a.b"], **kinds)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, 2**31, (1.0, float("nan"))])
def test_every_number_of_a_config_is_looked_at(value):
    with pytest.raises(UserError, match=r"config\.a\.b: .*: give a finite number that 32 bits"):
        checks.check_numbers({"a": {"b": value}})


@pytest.mark.parametrize("config", [{}, {"train": 3}, ConfigDict({"train": {}})])
def test_a_config_of_another_task_lacks_the_field(config):
    with pytest.raises(UserError, match=r"config\.train\.epochs: is missing: use a config"):
        checks.check_numbers(config, above_0=["train.epochs"])


@pytest.mark.parametrize("value", [0.2, (0.2,), (1.4, 0.6), ("a", "b"), (0.1, float("inf")), ()])
def test_a_range_is_two_numbers_the_lower_one_first(value):
    with pytest.raises(
        UserError, match=r"config\.jitter: .*: give two numbers, the lower one first"
    ):
        checks.check_ranges({"jitter": value}, ["jitter"])
    checks.check_ranges({"jitter": (1, 1.0)}, ["jitter"])


@pytest.mark.parametrize("value", ["ab", (1,), (False,), ("a", None)])
def test_texts_are_a_tuple_of_text(value):
    with pytest.raises(UserError, match=r"config\.names: .*: give texts"):
        checks.check_texts({"names": value}, ["names"])
    checks.check_texts({"names": ("a",), "none": ()}, ["names", "none"])


@pytest.mark.parametrize("path", ["gone", "a" * 5000, "a\0b"])
def test_a_path_that_is_not_there_or_cannot_be(path):
    with pytest.raises(UserError, match=r"missing: config\.data\.source ") as caught:
        checks.check_files({"data.source": path, "other": ""})
    assert len(str(caught.value)) <= 1000
