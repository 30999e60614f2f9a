"""Kill a study with SIGKILL at random moments; check that its tables end as if never interrupted.

    python -m scripts.chaos_study --kills 10

Runs `configs/study.py:smoke` once without and once with kills, and starts the killed study again
after each. A kill hits the study alone, whose commands then run on, or the commands as well. Exit
status 1 if a byte of table.md, table.tex, table.csv or report.html differs.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLES = ("table.md", "table.tex", "table.csv", "report.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        whole = Path(folder) / "whole"
        finish(start(whole))
        seconds = time.monotonic() - began
        print(f"uninterrupted: {seconds:.0f} s", flush=True)
        killed = Path(folder) / "killed"
        for number in range(options.kills):
            study = start(killed)
            # On average the kills leave the study as much time as it needs.
            moment, everything = rng.uniform(2, 2 * seconds / options.kills), rng.random() < 0.5
            try:
                study.wait(moment)
                print(f"start {number + 1}: done before the kill at {moment:.0f} s", flush=True)
                break
            except subprocess.TimeoutExpired:
                os.killpg(study.pid, signal.SIGKILL) if everything else study.kill()
                study.wait()
            what = "and its commands" if everything else "alone"
            cells = len(list((killed / "cells").glob("*.json")))
            print(
                f"kill {number + 1} at {moment:.0f} s, the study {what}: {cells} cells", flush=True
            )
        finish(start(killed))
        differ = [t for t in TABLES if (whole / t).read_bytes() != (killed / t).read_bytes()]
    print(f"{', '.join(differ)} differ" if differ else "all tables are equal, byte for byte")
    sys.exit(bool(differ))


def start(workdir: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "medsyn_jax.main", "--config", "configs/study.py:smoke"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(workdir.parent / "cache")
    return subprocess.Popen(
        [*command, "--workdir", str(workdir)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(study: subprocess.Popen) -> None:
    _, errors = study.communicate()
    if study.returncode:
        sys.exit(f"the study ended with status {study.returncode}:\n{errors[-3000:]}")


if __name__ == "__main__":
    main()
