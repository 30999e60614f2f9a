"""Runs in processes of their own: killed and started again, and several that train together.

The long form of the first two is `python -m scripts.chaos`, by itself and with --processes 2.
"""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs.classify import get_config
from medsyn_jax import main as command_line
from scripts import chaos
from tests.train.runs import write_pairs

CLASSIFY = "configs/classify.py:smoke"
STEPS = 8
DEVICES = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """run(name, processes) -> a run under one folder; nothing that it starts is left behind."""
    root, made = tmp_path_factory.mktemp("runs"), []

    def make(name, processes=1):
        made.append(chaos.Run(root / name / "run", DEVICES // processes, processes, STEPS))
        return made[-1]

    yield make
    for run in made:
        run.clear()


@pytest.fixture(scope="module")
def unbroken(runs):
    run = runs("unbroken")
    return run, *chaos.unbroken(run)


@pytest.mark.parametrize(("processes", "tolerance"), [(1, 0.0), (2, chaos.TOLERANCE)])
def test_a_run_that_was_stopped_and_killed_ends_as_the_unbroken_one(
    runs, unbroken, processes, tolerance
):
    whole, prepared, ending = unbroken
    torn = runs(f"torn-{processes}", processes)
    torn.start()
    chaos.wait_until(torn, lambda: torn.step() >= 1, chaos.LIMIT_S)
    torn.running[-1].send_signal(signal.SIGTERM)  # one is told; all stop at one step
    codes = [child.wait(chaos.LIMIT_S) for child in torn.running]
    assert codes == [143] * processes, torn.tail()
    saved = torn.saved()
    assert 1 <= saved < STEPS
    assert f"SIGTERM: saved at step {saved};" in torn.output().read_text()
    assert "Traceback" not in torn.tail()

    # While it starts again (of several, only one start more is affordable), and at some step.
    moments = [0.12, 0.6] if processes == 1 else [0.6]
    assert len(chaos.broken(torn, moments, prepared, ending)) == len(moments)
    assert f"resumed at step {saved}" in torn.output().read_text()
    assert torn.output().read_text().count("resumed at step") >= 2
    assert chaos.differences(whole, torn, tolerance) == []
    assert torn.left_over() == 0
    for process in range(1, processes):  # only the first one writes and talks
        assert "results: " not in torn.output(process).read_text()
        assert "saved at" not in torn.output(process).read_text()


def test_two_processes_probe_as_one_and_only_the_first_needs_the_raw_data(unbroken, tmp_path):
    """The second one runs where the path of the CSV leads nowhere."""
    write_pairs(tmp_path / "pairs")
    (tmp_path / "elsewhere").mkdir()
    fields = {"encoder.workdir": str(unbroken[0].workdir), "seeds": 2, "fractions": (0.5,)}
    fields |= {"ingest.pairs.subject": "subject", "ingest.pairs.split": "split"}
    fields |= {"ingest.pairs.labels": ("bright", "left"), "data.source": "pairs/pairs.csv"}
    command = [sys.executable, "-m", "medsyn_jax.main", f"--config={chaos.ROOT}/{CLASSIFY}"]
    command += [f"--config.{field}={value}" for field, value in fields.items()]
    command += [f"--workdir={tmp_path}/two/run"]
    env = chaos.environment(tmp_path, DEVICES // 2) | {"PYTHONPATH": str(chaos.ROOT)}
    env |= {"MEDSYN_COORDINATOR": f"127.0.0.1:{chaos.free_port()}", "MEDSYN_PROCESSES": "2"}
    logs, running = [tmp_path / "0.log", tmp_path / "1.log"], []
    for process, cwd in enumerate([tmp_path, tmp_path / "elsewhere"]):
        with logs[process].open("w") as log:
            alone = env | {"MEDSYN_PROCESS": str(process)}
            output = {"stdout": log, "stderr": log}
            running.append(subprocess.Popen(command, cwd=cwd, env=alone, **output))
    try:
        codes = [child.wait(chaos.LIMIT_S) for child in running]
    finally:
        for child in running:
            child.kill()
    said = [path.read_text() for path in logs]
    assert codes == [0, 0], "\n".join(said)
    assert [text.count("results: ") for text in said] == [1, 0]

    config = get_config("smoke")
    config.update_from_flattened_dict(fields | {"data.source": str(tmp_path / "pairs/pairs.csv")})
    command_line.run(config, tmp_path / "one" / "run")
    one, two = (sorted((tmp_path / n / "run" / "features").glob("*")) for n in ("one", "two"))
    assert len(one) == 12  # of three splits: pre-trained, two untrained encoders, pixels
    for a, b in zip(one, two, strict=True):
        want, got = np.load(a)["features"], np.load(b)["features"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6, err_msg=a.name)


def test_a_mistake_that_one_process_finds_ends_the_others(runs, tmp_path):
    """Ingestion is the first process's; the second waits for it at a barrier."""
    run = runs("mistaken", processes=2)
    table = tmp_path / "pairs.csv"
    table.write_text("picture,words\n1.png,clear\n")
    run.start(f"--config.data.sources=('{table}',)")
    codes = [child.wait(60) for child in run.running]
    assert codes[0] == 2
    assert codes[1] != 0
    said = run.output(0).read_text().splitlines()
    assert [line for line in said if line.startswith("error: ")] == [
        f"error: missing column: {table}: no column 'image' among: picture, words"
        ": set --config.ingest.pairs.image"
    ]


def test_processes_that_cannot_meet_are_told_what_is_missing(tmp_path):
    env = {**os.environ, "MEDSYN_COORDINATOR": "127.0.0.1:1", "MEDSYN_PROCESSES": "two"}
    command = [sys.executable, "-m", "medsyn_jax.main", "--config=configs/convirt.py:smoke"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path}/run"],
        cwd=chaos.ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: MEDSYN_COORDINATOR is set, so MEDSYN_PROCESSES and")
    assert done.stderr.count("\n") == 1


def test_the_kills_are_spread_over_the_whole_life():
    for kills in (3, 10):
        moments = chaos.moments(kills, seed=0)
        assert len(moments) == kills
        assert moments == sorted(moments) == chaos.moments(kills, seed=0)
        assert moments[0] < 1 / kills
        assert moments[-1] >= 1 - 1 / kills


def test_what_is_left_over_is_seen_and_cleared(tmp_path):
    run = chaos.Run(tmp_path / "a" / "run", 1)
    parent = "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", parent], start_new_session=True)
    run.running, run.sessions = [child], [child.pid]
    time.sleep(0.5)
    run.kill()
    assert chaos.group_alive(child.pid)
    run.clear()
    deadline = time.monotonic() + 30
    while chaos.group_alive(child.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not chaos.group_alive(child.pid)
