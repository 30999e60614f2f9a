"""What people read of an error: one line of bounded length, whatever stands in it."""

import pickle

import pytest

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord, UserError, shortened


@pytest.mark.parametrize("kind", [UserError, RejectedRecord, LeftOutRecord])
def test_a_message_is_one_printable_line(kind):
    error = kind("a.csv: first\r\n  second\u2028third\0\x1b[1m of b\udcb0.png: mend it")
    assert str(error) == r"a.csv: first second third\x00\x1b[1m of b\udcb0.png: mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    long = str(kind(f"path: {'x' * 100_000}: mend it"))
    assert 900 < len(long) <= 1000
    assert long.startswith("path: xxx")
    assert " ... xxx" in long
    assert long.endswith("x: mend it")


@pytest.mark.parametrize("text", ["x" * 80, "as it is  \N{DEGREE SIGN}", "r\u00f6ntgen \u80f8.png"])
def test_a_text_that_fits_stays_as_it_is(text):
    assert shortened(text) == text


def test_the_middle_of_a_long_text_is_left_out():
    assert shortened("a" * 50 + "b" * 50) == "a" * 37 + " ... " + "b" * 37
