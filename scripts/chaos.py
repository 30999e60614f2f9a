"""Kill a pre-training run with SIGKILL at many moments; check that it ends as if never interrupted.

    python -m scripts.chaos --kills 10
    python -m scripts.chaos --kills 2 --processes 2

Runs `configs/convirt.py:smoke`, with a checkpoint at every step, once without and once with kills;
the killed run is started again after each kill until it is done. Prints one JSON line with what the
kills hit and the differences in checkpoints, metrics.jsonl (except images/s), results.json and
exported encoders. With one process the two runs must be equal bit for bit.

With --processes N the killed run is N processes under jax.distributed, all killed at once, with
--devices simulated devices each; the uninterrupted run is a single process with all these devices.
Their parameters must agree to 1e-5 after 8 steps, except those that the loss does not depend on
(IDLE).

The moments are drawn from --seed: while the run starts (imports, ingestion, tokenizer,
compilation), at some step (computing, saving or evaluating), or at the end (last evaluation and
export). Exit status 1 if the runs differ or a process outlives its run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medsyn_jax.train.checkpoint import PARTS, Checkpoints

ROOT = Path(__file__).resolve().parents[1]
EPOCH = 4  # steps of the smoke corpus
OVERRIDES = (
    "--config.train.checkpoints_per_epoch=4.0",
    "--config.train.log_every=1",
)
START, END = 0.25, 0.9  # shares of the run: up to the first step, and from the last step on
LIMIT_S = 240.0  # for each start of a run
TOLERANCE = 1e-5
# A bias in front of a batch normalization has a gradient of 0. Rounding leaves at most 1e-9 of the
# clipped norm here, which Adam turns into whole steps, so such parameters are not compared.
IDLE = 1e-8


class Failed(Exception):
    """A run failed; the message holds its output."""


@dataclass
class Run:
    """One run in its own workdir, started as often as needed."""

    workdir: Path
    devices: int
    processes: int = 1
    steps: int = 24
    running: list[subprocess.Popen] = field(default_factory=list)
    sessions: list[int] = field(default_factory=list)
    stale: int = 0  # inode of the metrics.jsonl before this start; the new start replaces the file
    resumed: int = 0  # step from which this start resumes

    def start(self, *overrides: str) -> None:
        command = [sys.executable, "-m", "medsyn_jax.main", "--config=configs/convirt.py:smoke"]
        command += [f"--workdir={self.workdir}", *OVERRIDES]
        command += [f"--config.train.epochs={self.steps / EPOCH}", *overrides]
        self.workdir.mkdir(parents=True, exist_ok=True)
        self.stale, self.resumed = self.inode(), self.saved()
        self.running = []
        port = free_port()
        for process in range(self.processes):
            env = environment(self.workdir.parents[1], self.devices)
            if self.processes > 1:
                env["MEDSYN_COORDINATOR"] = f"127.0.0.1:{port}"
                env |= {"MEDSYN_PROCESSES": str(self.processes), "MEDSYN_PROCESS": str(process)}
            with self.output(process).open("ab") as output:
                child = subprocess.Popen(
                    command, cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
                )
            self.running.append(child)
            self.sessions.append(child.pid)

    def output(self, process: int = 0) -> Path:
        return self.workdir.parent / f"{self.workdir.name}-{process}.log"

    def alive(self) -> bool:
        return any(child.poll() is None for child in self.running)

    def kill(self) -> None:
        """Send SIGKILL to every process of the run, but not to its child processes."""
        for child in self.running:
            child.kill()
        for child in self.running:
            child.wait()

    def finish(self) -> None:
        """Wait for the end; raise Failed unless the exit status is 0."""
        deadline = time.monotonic() + LIMIT_S
        for child in self.running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.kill()
                raise Failed(f"not done after {LIMIT_S:g} s:\n{self.tail()}") from None
        codes = [child.returncode for child in self.running]
        if any(codes):
            raise Failed(f"exit status {codes}:\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(
            self.output(i).read_text(errors="replace")[-3000:] for i in range(self.processes)
        )

    def inode(self) -> int:
        path = self.workdir / "metrics.jsonl"
        return path.stat().st_ino if path.exists() else 0

    def step(self) -> int:
        """The last step in metrics.jsonl; 0 until this start has written the file."""
        if self.inode() == self.stale:
            return 0
        return max((line["step"] for line in self.metrics()), default=0)

    def metrics(self) -> list[dict]:
        lines = []
        for text in (self.workdir / "metrics.jsonl").read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # a line that is being written
            line.pop("images_per_second", None)
            lines.append(line)
        return lines

    def saved(self) -> int:
        """Step of the latest complete checkpoint, without opening it."""
        folder = self.workdir / "checkpoints"
        steps = [int(p.name) for p in folder.glob("*") if p.name.isdigit()]
        return max(steps, default=0)

    def left_over(self) -> int:
        """Number of processes of the run that are still alive after 10 seconds."""
        deadline = time.monotonic() + 10
        while (count := sum(map(group_alive, self.sessions))) and time.monotonic() < deadline:
            time.sleep(0.1)
        return count

    def clear(self) -> None:
        """Kill all processes of the run that are still alive."""
        for session in self.sessions:
            if group_alive(session):
                os.killpg(session, signal.SIGKILL)
        for child in self.running:
            child.wait()


def group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def environment(root: Path, devices: int) -> dict[str, str]:
    """The caller's environment with simulated devices and one compilation cache for all runs."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("MEDSYN_")}
    flags = f"{env.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    env.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / ".jax_cache"))
    return env


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def unbroken(run: Run) -> tuple[float, float]:
    """Run to the end; return the seconds from start to compilation, and from last step to end."""
    began = time.monotonic()
    run.start()
    wait_until(run, (run.workdir / "tokenizer").exists, LIMIT_S)
    prepared = time.monotonic() - began
    wait_until(run, lambda: run.step() == run.steps, LIMIT_S)
    last = time.monotonic()
    run.finish()
    return prepared, time.monotonic() - last


