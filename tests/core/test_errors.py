import pickle

import pytest

from medsyn_jax.core.errors import LeftOutRecord, RejectedRecord, UserError, shortened


@pytest.mark.parametrize("kind", [UserError, RejectedRecord, LeftOutRecord])
def test_a_message_is_one_printable_line(kind):
    error = kind("a.csv: 'one\ntwo\r\x00\x1b[31m\u2028' of b\udcb0.png: mend it")
    assert str(error) == r"a.csv: 'one two [31m ' of b\udcb0.png: mend it"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    long = str(kind(f"path: {'x' * 100_000}: mend it"))
    assert len(long) <= 1000
    assert long.startswith("path: x")
    assert long.endswith("x: mend it")


def test_shortened():
    assert shortened("as it is  \N{DEGREE SIGN}") == "as it is  \N{DEGREE SIGN}"
    assert shortened("x" * 80) == "x" * 80
    assert shortened("a" * 50 + "b" * 50) == "a" * 37 + " ... " + "b" * 37
