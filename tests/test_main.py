"""The command line as a user meets it: every mistake is one line and a status, no bug is hidden."""

import importlib
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from medsyn_jax import main as command_line
from medsyn_jax.core.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONVIRT = "--config=configs/convirt.py"


def start(*arguments, **env):
    return subprocess.Popen(
        [sys.executable, "-m", "medsyn_jax.main", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process, seconds=60):
    """(status, stdout, stderr); never leaves the process behind."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--config is missing: give --config configs/convirt.py"),
        (["--config"], "no such file: choose from configs/classify.py, configs/convirt.py"),
        (["--config=configs/nope.py"], "--config configs/nope.py: no such file: choose from"),
        (["--config=README.md"], "--config README.md: no Python file: choose from configs/"),
        (["--config=configs/common.py"], "no attribute 'get_config'"),
        ([f"{CONVIRT}:nope"], "variant 'nope' is unknown: choose from demo, smoke, paper"),
        ([CONVIRT, "--config.data.batchsize=3"], "'batchsize': did you mean \"batch_size\""),
        (
            [CONVIRT, "--config.data.batch_size=x"],
            "--config.data.batch_size=x: must be a whole number",
        ),
        ([CONVIRT, "--config.data.weights=(1,"], "--config.data.weights=(1,: Error while parsing"),
        ([CONVIRT, "stray"], "'stray' is no flag: use --flag=value"),
        ([CONVIRT, "--nope=3"], "Unknown command line flag 'nope'"),
        ([CONVIRT, "--config.task=fly", "--workdir={tmp}/run"], "config.task: 'fly' is unknown"),
        ([CONVIRT, "--workdir={tmp}/file"], "file: cannot be made (File exists): give another"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_status_2(tmp_path, arguments, says):
    (tmp_path / "file").touch()
    status, out, err = ended(start(*(a.replace("{tmp}", str(tmp_path)) for a in arguments)))
    assert (status, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


def test_help_says_how_to_call_it():
    status, out, err = ended(start("--help"))
    assert (status, err) == (0, "")
    assert "--config configs/convirt.py[:VARIANT]" in out


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections
def test_the_workdir_has_a_name_by_config_and_variant(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main", f"{CONVIRT}:smoke", "--config.seed=7"])
    config, workdir = command_line.parse(sys.argv)
    assert (config.seed, config.data.size, str(workdir)) == (7, 32, "runs/convirt-smoke")


def test_a_bug_in_a_config_keeps_its_traceback(tmp_path):
    path = tmp_path / "buggy.py"
    for body, bug in (("int('x')", "ValueError"), ("undefined", "NameError")):
        path.write_text(f"def get_config():\n    return {body}\n")
        status, _, err = ended(start(f"--config={path}"))
        assert status == 1
        assert "Traceback" in err
        assert body in err
        assert bug in err


@pytest.mark.parametrize("what", [ValueError, OSError, KeyError, AssertionError, SystemExit])
def test_a_bug_passes_through(monkeypatch, tmp_path, what):
    def run(config, workdir):
        raise what("a bug")

    monkeypatch.setattr(command_line, "parse", lambda argv: (None, tmp_path))
    monkeypatch.setattr(command_line, "run", run)
    with pytest.raises(what, match="a bug"):
        command_line.main(["main"])


class Left(BaseException):
    """Stands for the end of this process."""


@pytest.mark.parametrize(
    ("what", "status", "says"),
    [
        (ValueError("a bug"), 1, ["Traceback (most recent call last):", "ValueError: a bug"]),
        (UserError("a: mistake"), 2, ["error: a: mistake"]),
        (KeyboardInterrupt(), 130, ["interrupted; the same"]),
    ],
)
def test_one_of_several_processes_never_waits_for_the_others(
    monkeypatch, tmp_path, capsys, what, status, says
):
    def run(config, workdir):
        raise what

    def leave(status):
        raise Left(status)

    monkeypatch.setattr(command_line, "parse", lambda argv: (None, tmp_path))
    monkeypatch.setattr(command_line, "run", run)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left) as left:
        command_line.main(["main"])
    assert left.value.args == (status,)
    err = capsys.readouterr().err
    assert all(err.count(text) == 1 for text in says), err


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (UserError("a:\nmistake " + "x" * 5000), "error: a: mistake xxx"),
        (
            MemoryError("Unable to allocate 8. TiB"),
            "error: not enough memory (Unable to allocate 8.",
        ),
    ],
)
def test_what_a_run_raises_is_one_short_line(monkeypatch, tmp_path, capsys, what, says):
    def run(config, workdir):
        raise what

    monkeypatch.setattr(command_line, "parse", lambda argv: (None, tmp_path))
    monkeypatch.setattr(command_line, "run", run)
    assert command_line.main(["main"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(says)
    assert err.count("\n") == 1
    assert len(err) < 1100


def test_ctrl_c_is_one_line_and_status_130(monkeypatch, tmp_path, capsys):
    def run(config, workdir):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

    monkeypatch.setattr(command_line, "parse", lambda argv: (None, tmp_path))
    monkeypatch.setattr(command_line, "run", run)
    old = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        assert command_line.main(["main"]) == 130
    finally:
        signal.signal(signal.SIGINT, old)
    err = capsys.readouterr().err
    assert err == "interrupted; the same command goes on from the last checkpoint\n"


@pytest.mark.parametrize("task", command_line.TASKS)
def test_each_task_has_what_main_asks_of_it(task):
    module = importlib.import_module(f"medsyn_jax.tasks.{task}")
    assert all(callable(rule) for rule in module.CHECKS)
    assert all(isinstance(field, str) for field in module.FREE)
    assert list(inspect.signature(module.run).parameters) == ["config", "workdir"]


def test_no_task_imports_torch():
    """Installed or not: it is no dependency, and would bring threads of its own."""
    tasks = "\n".join(f"import medsyn_jax.tasks.{task}" for task in command_line.TASKS)
    told = "print([m for m in ('torch', 'tensorflow', 'diffusers') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{tasks}\n{told}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