def moments(kills: int, seed: int) -> list[float]:
    """When to kill, as shares of the run, spread over all of it."""
    rng = random.Random(seed)
    return [(i + rng.random()) / kills for i in range(kills)]


def broken(run: Run, moments: list[float], prepared: float, ending: float) -> list[dict]:
    """Run to the end with a kill at each of `moments`; return what each kill hit."""
    hit = []
    for moment in moments:
        run.start()
        began = time.monotonic()
        if moment < START:
            # Compilation from the cache takes about as long as everything before it.
            wait_until(run, lambda: run.step() > run.resumed, moment / START * 2 * prepared)
        elif moment < END:
            target = 1 + int((moment - START) / (END - START) * (run.steps - 1))
            wait_until(run, lambda least=target: run.step() >= least, LIMIT_S)
            time.sleep(moment * 997 % 1 * 0.3)  # anywhere in this step or the next, or a save
        else:
            wait_until(run, lambda: run.step() >= run.steps, LIMIT_S)
            time.sleep(min(1.0, (moment - END) / (1 - END)) * ending)
        was_alive = run.alive()
        seconds = time.monotonic() - began
        run.kill()
        codes = [child.returncode for child in run.running]
        if any(code not in (0, -signal.SIGKILL) for code in codes):
            raise Failed(f"exit status {codes} before the kill:\n{run.tail()}")
        if was_alive:
            where = {"after_s": round(seconds, 2), "step": run.step(), "saved": run.saved()}
            hit.append({"moment": round(moment, 2), **where})
    run.start()
    run.finish()
    return hit


