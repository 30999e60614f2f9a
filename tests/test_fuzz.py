"""The fuzzer can fail: what must not pass, does not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from medsyn_jax.core.errors import RejectedRecord, UserError
from scripts import fuzz
from scripts.fuzz_inputs import Kind, check

# In a process of its own: the limits on processor time are those of the whole process.
ENDLESS = """
import sys
from pathlib import Path
from scripts import fuzz
from scripts.fuzz_inputs import Kind

def act(rng, folder):
    while True:
        pass

fuzz.KINDS["made"] = Kind(lambda folder: None, act, 1, 0.2)
outcome = fuzz.run_case("made", 0, 0, Path(sys.argv[1]))
print(outcome.verdict, outcome.cause)
"""


def _run(monkeypatch, tmp_path, act) -> fuzz.Outcome:
    kind = Kind(lambda folder: None, lambda rng, folder: act(), 1, 0.2)
    monkeypatch.setitem(fuzz.KINDS, "made", kind)
    return fuzz.run_case("made", 0, 0, tmp_path / "case")


def _raise(error: Exception):
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("act", "verdict", "cause"),
    [
        (lambda: None, "passed", ""),
        (_raise(UserError("data: a.csv: no such file: give another")), "refused", ""),
        (_raise(RejectedRecord("a.png: every pixel has the value 0")), "rejected", ""),
        (_raise(KeyError("x")), "failed", "KeyError"),
        (_raise(UserError("")), "failed", "an empty message"),
        (_raise(UserError("a.csv: 'int' object is not subscriptable")), "failed", "of Python"),
        (lambda: check(False, "rows are lost", 3), "failed", "Fault rows are lost"),
    ],
)
def test_what_a_case_must_not_do_fails(monkeypatch, tmp_path, act, verdict, cause):
    outcome = _run(monkeypatch, tmp_path, act)
    assert outcome.verdict == verdict
    assert cause in outcome.cause
    assert not (tmp_path / "case").exists()


def test_a_case_without_an_end_fails(tmp_path):
    command = [sys.executable, "-c", ENDLESS, str(tmp_path / "case")]
    root = Path(__file__).resolve().parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert ended.stdout.startswith("failed TooSlow"), ended.stderr
    assert not (tmp_path / "case").exists()


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[1m", "\udcff", "x" * 2000, "\u2028", " "])
def test_messages_that_are_no_line_are_wrong(text):
    assert fuzz.wrong_message(text)
    assert not fuzz.wrong_message("data: a.csv: no such file: give another, or é")


def test_a_case_is_the_same_by_itself_and_after_others():
    def inputs(seed):
        return [fuzz.fuzz_sources.report(fuzz.random.Random(f"texts/{seed}/{n}")) for n in (0, 7)]

    assert inputs(1) == inputs(1) != inputs(2)


def test_a_worker_that_dies_is_a_failing_case():
    class Pipe:
        def recv(self):
            return ""

    class Process:
        exitcode = -11

        def join(self):
            pass

    pool = object.__new__(fuzz.Pool)
    worker = (Process(), Pipe())
    pool.workers, pool._start = [worker], lambda: worker
    outcome = pool._lost(worker, ("images", 3))
    assert (outcome.verdict, outcome.cause) == ("failed", "the process ended by SIGSEGV")
    assert os.environ["JAX_PLATFORMS"] == "cpu"
