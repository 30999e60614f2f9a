"""Fields of a config that cannot be meant, each in one line that names the field."""

import pytest
from ml_collections import ConfigDict

from medsyn_jax.core import checks
from medsyn_jax.core.errors import UserError

NUMBERS = [
    ("above 0", 0, "0: give a number above 0"),
    ("above 0", "3", "'3': give a number above 0"),
    ("above 0", True, "True: give a number above 0"),
    ("above 0", None, "None: give a number above 0"),
    ("above 0", 2**31, "2147483648: give a number above 0"),
    ("above 0", 1e-40, "1e-40: give a number above 0"),  # 0 in float32
    ("above 0", (), "(): give numbers above 0"),
    ("above 0", (1, "a"), "(1, 'a'): give numbers above 0"),
    ("from 0", -1, "-1: give a number of 0 or more"),
    ("from 0", float("inf"), "inf: give a number of 0 or more"),
    ("from 0", float("nan"), "nan: give a number of 0 or more"),
    ("from 0", 10**400, "give a number of 0 or more"),
    ("below 1", 1.0, "1.0: give a number below 1"),
    ("share", 1.5, "1.5: give a share from 0 to 1"),
    ("part", (0.0, 1.0), "(0.0, 1.0): give shares above 0 and at most 1"),
    ("count", (1.0, 2), "(1.0, 2): give whole numbers above 0"),
]


@pytest.mark.parametrize(("kind", "value", "says"), NUMBERS)
def test_a_number_that_cannot_be_meant(kind, value, says):
    with pytest.raises(UserError) as caught:
        checks.numbers(kind, "train", "epochs")({"train": {"epochs": value}})
    assert str(caught.value).startswith("config.train.epochs: ")
    assert says in str(caught.value)


def test_numbers_that_can_be_meant():
    config = ConfigDict({"a": {"b": 3, "c": 0.0}, "d": (0.2, 1.0), "e": (1, 2), "on": True})
    for kind, section, names in (
        ("above 0", "a", "b"),
        ("above 0", "", "d"),
        ("from 0", "a", "c"),
        ("below 1", "a", "c"),
        ("share", "", "d"),
        ("part", "", "d"),
        ("count", "", "e"),
        ("count", "a", "b lacking?"),
    ):
        checks.numbers(kind, section, names)(config)
    checks.run((), config)


def test_a_field_that_a_section_need_not_have_is_checked_where_there():
    rule = checks.numbers("above 0", "loss", "tau?")
    rule({"loss": {}})
    with pytest.raises(UserError, match=r"config\.loss\.tau: 0: give a number above 0"):
        rule({"loss": {"tau": 0}})


def test_rules_are_run_in_order():
    def first(config):
        raise UserError("first")

    with pytest.raises(UserError, match="first"):
        checks.run((first, checks.choice("dtype", ("float32",))), {"dtype": "int8"})


def test_choices():
    checks.choice("dtype", checks.DTYPES)({"dtype": "bfloat16"})
    checks.choices("data.splits", ("train", "test"))({"data": {"splits": ("test",)}})
    with pytest.raises(
        UserError, match=r"config\.dtype: 'int8' is unknown: choose from"
    ):
        checks.choice("dtype", checks.DTYPES)({"dtype": "int8"})
    with pytest.raises(UserError, match=r"config\.data\.splits: 'dev' is unknown"):
        checks.choices("data.splits", ("train", "test"))({"data": {"splits": ("train", "dev")}})


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e300, 2**31, (1.0, float("nan"))])
def test_every_number_of_a_config_is_looked_at(value):
    with pytest.raises(UserError, match=r"config\.a\.b: .*: give a finite number that 32 bits"):
        checks.run((), {"a": {"b": value}})


@pytest.mark.parametrize("config", [{}, {"train": 3}, ConfigDict({"train": {}})])
def test_a_config_of_another_task_lacks_the_field(config):
    with pytest.raises(UserError, match=r"config\.train\.epochs: is missing: use a config"):
        checks.numbers("above 0", "train", "epochs")(config)


@pytest.mark.parametrize("value", [0.2, (0.2,), (1.4, 0.6), ("a", "b"), (0.1, float("inf")), ()])
def test_a_range_is_two_numbers_the_lower_one_first(value):
    with pytest.raises(
        UserError, match=r"config\.jitter: .*: give two numbers, the lower one first"
    ):
        checks.ranges("", "jitter")({"jitter": value})
    checks.ranges("", "jitter")({"jitter": (1, 1.0)})


@pytest.mark.parametrize("value", ["ab", (1,), (False,), ("a", None)])
def test_texts_are_a_tuple_of_text(value):
    with pytest.raises(UserError, match=r"config\.names: .*: give texts"):
        checks.texts("", "names")({"names": value})
    checks.texts("", "names none")({"names": ("a",), "none": ()})


@pytest.mark.parametrize("path", ["gone", "a" * 5000, "a\0b"])
def test_a_path_that_is_not_there_or_cannot_be(path):
    with pytest.raises(UserError, match=r"missing: config\.data\.source ") as caught:
        checks.files(lambda config: {"data.source": path, "other": ""})({})
    assert len(str(caught.value)) <= 1000
