"""Kill a study with SIGKILL at random moments; check that its tables end as if never interrupted.

    python -m scripts.chaos_study --kills 10

Runs `configs/study.py:smoke` once without kills, then with kills, and starts the killed study again
after each; a study that ends before its kill is followed by a new one. A kill hits the study alone,
whose commands then run on, or the commands as well. Exit status 1 if a byte of table.md, table.tex,
table.csv or report.html of any study differs.
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
        killed, number = [Path(folder) / "killed-1"], 0
        while number < options.kills:
            study = start(killed[-1])
            moment, everything = rng.uniform(2, 2 * seconds / options.kills), rng.random() < 0.5
            try:
                study.wait(moment)
                print(f"a study was done before a kill at {moment:.0f} s: the next", flush=True)
                killed.append(Path(folder) / f"killed-{len(killed) + 1}")
                continue
            except subprocess.TimeoutExpired:
                os.killpg(study.pid, signal.SIGKILL) if everything else study.kill()
                study.wait()
            number += 1
            what = "and its commands" if everything else "alone"
            cells = len(list((killed[-1] / "cells").glob("*.json")))
            print(f"kill {number} at {moment:.0f} s, the study {what}: {cells} cells", flush=True)
        finish(start(killed[-1]))
        differ = [
            f"{ended.name}/{table}"
            for ended in killed
            for table in TABLES
            if (whole / table).read_bytes() != (ended / table).read_bytes()
        ]
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