def wait_until(run: Run, reached, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while run.alive() and not reached() and time.monotonic() < deadline:
        time.sleep(0.005)


def differences(a: Run, b: Run, tolerance: float) -> list[str]:
    """Differences of the second run from the first; tolerance 0 means equal bits."""
    differing = []
    steps = [sorted(p.name for p in (r.workdir / "checkpoints").iterdir()) for r in (a, b)]
    if steps[0] != steps[1]:
        differing.append(f"checkpoints {steps[0]} and {steps[1]}")
    one, other = (Checkpoints(r.workdir / "checkpoints", read_only=True) for r in (a, b))
    for step in {one.latest(), one.best()} & {other.latest(), other.best()}:
        assert step is not None
        if one.meta(step) != other.meta(step) and not tolerance:
            differing.append(f"meta at step {step}: {one.meta(step)} and {other.meta(step)}")
        left, right = one.restore_all(step, PARTS), other.restore_all(step, PARTS)
        idle = idle_leaves(left[2]) if tolerance else set()
        for part, x, y in zip(PARTS, left, right, strict=True):
            if tolerance and part != "params":
                continue
            if x.keys() != y.keys():
                differing.append(f"names of {part} at step {step}")
            for name in x.keys() & y.keys() - idle:
                u, v = np.asarray(x[name]), np.asarray(y[name])
                apart = np.abs(u.astype(float) - v.astype(float)).max()
                if apart > tolerance or (not tolerance and u.tobytes() != v.tobytes()):
                    differing.append(f"{part}/{name} at step {step}: {apart:.3g} apart")
    one.close()
    other.close()
    return differing + (_text_differences(a, b) if not tolerance else _lines_differ(a, b))


def idle_leaves(opt: dict) -> set[str]:
    """Names of the parameters that the loss does not depend on, by Adam's second moments."""
    moments = {k.split("/nu/")[1]: np.asarray(v) for k, v in opt.items() if "/nu/" in k}
    return {name for name, nu in moments.items() if np.sqrt(nu.max()) < IDLE}


def _text_differences(a: Run, b: Run) -> list[str]:
    differing = []
    if a.metrics() != b.metrics():
        pairs = zip(a.metrics(), b.metrics(), strict=False)
        first = next((f"{x} and {y}" for x, y in pairs if x != y), "another number of lines")
        differing.append(f"metrics.jsonl: {first}")
    for name in ("results.json", "encoders/image.safetensors", "encoders/text.safetensors"):
        if (a.workdir / name).read_bytes() != (b.workdir / name).read_bytes():
            differing.append(name)
    return differing


def _lines_differ(a: Run, b: Run) -> list[str]:
    steps = [[line["step"] for line in r.metrics()] for r in (a, b)]
    return [] if steps[0] == steps[1] else [f"steps in metrics.jsonl: {steps[0]} and {steps[1]}"]


def code() -> str:
    """Hash of the package and the configs: runs of two versions cannot be compared."""
    digest = hashlib.sha256()
    for folder in ("medsyn_jax", "configs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def chaos(root: Path, kills: int, processes: int = 1, devices: int = 1, seed: int = 0) -> dict:
    """Make both runs under `root`; return the result that is printed."""
    steps = 24 if processes == 1 else 8  # rounding depends on the processes and grows with steps
    whole = Run(root / "unbroken" / "run", devices * processes, steps=steps)
    torn = Run(root / "broken" / "run", devices, processes, steps)
    began, before = time.monotonic(), code()
    try:
        prepared, ending = unbroken(whole)
        hit = broken(torn, moments(kills, seed), prepared, ending)
        left_over = whole.left_over() + torn.left_over()
    finally:
        whole.clear()
        torn.clear()
    if code() != before:
        raise Failed("the code was edited during the run: start again")
    differing = differences(whole, torn, 0.0 if processes == 1 else TOLERANCE)
    return {
        "kills": len(hit),
        "hit": hit,
        "steps": whole.steps,
        "processes": processes,
        "devices": devices * processes,
        "seconds": round(time.monotonic() - began, 1),
        "left_over_processes": left_over,
        "different": len(differing),
        "differences": differing[:5],
        "equal": not differing,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--devices", type=int, help="of each process; default 1, of several 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder in which both runs are kept")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="chaos-"))
    devices = options.devices or (2 if options.processes > 1 else 1)
    try:
        result = chaos(root.absolute(), options.kills, options.processes, devices, options.seed)
    except Failed as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    print(json.dumps(result))
    ok = result["equal"] and not result["left_over_processes"]
    return 0 if ok and result["kills"] == options.kills else 1


if __name__ == "__main__":
    sys.exit(main())
